"""A weight as the sum of a sparse matrix and one of low rank.

Letters: a weight W has n rows (outputs) and m columns (inputs); S is sparse, L (n x r) and R (r x m) are the factors.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stackcomp.ops.low_rank import low_rank

LEAST = 1e-3  # the size of an input that is always zero, as a share of the largest: what it multiplies stays finite


def sparse_low_rank(
    weight: Float[Tensor, "n m"],
    *,
    rank: int,
    keep: Callable[[Float[Tensor, "n m"]], Bool[Tensor, "n m"]],
    importance: Float[Tensor, " m"],
    iterations: int,
) -> tuple[Float[Tensor, "n m"], Bool[Tensor, "n m"], Float[Tensor, "n r"], Float[Tensor, "r m"]]:
    """S, where it is kept, L and R of little sum_j I_j ||column j of (W - S - L R)||^2, I >= 0 the `importance` of columns.

    With A = W diag(sqrt(I)), in turn: L R is moved to the best rank r of A - S, and S becomes A - L R where `keep(A - L R)`, a mask of the
    largest magnitudes, says so. The error never grows. The first L R is a singular value decomposition; the next ones, which differ little
    from those before, take one step of the power method each.
    SettingError: the rank is not within 1 .. min(n, m).
    """
    scale = importance.sqrt()
    scale = scale.clamp_min(LEAST * scale.max()) if scale.max() > 0 else torch.ones_like(scale)
    target = weight * scale
    sparse, kept = torch.zeros_like(target), torch.zeros_like(target, dtype=torch.bool)
    left, right = low_rank(target, rank=rank)
    for _ in range(iterations):
        rest = target - sparse
        left = _orthonormal(rest @ _orthonormal(right.T))
        right = left.T @ rest
        residual = target - left @ right
        kept = keep(residual)
        sparse = torch.where(kept, residual, 0)
    u, sigma, v = torch.linalg.svd(right, full_matrices=False)  # lengths are shared evenly
    return sparse / scale, kept, left @ u * sigma.sqrt(), sigma.sqrt()[:, None] * v / scale


def _orthonormal(matrix: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
    """An orthonormal basis of what the columns span."""
    return torch.linalg.qr(matrix)[0]
