"""Rounding and pruning column by column, with what is left of the weight taking up the error: the sweep that GPTQ and SparseGPT share.

Letters: W (n x m) is a weight, outputs x inputs; H (m x m) the second moment of its inputs; W' its replacement, of least

    tr((W - W') H (W - W')^T),

the squared error of the layer's outputs. U is the upper triangular root of the inverse, H^-1 = U^T U.

Columns are settled one after the other. Once column j is set to v, the columns to come move to where the error is least with it:

    e = (w_j - v) / U_jj,    w_k <- w_k - e U_jk    for k > j,

and the cost grows by e^2: U_jj^2 is [H^-1]_jj of the columns that are still free (Optimal Brain Surgeon; Frantar et al., GPTQ,
arXiv:2210.17323). All rows go at once, and columns beyond a block hear of it when the block is done.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from stackcomp.core.matrices import Coding
from stackcomp.ops.low_bit import GRIDS
from stackcomp.ops.masks import highest, highest_in_groups
from stackcomp.ops.whiten import whitener

BLOCK = 128  # columns that hear of each other at once, and the span in which SparseGPT chooses its mask: the papers' number

Decide = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """H, damped and ready for a sweep. order: the columns as they are settled; root: U of H in this order."""

    order: Int64[Tensor, " m"]
    root: Float[Tensor, "m m"]

    @property
    def sensitivity(self) -> Float[Tensor, " m"]:
        """1 / [H^-1]_jj of every column, in its own place: what a squared error of one costs there once all others have made up
        for it."""
        return (1 / self.root.square().sum(0))[self.order.argsort()]


def curvature(moment: Float[Tensor, "m m"], *, damping: float, ordered: bool = False) -> Curvature:
    """H of a second moment, with `damping` times its mean diagonal added (more where it stays singular, see `whitener`).

    ordered: settle columns by falling diagonal of H, not as they stand. Raises BadWeights for a moment that holds NaN.
    """
    place = torch.arange(len(moment), device=moment.device)
    order = moment.diagonal().argsort(descending=True, stable=True) if ordered else place
    backwards = order.flip(0)  # H = R R^T with R upper triangular is a Cholesky root from the end; U = R^-1
    lower = whitener(moment[backwards][:, backwards], damping=damping).root
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return Curvature(order=order, root=torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True))


def sweep(
    weight: Float[Tensor, "n m"], metric: Curvature, decide: Decide, *, block: int = BLOCK
) -> Float[Tensor, "n m"]:
    """W' with the columns that `decide` gives.

    decide(j, values): the final values of column j of the order, given as the first row of `values`; the rows below are the columns
    after it in its block, as they are by then.
    """
    left, root = weight.t()[metric.order], metric.root  # a column is a row here
    for start in range(0, len(left), block):
        part = left[start : start + block]
        stop = start + len(part)
        inner, errors = root[start:stop, start:stop], torch.empty_like(part)
        for j in range(len(part)):
            value = decide(start + j, part[j:])
            errors[j] = (part[j] - value) / inner[j, j]
            part[j] = value
            part[j + 1 :].addr_(inner[j, j + 1 :], errors[j], alpha=-1)
        left[stop:].addmm_(root[start:stop, stop:].t(), errors, alpha=-1)
    return left[metric.order.argsort()].t()


def round_columns(
    weight: Float[Tensor, "n m"],
    metric: Curvature,
    steps: Float[Tensor, "n m"],
    coding: Coding,
) -> Float[Tensor, "n m"]:
    """W' on the grid of a coding, steps * level(code), see `ops.low_bit`. An entry of step 0 becomes 0, and the others
    take up its error: so entries that are not stored are kept out."""
    grid = GRIDS[coding]
    spacing = steps.t()[metric.order]
    inverse = torch.where(spacing == 0, 0, 1 / spacing)

    def nearest(j: int, values: Tensor) -> Tensor:
        return grid.levels(grid.codes(values[0] * inverse[j])).mul_(spacing[j])

    return sweep(weight, metric, nearest)


def kept_in_columns(rows: int, cols: int, share: float) -> int:
    """How many entries of a rows x cols weight `prune_columns` keeps of a share."""
    spans = [min(BLOCK, cols - first) for first in range(0, cols, BLOCK)]
    return sum(max(1, round(rows * span * share)) for span in spans)


def prune_columns(
    weight: Float[Tensor, "n m"],
    metric: Curvature,
    *,
    share: float = 1.0,
    groups: tuple[int, int] | None = None,
) -> tuple[Float[Tensor, "n m"], Bool[Tensor, "n m"]]:
    """W' with entries dropped, and which of them are kept: those of the highest w^2 / U_jj^2, chosen when the sweep reaches them.

    Of every BLOCK columns the `share` that scores highest is kept, at least one entry; or, with groups (k, g), the k highest of
    every g columns of a row (Frantar and Alistarh, SparseGPT, arXiv:2301.00774). For columns that are settled as they stand.
    """
    span = groups[1] if groups else BLOCK
    costs = metric.root.diagonal().square()
    kept = torch.empty_like(weight.t(), dtype=torch.bool)

    def masked(j: int, values: Tensor) -> Tensor:
        if j % span == 0:
            reached = slice(j, j + min(span, len(values)))
            scores = values[:span].square() / costs[reached, None]
            kept[reached] = (
                highest_in_groups(scores.t(), *groups).t()
                if groups
                else highest(scores, kept_in_columns(scores.shape[1], len(scores), share))
            )
        return values[0] * kept[j]

    return sweep(weight, metric, masked, block=BLOCK // span * span), kept.t()
