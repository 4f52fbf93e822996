"""What the searches for a small file of SST-2 found, as Markdown: each chosen stack beside the dense model and the best single technique.

They are pipelines/studies/sst2_24x.py and sst2_40x.py, for the best score in so many bytes, and share their rows. Stacks and techniques
are chosen on the selection split, a technique as the smallest file that keeps within a point; figures are those of the test split.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.command import ROOT
from benchmarks.tables import made_with, plus_minus, table
from stackcomp.core.pipeline_file import read_file
from stackcomp.studies.rows import Row
from stackcomp.studies.search import Search
from stackcomp.studies.study import Study

NAME, SINGLE = "smallest_sst2", "smallest_sst2_single"
SEARCHES = ("sst2_24x", "sst2_40x")  # under pipelines/studies
COMMANDS = tuple(f"stackcomp search pipelines/studies/{file}.py" for file in SEARCHES)
LOSS = 1.0  # points that the best single technique may lose


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What a search chose. searched: its row of the last rung, on the selection split; chosen: the one on the test split; tried: how
    many pipelines the search has run."""

    searched: Row
    chosen: Row
    tried: int

    @property
    def name(self) -> str:
        """Its techniques with their strengths."""
        return _name(self.chosen)


def search(file: str) -> Search:
    """What a file of SEARCHES looks for."""
    return _declared(file)["search"]


def stack(rows: Sequence[Row], asked: Search) -> Stack | None:
    """The best that was scored on the test split and reaches the goal, if there is one; only rows that the search would make today
    count."""
    done = [row for row in rows if "error" not in row and asked.made(row)]
    chosen = {_name(row): row for row in done if row["labels"]["rung"] == "chosen"}
    rungs = [row for row in done if row["labels"]["rung"] != "chosen"]
    last = [row for row in rungs if row["labels"]["rung"] == len(asked.rungs) and _name(row) in chosen]
    searched = min(filter(asked.reaches, last), key=asked.cost, default=None)
    if searched is None:
        return None
    tried = len({_name(row) for row in rungs})
    return Stack(searched=searched, chosen=chosen[_name(searched)], tried=tried)


def stacks(rows: Sequence[Row]) -> list[Stack]:
    """What every search has found for its goal."""
    return [one for file in SEARCHES if (one := stack(rows, search(file)))]


def singles(rows: Sequence[Row]) -> list[Row]:
    """The finished rows of single techniques as they are declared today."""
    study: Study = _declared("sst2_single")["study"]
    return [dict(row) for row in study.own(rows) if "technique" in row["labels"] and "error" not in row]


def single(alone: Sequence[Row], loss: float = LOSS) -> Row | None:
    """The technique with the smallest file among those that lose at most `loss` on the selection split: its row on the test split, if it
    has one yet."""
    found = {row["key"]: row for row in alone}
    within = [row for row in alone if row["split"] == "selection" and row["difference"] >= -loss]
    best = min(within, key=lambda row: row["size_bytes"], default=None)
    return None if best is None else found.get(best["key"].replace("/selection", "/test"))


def named_single(best: Row, alone: Sequence[Row]) -> str:
    """What the best of these single techniques is called."""
    count = len({row["labels"]["technique"] for row in alone})
    return f"one technique, {best['labels']['technique']} (the smallest of {count} within {LOSS:g} point)"


def headline(rows: Sequence[Row], alone: Sequence[Row] = ()) -> str:
    """The stacks that were found, how they were chosen, and their declarations. alone: rows of single techniques."""
    found = stacks(rows)
    if not found:
        return f"Nothing reaches a goal yet: {' and '.join(f'`{one}`' for one in COMMANDS)} make the rows."
    lines = [("dense", found[0].chosen["steps"][0])]
    if best := single(alone):
        lines.append((named_single(best, alone), best))
    lines += [(f"**{one.name}**", one.chosen) for one in found]
    cells = [
        [
            name,
            f"{row['size_bytes'] / 1e6:.2f} MB",
            f"{row['compression']:.1f}x",
            plus_minus(row["score"], row["noise"]),
            _difference(row),
        ]
        for name, row in lines
    ]
    figures = table(["", "whole file", "smaller", f"{found[0].chosen['metric']} ± noise", "vs dense"], cells)
    words = [part for one in found for part in _chosen(one)]
    return "\n\n".join([figures, *words, made_with(COMMANDS, [one.chosen for one in found])])


def _chosen(found: Stack) -> tuple[str, str]:
    return (
        f"{found.chosen['compression']:.1f}x: chosen from {found.tried} pipelines on {found.searched['examples']} examples carved from the "
        f"training split, where it scores {_difference(found.searched)} against dense; scored once on the {found.chosen['examples']} of "
        "the validation split.",
        f"```text\n{found.chosen['declaration']}\n```",
    )


def _difference(row: Row) -> str:
    return plus_minus(row["difference"], row["difference_noise"], signed=True)


def _declared(file: str) -> dict[str, Any]:
    return read_file(ROOT / "pipelines" / "studies" / f"{file}.py")


def _name(row: Row) -> str:
    return row["key"].partition("/")[2]
