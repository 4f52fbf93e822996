"""What the search pipelines/studies/smallest_sst2.py found, as Markdown: the chosen stack beside the dense model, on the test split."""

from collections.abc import Sequence

from benchmarks.command import ROOT
from benchmarks.tables import plus_minus, table
from stackcomp.core.pipeline_file import read_file
from stackcomp.studies.rows import Row
from stackcomp.studies.search import Search

NAME = "smallest_sst2"
COMMAND = f"stackcomp search pipelines/studies/{NAME}.py"


def search() -> Search:
    """What is searched for."""
    return read_file(ROOT / "pipelines" / "studies" / f"{NAME}.py")["search"]


def headline(rows: Sequence[Row], asked: Search | None = None) -> str:
    """The chosen pipeline, what it was chosen from, and its declaration; only rows that the search would make today count."""
    asked = asked or search()
    done = [row for row in rows if "error" not in row and asked.made(row)]
    chosen = {_name(row): row for row in done if row["labels"]["rung"] == "chosen"}
    rungs = [row for row in done if row["labels"]["rung"] != "chosen"]
    last = [row for row in rungs if row["labels"]["rung"] == len(asked.rungs) and _name(row) in chosen]
    if not last:
        return f"Not run to its end yet: `{COMMAND}` makes the rows."
    searched = min(last, key=lambda row: (not asked.reaches(row), asked.cost(row)))
    best = chosen[_name(searched)]
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
            f"{plus_minus(searched['difference'], searched['difference_noise'], signed=True)} against dense"
            f"{_missed(asked, searched)}; scored once on the {best['examples']} of the validation split.",
            f"```text\n{best['declaration']}\n```",
            f"Made by `{COMMAND}` on {best['date']}: {machine['processor']}, threads: {machine['threads']}, "
            f"torch {best['versions']['torch']}.",
        ]
    )


def _missed(asked: Search, row: Row) -> str:
    """What a row misses of the loss that was asked for, in words; nothing where it reaches it."""
    if asked.loss is None or asked.reaches(row):
        return ""
    return f", and **misses the target** of a loss of at most {asked.loss:g}"


def _name(row: Row) -> str:
    return row["key"].partition("/")[2]
