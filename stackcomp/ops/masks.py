"""Which entries of a matrix to keep. Ties go to the entry that stands first, so that equal inputs give equal masks."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def largest(matrix: Float[Tensor, "rows cols"], share: float) -> Bool[Tensor, "rows cols"]:
    """Keep the `share` (0 to 1) of all entries with the largest magnitude, at least one."""
    kept = max(1, round(matrix.numel() * share))
    order = matrix.abs().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(matrix.numel(), dtype=torch.bool, device=matrix.device)
    mask[order[:kept]] = True
    return mask.view_as(matrix)


def largest_in_groups(matrix: Float[Tensor, "rows cols"], kept: int, group: int) -> Bool[Tensor, "rows cols"]:
    """Keep the `kept` largest magnitudes of every `group` consecutive columns of a row; `group` must divide the columns."""
    grouped = matrix.abs().unflatten(1, (-1, group))
    order = grouped.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, order[..., :kept], True)
    return mask.flatten(1)
