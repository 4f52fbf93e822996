"""Whether the order of two techniques matters.

Two pipelines are compared when they differ only in that two neighbouring techniques, at the same strengths, have changed places: whatever
else they hold stands at the same place in both. The figure is the mean over all such pairs of pipelines.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import exp, hypot
from statistics import fmean

from stackcomp.studies.analysis.cells import Cell, Cells, Estimate, estimate, mean


@dataclass(frozen=True, kw_only=True)
class Order:
    """`first` right before `second`, less the same with both changed about.

    pairs: how many pairs of pipelines were compared; score: in points; saved: in log bytes of the file; same: whether all
    pairs have the same weights file, byte by byte; words: the finding in a sentence.
    """

    first: str
    second: str
    pairs: int
    score: Estimate | None = None
    saved: float = 0.0
    same: bool = False
    words: str


def orders(cells: Cells) -> list[Order]:
    """One finding for every pair of techniques."""
    return [_order(cells, first, second) for first, second in combinations(cells.passes, 2)]


def _order(cells: Cells, first: str, second: str) -> Order:
    pairs = list(_swapped(cells, first, second))
    if not pairs:
        return Order(first=first, second=second, pairs=0, words=_alone(cells, first, second))
    same = all(_same_file(one, other) for one, other in pairs)
    score = Estimate(value=0.0) if same else mean([_score_gap(one, other) for one, other in pairs])
    saved = fmean(one.log_file.value - other.log_file.value for one, other in pairs)
    return Order(
        first=first,
        second=second,
        pairs=len(pairs),
        score=score,
        saved=saved,
        same=same,
        words=_sentence(first, second, score, saved, same),
    )


def _swapped(cells: Cells, first: str, second: str) -> Iterator[tuple[Cell, Cell]]:
    """Pairs of pipelines with a common seed: one with `first` right before `second`, and the one with both changed about."""
    known = {(cell.passes, cell.strengths): cell for cell in cells.cells}
    for cell in cells.cells:
        for place in range(len(cell.passes) - 1):
            if cell.passes[place : place + 2] == (first, second):
                other = known.get((_swap(cell.passes, place), _swap(cell.strengths, place)))
                if other is not None and cell.seeds & other.seeds:
                    yield cell, other


def _swap(words: tuple[str, ...], place: int) -> tuple[str, ...]:
    """The words with those at `place` and behind it changed about."""
    return (*words[:place], words[place + 1], words[place], *words[place + 2 :])


def _score_gap(one: Cell, other: Cell) -> Estimate:
    """Score of one minus score of the other, over the seeds that both have. Each was compared with the model as it came: the
    noises of both differences add in squares."""
    others = {row["seed"]: row for row in other.rows}
    pairs = [(row, others[row["seed"]]) for row in one.rows if row["seed"] in others]
    return estimate(
        [mine["score"] - its["score"] for mine, its in pairs],
        [hypot(mine["difference_noise"], its["difference_noise"]) for mine, its in pairs],
    )


def _same_file(one: Cell, other: Cell) -> bool:
    """Whether both left the same weights file, with every seed."""
    digests = [{row["seed"]: row.get("file_sha256") for row in cell.rows} for cell in (one, other)]
    return digests[0] == digests[1] and None not in digests[0].values()


def _sentence(first: str, second: str, score: Estimate, saved: float, same: bool) -> str:
    if same:
        return f"{first} and {second} leave the same file in either order, byte by byte."
    size = "the file is as large"
    if abs(saved) >= 5e-4:
        size = f"the file is {abs(1 - exp(-saved)):.1%} {'smaller' if saved > 0 else 'larger'}"
    if score.within_noise:
        return f"{first} before {second} or after it: the difference, {score} points, is within the noise; before it {size}."
    return f"{first} before {second} changes the score by {score} points against the other order; {size}."


def _alone(cells: Cells, first: str, second: str) -> str:
    """Why there is no pair of pipelines to compare."""
    before, after = (_illegal(cells, names) for names in ((first, second), (second, first)))
    if before and after:
        return f"{first} and {second} cannot be combined: {before}."
    if before or after:
        ahead, behind = (second, first) if before else (first, second)
        return f"Only {ahead} before {behind} is legal: after it, {before or after}."
    return f"{first} and {second}: no two pipelines that differ in their order have finished."


def _illegal(cells: Cells, names: tuple[str, str]) -> str:
    """What the contract says of the two in this order and nothing else; empty where it is legal."""
    return next((one.reason for one in cells.skipped if one.passes == names), "")
