"""Sparse coding of many rows by matrix products alone: no row has a system of equations of its own.

Where the rows are many and their supports wide, solving each row's own least squares (`sparse_coding`) costs s^3 a row; here every step
is a product with the whole Gram matrix, a^2 a row at the full speed of the machine, whatever s is.

Letters: p independent problems; n rows, a atoms a problem, in groups of b of which a row keeps s. Tensors: gram (p a a) = A A^T, atoms
of length one; correlations (p n a) = T A^T; code (p n a), the dense form of the sparse rows; mask, where it may differ from zero.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SHRINKING = (3.0, 2.0, 1.5, 1.25, 1.0)  # of s: how wide the support is in each round of the first code
FLAT = 1e-6  # of the squared length of a step: the curvature below which float32 cannot tell it from zero


def strongest(score: Float[Tensor, "p n a"], count: int, group: int) -> Bool[Tensor, "p n a"]:
    """The mask of the `count` largest scores in every `group` columns of a row."""
    grouped = score.unflatten(2, (-1, group))
    picked = grouped.topk(count, dim=3).indices
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(3, picked, True).flatten(2)


def descend(
    gram: Float[Tensor, "p a a"],
    correlations: Float[Tensor, "p n a"],
    code: Float[Tensor, "p n a"],
    mask: Bool[Tensor, "p n a"],
    steps: int,
) -> Float[Tensor, "p n a"]:
    """`steps` conjugate gradient steps of each row's least squares on its mask, from `code`, which must be zero off the mask."""
    residual = (correlations - code @ gram) * mask
    step = residual
    size = residual.square().sum(2, keepdim=True)
    for _ in range(steps):
        curved = (step @ gram) * mask
        curvature = (step * curved).sum(2, keepdim=True)
        flat = curvature <= FLAT * step.square().sum(2, keepdim=True)  # rounding is all that is left
        length = torch.where(flat, 0.0, size / curvature)
        code = code + length * step
        residual = residual - length * curved
        before, size = size, residual.square().sum(2, keepdim=True)
        step = residual + (size / before.clamp_min(torch.finfo(before.dtype).tiny)) * step
    return code


def gain(
    gram: Float[Tensor, "p a a"], correlations: Float[Tensor, "p n a"], code: Float[Tensor, "p n a"]
) -> Float[Tensor, "p n 1"]:
    """By how much the code lowers each row's squared error: 2 <c, x> - x^T A A^T x."""
    return ((2 * correlations - code @ gram) * code).sum(2, keepdim=True)


def shrink(
    gram: Float[Tensor, "p a a"],
    inverse: Float[Tensor, "p a a"],
    correlations: Float[Tensor, "p n a"],
    *,
    nonzeros: int,
    group: int,
    steps: int,
) -> tuple[Float[Tensor, "p n a"], Bool[Tensor, "p n a"]]:
    """A first code: from the least squares on all atoms down to s a group in a few rounds, each dropping what costs least.

    What one atom costs is x_i^2 / (inverse Gram)_ii, the rise of the error when it goes alone (optimal brain surgeon), here with the
    inverse over all atoms for every row.
    """
    code = correlations @ inverse
    cost = inverse.diagonal(dim1=1, dim2=2)[:, None]
    mask = torch.ones_like(code, dtype=torch.bool)
    for width in SHRINKING:
        count = min(group, max(nonzeros, round(width * nonzeros)))
        if count < group:
            mask = strongest(code.square() / cost, count, group)
            code = descend(gram, correlations, code * mask, mask, steps)
    return code, mask


def exchange(
    gram: Float[Tensor, "p a a"],
    correlations: Float[Tensor, "p n a"],
    code: Float[Tensor, "p n a"],
    mask: Bool[Tensor, "p n a"],
    *,
    nonzeros: int,
    group: int,
    count: int,
    steps: int,
) -> tuple[Float[Tensor, "p n a"], Bool[Tensor, "p n a"]]:
    """Add the `count` atoms a group that correlate most with the residual, solve, drop as many, solve; a row that would get worse
    keeps its code (a round of subspace pursuit, arXiv 0803.0811)."""
    residual = (correlations - code @ gram).abs()
    wide = mask | strongest(residual.masked_fill_(mask, -1.0), count, group)
    wider = descend(gram, correlations, code, wide, steps)
    worth = wider.abs().masked_fill_(~wide, -1.0)
    kept = strongest(worth, nonzeros, group)
    fresh = descend(gram, correlations, wider * kept, kept, steps)
    better = gain(gram, correlations, fresh) > gain(gram, correlations, code)
    return torch.where(better, fresh, code), torch.where(better, kept, mask)
