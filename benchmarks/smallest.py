"""What the search pipelines/studies/smallest_sst2.py found, as Markdown: the chosen stack beside the dense model, on the test split."""

from collections.abc import Sequence

from benchmarks.tables import plus_minus, table
from stackcomp.studies.rows import Row

NAME = "smallest_sst2"
COMMAND = f"stackcomp search pipelines/studies/{NAME}.py"


def headline(rows: Sequence[Row]) -> str:
    """The chosen pipeline, what it was chosen from, and its declaration."""
    done = [row for row in rows if "error" not in row]
    chosen = [row for row in done if row["labels"].get("rung") == "chosen"]
    if not chosen:
        return f"Not run to its end yet: `{COMMAND}` makes the rows."
    (best,) = chosen
    rungs = [row for row in done if isinstance(row["labels"].get("rung"), int)]
    (searched,) = [
        row
        for row in rungs
        if row["declaration"] == best["declaration"]
        and row["labels"]["rung"] == max(one["labels"]["rung"] for one in rungs)
    ]
    lines = [("dense", best["steps"][0]), (f"**{_name(best)}**", best)]
    cells = [
        [
            name,
            f"{row['size_bytes'] / 1e6:.2f} MB",
            f"{row['compression']:.1f}x",
            plus_minus(row["score"], row["noise"]),
            plus_minus(row["difference"], row["difference_noise"], signed=True),
        ]
        for name, row in lines
    ]
    tried = len({row["key"].partition("/")[2] for row in rungs})
    machine = best["machine"]
    return "\n\n".join(
        [
            table(["", "whole file", "smaller", f"{best['metric']} ± noise", "vs dense"], cells),
            f"Chosen from {tried} pipelines on {searched['examples']} examples carved from the training split, where it scores "
            f"{plus_minus(searched['difference'], searched['difference_noise'], signed=True)} against dense; scored once on the "
            f"{best['examples']} of the validation split.",
            f"```text\n{best['declaration']}\n```",
            f"Made by `{COMMAND}` on {best['date']}: {machine['processor']}, threads: {machine['threads']}, "
            f"torch {best['versions']['torch']}.",
        ]
    )


def _name(row: Row) -> str:
    return row["key"].partition("/")[2]
