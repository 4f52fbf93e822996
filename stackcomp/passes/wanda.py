"""Wanda: pruning by weights and the size of their inputs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stackcomp import ops
from stackcomp.pruning import CalibratedPruningPass

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, repr=False)
class Wanda(CalibratedPruningPass):
    """Keep in each row of the selected weights the values of the highest |W_ij| ||x_j||, ||x_j|| the norm of input j over calibration
    text, and store only these, as they are: no labels, no training.

    sparsity: share of each row that is dropped, in [0, 1), 0 does nothing; or "n:m", which keeps n of every m consecutive inputs of
    a row; stored as MagnitudePrune does. samples: calibration texts.

    Both factors of a low-rank layer are pruned, the second by the inputs that the first, pruned, lets through. Where we differ
    from the paper: all layers are calibrated at once, on the model as this pass finds it.
    """

    paper: ClassVar[str] = "Sun et al., Wanda, arXiv:2306.11695"

    def _kept_of(self, rows: int, cols: int) -> int:
        return rows * max(1, round(self._share * cols))

    def _choose(self, weight: "torch.Tensor", moment: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        cols = weight.shape[1]
        kept, group = self._groups or (self._kept_of(1, cols), cols)
        return weight, ops.highest_in_groups(weight.abs() * moment.diagonal().sqrt(), kept, group)
