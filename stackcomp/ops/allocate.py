"""One global budget of bytes shared out over layers: each takes one of its candidates so that the total error is least.

    min sum_l error(l, c_l)   subject to   sum_l bytes(l, c_l) <= budget

a multiple-choice knapsack, solved by `scipy.optimize.milp`.

Letters: a factorized matrix has n rows and m columns; k blocks, b atoms and s non-zeros a row and block; r a rank.
"""

import ctypes
import os
import sys
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, log2
from typing import Any

import numpy as np

from stackcomp.core.errors import UnreachableRatio
from stackcomp.core.matrices import Fixed

HIGHEST_SHARE = 0.8  # of the columns of a block: a basis of more atoms costs more than it brings
RELATIVE_GAP = 1e-5  # how far from the optimum the solver may stop: below the noise of the errors themselves


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to store a layer: its bytes, its error, and whatever the caller needs to build it."""

    size_bytes: int
    error: float
    choice: Any


def allocate(candidates: Mapping[str, Sequence[Candidate]], budget_bytes: int) -> dict[str, Candidate]:
    """The candidate of each layer that gives the least total error within the budget.

    UnreachableRatio: even the smallest candidates together are larger than the budget; says how small they get.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    smallest = sum(min(option.size_bytes for option in options) for options in candidates.values())
    if smallest > budget_bytes:
        raise UnreachableRatio(
            f"the smallest these {len(candidates)} layers can get is {smallest} bytes, and the budget is {budget_bytes}: "
            f"ask for a ratio lower by a factor of {smallest / max(budget_bytes, 1):.3g} or more, or select more layers"
        )
    flat = [(layer, option) for layer, options in candidates.items() for option in options]
    layers = {layer: row for row, layer in enumerate(candidates)}
    sizes = np.array([option.size_bytes for _, option in flat], dtype=np.float64) / max(budget_bytes, 1)
    errors = np.array([option.error for _, option in flat], dtype=np.float64)
    belongs = csr_array((np.ones(len(flat)), ([layers[layer] for layer, _ in flat], np.arange(len(flat)))))
    with _silenced():
        solution = milp(
            errors / max(float(errors.max()), np.finfo(np.float64).tiny),
            constraints=[LinearConstraint(belongs, 1, 1), LinearConstraint(sizes[None], ub=1)],
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": RELATIVE_GAP, "presolve": False},
        )
    if solution.x is None:
        raise RuntimeError(f"scipy.optimize.milp found no allocation: {solution.message}")
    taken = np.flatnonzero(solution.x > 0.5)
    return {flat[index][0]: flat[index][1] for index in taken}


@contextmanager
def _silenced() -> Iterator[None]:
    """Discard what compiled code prints meanwhile: HiGHS 1.12, the solver inside scipy, leaves lines of its own on standard output,
    whatever its options say (ERGO-Code/HiGHS, issue 2783)."""
    try:
        flush, kept = ctypes.CDLL(None).fflush, os.dup(1)
    except (TypeError, OSError):  # another system's library, or no standard output
        yield
        return
    if sys.stdout is not None:  # as it is without a console
        sys.stdout.flush()
    flush(None)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)


def low_rank_bytes(rows: int, columns: int, rank: int, *, value_bytes: float = 4) -> int:
    """Bytes of two dense factors."""
    return ceil(value_bytes * rank * (rows + columns))


def dense_sparse_bytes(
    rows: int,
    columns: int,
    *,
    atoms: int,
    nonzeros: int,
    blocks: int = 1,
    groups: int = 1,
    value_bytes: float = 4,
) -> int:
    """Bytes of the basis, the values and the packed support of a dense-sparse factorization."""
    support = Fixed(block=atoms // groups, nonzeros=nonzeros).support_bytes(rows, blocks * atoms)
    return ceil(value_bytes * (atoms * columns + rows * blocks * groups * nonzeros)) + support


def most_nonzeros(
    rows: int, columns: int, *, atoms: int, size_bytes: float, blocks: int = 1, value_bytes: float = 4
) -> int:
    """The largest s whose factorization fits in `size_bytes`, 0 where not even s = 1 does."""

    def too_large(nonzeros: int) -> bool:
        return size_bytes < dense_sparse_bytes(
            rows, columns, atoms=atoms, nonzeros=nonzeros, blocks=blocks, value_bytes=value_bytes
        )

    half = atoms // 2  # where the support is dearest: below it size rises with s
    below = bisect(range(1, half + 1), False, key=too_large)
    return next((nonzeros for nonzeros in range(atoms, half, -1) if not too_large(nonzeros)), below)


def shape_of_size(
    rows: int,
    columns: int,
    *,
    size_bytes: float,
    density: float,
    blocks: int = 1,
    value_bytes: float = 4,
) -> tuple[int, int]:
    """(atoms, nonzeros) of dense-sparse factors of about `size_bytes` and `density`, the share of the atoms of its block that a row
    keeps, indices counted at its entropy; fewer atoms where they would be almost as many as columns; 0 nonzeros where not even one
    fits."""
    index_bytes = -(density * log2(density) + (1 - density) * log2(1 - density)) / density / 8
    atom_bytes = columns * value_bytes + rows * blocks * density * (value_bytes + index_bytes)
    atoms = min(rows, max(1, round(min(size_bytes / atom_bytes, HIGHEST_SHARE * columns / blocks))))
    return atoms, most_nonzeros(
        rows, columns, atoms=atoms, size_bytes=size_bytes, blocks=blocks, value_bytes=value_bytes
    )
