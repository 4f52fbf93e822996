"""Low rank weighted by Fisher information, after fine-tuning."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stackcomp import data, nn, training
from stackcomp.core.contract import Need
from stackcomp.core.settings import whole
from stackcomp.layerwise import WeightedSVDPass

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context


@dataclass(frozen=True, kw_only=True, repr=False)
class FWSVD(WeightedSVDPass):
    """Replace each selected weight W (n x m) by A B of rank r, with rows weighted by how much the task's loss
    depends on them.

    A B minimises || diag(sqrt(I)) (W - A B) ||, I_i = sum_j E[(dL/dW_ij)^2] over labelled training examples:
    the truncated SVD of diag(sqrt(I)) W. Every layer has the same ratio, r = nm / (ratio (n + m)) rounded
    down; nothing is shared out over layers. A layer for which that is no whole rank is left dense. Meant for a
    model that is fine-tuned already, and to be fine-tuned again.

    ratio: dense bytes / stored bytes of each layer, at least 1, where 1 does nothing; samples: labelled
    training examples, a fixed random subset; batch_size: examples whose gradients are averaged before they are
    squared: 1 is the paper's formula, more is faster and blurs it.
    """

    samples: int = 2048
    batch_size: int = 1

    paper: ClassVar[str] = "Hsu et al., FWSVD, arXiv:2207.00112"
    needs: ClassVar[Need] = Need.LABELS

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("samples", self.samples, 1)
        whole("batch_size", self.batch_size, 1)

    def _importance(
        self, model: "PreTrainedModel", handles: "Mapping[str, nn.WeightHandle]", context: "Context"
    ) -> "Mapping[str, torch.Tensor]":
        assert context.task is not None
        batches = data.labelled_batches(
            context, model, self.samples, batch_size=self.batch_size, label="Fisher"
        )
        return data.row_importance(model, handles, batches, training.TaskLoss(task=context.task))
