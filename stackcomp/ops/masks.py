"""Which entries of a matrix to keep. Ties go to the entry that stands first, so that equal inputs give equal masks."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def highest(scores: Float[Tensor, "..."], kept: int) -> Bool[Tensor, "..."]:
    """Keep the `kept` highest of all scores."""
    flat = scores.flatten()
    if kept >= len(flat):
        return torch.ones_like(scores, dtype=torch.bool)
    lowest = flat.kthvalue(len(flat) - kept + 1).values if kept else flat.new_tensor(torch.inf)
    above, equal = flat > lowest, flat == lowest
    room = kept - int(above.sum())
    return (above | (equal & (equal.cumsum(0) <= room))).view_as(scores)


def highest_in_groups(scores: Float[Tensor, "rows cols"], kept: int, group: int) -> Bool[Tensor, "rows cols"]:
    """Keep the `kept` highest scores of every `group` consecutive columns of a row; `group` must divide the columns."""
    grouped = scores.unflatten(1, (-1, group))
    order = grouped.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, order[..., :kept], True)
    return mask.flatten(1)


def largest(
    matrix: Float[Tensor, "rows cols"], share: float, block: tuple[int, int] = (1, 1)
) -> Bool[Tensor, "rows cols"]:
    """Keep the `share` (0 to 1) of all blocks of this shape, which must divide that of the matrix, with the largest mean magnitude, at
    least one."""
    down, across = block
    sizes = matrix.abs().unflatten(1, (-1, across)).unflatten(0, (-1, down)).mean((1, 3))
    mask = highest(sizes, max(1, round(sizes.numel() * share)))
    return mask.repeat_interleave(down, 0).repeat_interleave(across, 1)


def largest_in_groups(matrix: Float[Tensor, "rows cols"], kept: int, group: int) -> Bool[Tensor, "rows cols"]:
    """Keep the `kept` largest magnitudes of every `group` consecutive columns of a row; `group` must divide the columns."""
    return highest_in_groups(matrix.abs(), kept, group)
