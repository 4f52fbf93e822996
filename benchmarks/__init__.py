"""The commands behind every number: each runs a study and leaves its rows in docs/results/NAME.jsonl."""
