"""The new process of `benchmarks.reload`: loads a checkpoint in the two ways a user would and writes the logits of each."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

import stackcomp


def main(checkpoint: str, batch: str, out: str) -> None:
    """Write load.pt and auto.pt into `out`."""
    inputs = torch.load(batch)
    ways = {"load": stackcomp.load, "auto": AutoModelForSequenceClassification.from_pretrained}
    for name, load in ways.items():
        with torch.no_grad():
            torch.save(load(checkpoint).eval()(**inputs).logits, Path(out) / f"{name}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
