"""SparseGPT: pruning with a view to the inputs, where later columns make up for the errors of those before."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stackcomp import ops
from stackcomp.core.settings import within
from stackcomp.pruning import CalibratedPruningPass

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, repr=False)
class SparseGPT(CalibratedPruningPass):
    """Drop entries of the selected weights so that the outputs of each layer on calibration text change little, the kept ones moving
    to make up for the dropped ones: no labels, no training.

    With H the second moment of a layer's inputs, H^-1 = U^T U, columns are settled one by one: the entries of highest
    w_ij^2 / U_jj^2 stay, and those to come move so that tr((W - W') H (W - W')^T) is least.

    sparsity: share that is dropped of every 128 columns, in [0, 1), 0 does nothing; or "n:m", which keeps n of every m
    consecutive inputs of a row; stored as MagnitudePrune does. samples: calibration texts; damping: share of the mean diagonal that
    is added to H.

    Both factors of a low-rank layer are pruned, the second with the moment of what the first, pruned, lets through. Where we
    differ from the paper: all layers are calibrated at once, on the model as this pass finds it; rounding is a pass of its own
    (GPTQ, which keeps the support).
    """

    damping: float = 0.01

    paper: ClassVar[str] = "Frantar and Alistarh, SparseGPT, arXiv:2301.00774"

    def __post_init__(self) -> None:
        super().__post_init__()
        within("damping", self.damping, 0.0, 1.0, above=True)

    def _kept_of(self, rows: int, cols: int) -> int:
        return ops.kept_in_columns(rows, cols, self._share)

    def _choose(self, weight: "torch.Tensor", moment: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        metric = ops.curvature(moment, damping=self.damping)
        if self._groups:
            return ops.prune_columns(weight, metric, groups=self._groups)
        return ops.prune_columns(weight, metric, share=self._share)
