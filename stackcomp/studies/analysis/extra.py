"""How much a stack gives beyond the best single technique, and whether two techniques help or hinder each other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import exp, prod
from typing import Literal

import numpy as np

from stackcomp.studies.analysis.cells import Cell, Cells, Estimate, combined, mean
from stackcomp.studies.rows import unbeaten

DRAWS = 2000
Bytes = Literal["file", "encoder"]


@dataclass(frozen=True, kw_only=True)
class Extra:
    """Extra compression at a score floor f: S_single(f) / S_stack(f) - 1, S the fewest bytes that score at least f; 0.5
    reads "50% more".

    of: whose bytes are meant; single, stack: the pipelines with the fewest; a stack has two techniques or more. value: None
    where no single, or no stack, reaches the floor. interval: 95% of the draws with a figure; drawn: their share of all; seeds: how many
    both pipelines have. ceiling: the extra if the encoder took no bytes and the rest were as in `stack`; None where only the encoder is
    meant. predicted: the stack's compression if those of its techniques alone multiplied, None where one of them has no row; found: what it
    is. nearest: what scores best among the singles and among the stacks.
    """

    of: Bytes
    floor: float
    single: Cell | None
    stack: Cell | None
    value: float | None = None
    interval: tuple[float, float] | None = None
    drawn: float = 0.0
    seeds: int = 1
    ceiling: float | None = None
    predicted: float | None = None
    found: float | None = None
    nearest: tuple[Cell | None, Cell | None]

    @property
    def sure(self) -> str:
        """How sure the value is, in words: where no draw changes a choice, the interval has no width."""
        low, high = self.interval or (0.0, 0.0)
        wide = (
            f"95% interval {low:+.0%} to {high:+.0%}"
            if low < high
            else "the same in every draw of the scores"
        )
        return {0: "no seed in common; ", 1: "one seed; "}.get(self.seeds, "") + wide


def extra(cells: Cells, floor: float, of: Bytes = "file") -> Extra:
    """The extra compression at `floor`, a score on the metric's own scale.

    The interval: every score is drawn from the normal distribution that its noise beside the model as it came describes, pipelines that
    left the same files together and all others apart, and both choices are made anew; seed 0.
    """
    groups = [
        [cell for cell in cells.cells if len(cell.passes) == 1],
        [cell for cell in cells.cells if len(cell.passes) > 1],
    ]
    single, stack = (_smallest(cells, group, floor, of) for group in groups)
    nearest = tuple(max(group, key=lambda cell: cells.sign * cell.score, default=None) for group in groups)
    common = {"of": of, "floor": floor, "single": single, "stack": stack, "nearest": (nearest[0], nearest[1])}
    if single is None or stack is None:
        return Extra(**common)
    least = [_least_drawn(cells, group, floor, of) for group in groups]
    both = np.isfinite(least[0]) & np.isfinite(least[1])
    drawn = least[0][both] / least[1][both] - 1
    low, high = np.percentile(drawn, [2.5, 97.5])
    rest = stack.size_bytes - stack.encoder_bytes
    return Extra(
        **common,
        value=_bytes(single, of) / _bytes(stack, of) - 1,
        interval=(float(low), float(high)),
        drawn=float(both.mean()),
        seeds=len(single.seeds & stack.seeds),
        ceiling=single.size_bytes / rest - 1 if of == "file" else None,
        predicted=_product(cells, stack, of),
        found=exp(_log(stack, of).value),
    )


@dataclass(frozen=True, kw_only=True)
class Interaction:
    """What two techniques give together less what they give one by one: 0 where neither minds the other, above 0 where they
    help each other.

    file, encoder: log S_A + log S_B - log S_AB - log S, S the bytes of the dense model; score: in points. orders: of
    how many legal orders the stack is the mean.
    """

    first: str
    second: str
    file: Estimate
    encoder: Estimate
    score: Estimate
    orders: int


def interactions(cells: Cells, choice: Mapping[str, str]) -> list[Interaction]:
    """The interaction of every pair that has a finished order, and whose techniques have one alone; none before the dense model has its
    row."""
    found: list[Interaction] = []
    if cells.dense is None:
        return found
    for first, second in combinations(cells.passes, 2):
        alone = [cells.orders([name], choice) for name in (first, second)]
        together = cells.orders([first, second], choice)
        if all(alone) and together:
            terms = [(1.0, together), (1.0, [cells.dense]), *((-1.0, one) for one in alone)]
            found.append(
                Interaction(
                    first=first,
                    second=second,
                    file=_sum(terms, lambda cell: cell.log_file),
                    encoder=_sum(terms, lambda cell: cell.log_encoder),
                    score=_sum(terms, lambda cell: cell.change),
                    orders=len(together),
                )
            )
    return found


def _sum(terms: Sequence[tuple[float, list[Cell]]], of: Callable[[Cell], Estimate]) -> Estimate:
    """The signed sum of the means of groups of cells."""
    return combined((sign, mean([of(cell) for cell in group])) for sign, group in terms)


def pareto(cells: Cells, cost: Callable[[Cell], float] = lambda cell: cell.size_bytes) -> list[Cell]:
    """The pipelines, and the dense model, that no other one beats in cost (bytes of the file, unless said) without scoring less; the
    dearest first."""
    found = unbeaten(
        [cells.came, *cells.ran],
        cost=cost,
        worth=lambda cell: cells.sign * cell.score,
    )
    return found[::-1]


def _bytes(cell: Cell, of: Bytes) -> float:
    return cell.size_bytes if of == "file" else cell.encoder_bytes


def _log(cell: Cell, of: Bytes) -> Estimate:
    return cell.log_file if of == "file" else cell.log_encoder


def _smallest(cells: Cells, group: Sequence[Cell], floor: float, of: Bytes) -> Cell | None:
    """The cell of fewest bytes that reaches the floor; of equal ones, the one that scores best."""
    reach = [cell for cell in group if cells.misses(cell, floor) <= 0]
    return min(reach, key=lambda cell: (_bytes(cell, of), -cells.sign * cell.score), default=None)


def _least_drawn(cells: Cells, group: Sequence[Cell], floor: float, of: Bytes) -> np.ndarray:
    """The fewest bytes that reach the floor in every draw of the scores (draws); infinite where none does."""
    noise = np.random.default_rng(0).standard_normal((DRAWS, len(cells.cells)))
    files = [_files(cell) for cell in cells.cells]
    places = [files.index(_files(cell)) for cell in group]
    sigma = np.array([cell.change.half for cell in group]) / 1.96
    misses = np.array([cells.misses(cell, floor) for cell in group]) - sigma * noise[:, places]
    sizes = np.array([_bytes(cell, of) for cell in group])
    return np.where(misses <= 0, sizes, np.inf).min(axis=1)


def _files(cell: Cell) -> object:
    """What tells the files of two cells apart, by their content where all rows say it."""
    digests = {(row["seed"], row.get("file_sha256")) for row in cell.rows}
    return digests if all(digest for _, digest in digests) else (cell.passes, cell.strengths)


def _product(cells: Cells, stack: Cell, of: Bytes) -> float | None:
    """The product of the compressions of the stack's techniques alone."""
    choice = dict(zip(stack.passes, stack.strengths, strict=True))
    alone = [cells.orders([name], choice) for name in stack.passes]
    return prod(exp(_log(found[0], of).value) for found in alone) if all(alone) else None
