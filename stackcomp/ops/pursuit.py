"""Sparse coding of many rows by matrix products alone: no row has a system of equations of its own.

Where the rows are many and their supports wide, solving each row's own least squares (`sparse_coding`) costs s^3 a row; here every step
is a product with the whole Gram matrix, a^2 a row at the full speed of the machine, whatever s is.

Letters: p independent problems; n rows, a atoms a problem, in groups of b of which a row keeps s. Tensors: gram (p a a) = A A^T, atoms
of length one; correlations (p n a) = T A^T; code (p n a), the dense form of the sparse rows; mask, where it may differ from zero.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

FLAT = 1e-6  # of the squared length of a step: the curvature below which float32 cannot tell it from zero
ENOUGH = 0.01  # a descent ends with the step that gains less than this share of what all steps have gained


def strongest(score: Float[Tensor, "p n a"], count: int, group: int) -> Bool[Tensor, "p n a"]:
    """The mask of the `count` largest scores in every `group` columns of a row."""
    grouped = score.unflatten(2, (-1, group))
    picked = grouped.topk(count, dim=3, sorted=False).indices
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(3, picked, True).flatten(2)


def unexplained(
    gram: Float[Tensor, "p a a"], correlations: Float[Tensor, "p n a"], code: Float[Tensor, "p n a"]
) -> Float[Tensor, "p n a"]:
    """The correlations of what a code leaves: T A^T - x A A^T."""
    return torch.baddbmm(correlations, code, gram, alpha=-1)


def descend(
    gram: Float[Tensor, "p a a"],
    residual: Float[Tensor, "p n a"],
    code: Float[Tensor, "p n a"],
    mask: Bool[Tensor, "p n a"],
    steps: int,
) -> Float[Tensor, "p n a"]:
    """At most `steps` conjugate gradient steps of each row's least squares on its mask, from `code`, which must be zero off the mask and
    leaves `residual`."""
    keep = mask.to(code.dtype)  # a product with booleans is several times as slow
    code, residual = code.clone(), residual * keep
    step, curved = residual.clone(), torch.empty_like(residual)
    spare = torch.empty_like(residual)  # new memory for each product takes longer than the product

    def dot(one: Tensor, other: Tensor) -> Tensor:
        return torch.mul(one, other, out=spare).sum(2, keepdim=True)

    size = dot(residual, residual)
    gained = torch.zeros_like(size).sum()
    for _ in range(steps):
        torch.bmm(step, gram, out=curved)
        curved.mul_(keep)
        curvature = dot(step, curved)
        flat = curvature <= FLAT * dot(step, step)  # rounding is all that is left
        length = torch.where(flat, 0.0, size / curvature)
        code.addcmul_(length, step)
        gains = (length * size).sum()
        gained += gains
        if gains <= ENOUGH * gained:
            break
        residual.addcmul_(length, curved, value=-1)
        before, size = size, dot(residual, residual)
        torch.addcmul(residual, size / before.clamp_min(torch.finfo(before.dtype).tiny), step, out=step)
    return code


def gain(
    correlations: Float[Tensor, "p n a"], residual: Float[Tensor, "p n a"], code: Float[Tensor, "p n a"]
) -> Float[Tensor, "p n 1"]:
    """By how much a code that leaves `residual` lowers each row's squared error: 2 <c, x> - x^T A A^T x = <c + r, x>."""
    return ((correlations + residual) * code).sum(2, keepdim=True)


def first_code(
    gram: Float[Tensor, "p a a"],
    inverse: Float[Tensor, "p a a"],
    correlations: Float[Tensor, "p n a"],
    *,
    nonzeros: int,
    group: int,
    steps: int,
) -> tuple[Float[Tensor, "p n a"], Bool[Tensor, "p n a"]]:
    """A code to start from: of the least squares on all atoms, the s a group that would cost most to drop, solved again.

    What one atom costs is x_i^2 / (inverse Gram)_ii, the rise of the error when it goes alone (optimal brain surgeon). A more careful
    choice by a dictionary that has learned nothing yet is time lost, and leaves later sweeps in a worse place.
    """
    code = correlations @ inverse
    cost = inverse.diagonal(dim1=1, dim2=2)[:, None]
    mask = strongest(code.square() / cost, nonzeros, group)
    code *= mask
    return descend(gram, unexplained(gram, correlations, code), code, mask, steps), mask


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
    """Add the `count` atoms a group that correlate most with the residual, solve, keep the `nonzeros` that are largest, solve; a row that
    would get worse keeps its code, unless that has more (a round of subspace pursuit, arXiv 0803.0811)."""
    residual = unexplained(gram, correlations, code)
    wide = mask | strongest(residual.abs() * ~mask, count, group)
    wider = descend(gram, residual, code, wide, steps)
    kept = strongest(wider.abs(), nonzeros, group)
    wider *= kept
    fresh = descend(gram, unexplained(gram, correlations, wider), wider, kept, steps)
    left = unexplained(gram, correlations, fresh)
    better = gain(correlations, left, fresh) > gain(correlations, residual, code)
    better |= mask.sum(2, keepdim=True) > nonzeros * mask.shape[2] // group
    return torch.where(better, fresh, code), torch.where(better, kept, mask)
