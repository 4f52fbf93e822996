"""Low-rank factors of a weight, optimal in a metric of its inputs and outputs.

Letters: a weight has n rows (outputs) and m columns (inputs); r is the rank.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from stackcomp.core.errors import SettingError
from stackcomp.ops.whiten import Whitener


def whitened(
    weight: Float[Tensor, "n m"],
    *,
    inputs: Whitener | None = None,
    outputs: Whitener | None = None,
) -> Float[Tensor, "n m"]:
    """The matrix whose plain Frobenius errors are the metric's: G^(1/2)^T W C^(1/2).

    The sum of its squared singular values from the r-th on is the error of the best weight of rank r.
    """
    if inputs is not None:
        weight = inputs.whiten_columns(weight)
    if outputs is not None:
        weight = outputs.whiten_columns(weight.T).T
    return weight


def rank_errors(
    weight: Float[Tensor, "n m"],
    *,
    inputs: Whitener | None = None,
    outputs: Whitener | None = None,
) -> Float[Tensor, " ranks"]:
    """Entry r is the least metric error of any weight of rank r, from 0 (the whole energy) to min(n, m) (none)."""
    energies = torch.linalg.svdvals(whitened(weight, inputs=inputs, outputs=outputs)).double().square()
    return torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])


def low_rank(
    weight: Float[Tensor, "n m"],
    *,
    rank: int,
    inputs: Whitener | None = None,
    outputs: Whitener | None = None,
) -> tuple[Float[Tensor, "n r"], Float[Tensor, "r m"]]:
    """The weight of rank r that minimises tr(G (W - left right) C (W - left right)^T): a truncated singular value decomposition.

    `inputs` alone is the data-aware low rank of DRONE and SVD-LLM (arXiv 2403.07378); `outputs` adds directions of the outputs, where
    `low_rank_of_rows` weighs them one by one. The singular values are shared evenly between the two factors.
    SettingError: the rank is not within 1 .. min(n, m).
    """
    _check_rank(weight, rank)
    u, sigma, v = torch.linalg.svd(whitened(weight, inputs=inputs, outputs=outputs), full_matrices=False)
    scale = sigma[:rank].sqrt()
    left, right = u[:, :rank] * scale, scale[:, None] * v[:rank]
    if outputs is not None:
        left = outputs.unwhiten_columns(left.T).T
    if inputs is not None:
        right = inputs.unwhiten_columns(right)
    return left, right


def low_rank_of_rows(
    weight: Float[Tensor, "n m"], *, rank: int, importance: Float[Tensor, " n"]
) -> tuple[Float[Tensor, "n r"], Float[Tensor, "r m"]]:
    """The weight of rank r that minimises sum_i I_i ||row i of (W - left right)||^2, I >= 0 the `importance` of rows.

    `right` spans the first r right singular vectors of diag(sqrt(I)) W, and each row is projected on them: a row of no importance has no
    say in them, and is as near as they allow. Where no row has any, all count the same. Lengths are shared evenly between the two factors.
    SettingError: the rank is not within 1 .. min(n, m).
    """
    _check_rank(weight, rank)
    share = importance / importance.max() if importance.max() > 0 else torch.ones_like(importance)
    _, _, v = torch.linalg.svd(share.sqrt()[:, None] * weight, full_matrices=False)
    left = weight @ v[:rank].T
    lengths = left.norm(dim=0)
    scale = torch.where(lengths > 0, lengths, 1.0).sqrt()
    return left / scale, scale[:, None] * v[:rank]


def rank_of_ratio(rows: int, cols: int, ratio: float) -> int:
    """The largest rank whose two factors are `ratio` times smaller than the weight; 0 where there is none."""
    return int(rows * cols / (ratio * (rows + cols)))


def _check_rank(weight: Tensor, rank: int) -> None:
    if not 1 <= rank <= min(weight.shape):
        raise SettingError(
            f"rank={rank} is not within 1 .. {min(weight.shape)} for a weight of shape {tuple(weight.shape)}"
        )
