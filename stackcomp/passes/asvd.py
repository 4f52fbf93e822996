"""Low rank weighted by the size of inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stackcomp import data, nn
from stackcomp.core.contract import Need
from stackcomp.core.plan import PlannedWeight
from stackcomp.core.settings import have_inputs, whole, within
from stackcomp.layerwise import WeightedSVDPass

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context


@dataclass(frozen=True, kw_only=True, repr=False)
class ASVD(WeightedSVDPass):
    """Replace each selected weight W (n x m) by A B of rank r, with columns weighted by the size of the inputs that they read.

    A B minimises || (W - A B) diag(s) ||, s_j = (mean |x_j|)^alpha over calibration text: the truncated SVD of W diag(s). Every layer has
    the same ratio, r = nm / (ratio (n + m)) rounded down. A layer for which that is no whole rank is left dense.

    ratio: dense bytes / stored bytes of each layer, at least 1, where 1 does nothing; alpha: how much the inputs count, 0 to 2: with 0 it
    is the plain SVD; samples: calibration texts.

    Where we differ from the paper: it searches the rank of each layer by trying ratios on calibration text, which is not done here.
    LowRank looks at all second moments of the inputs, where this looks at the size of each, and shares ranks out over layers.
    """

    alpha: float = 0.5
    samples: int = 1024

    paper: ClassVar[str] = "Yuan et al., ASVD, arXiv:2312.05821"
    needs: ClassVar[Need] = Need.CALIBRATION
    of_columns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        within("alpha", self.alpha, 0.0, 2.0)
        whole("samples", self.samples, 1)

    def examine(self, weights: Sequence[PlannedWeight]) -> None:
        super().examine(weights)
        have_inputs(weights, "LowRank(data_aware=False)")

    def _importance(
        self, model: "PreTrainedModel", handles: "Mapping[str, nn.WeightHandle]", context: "Context"
    ) -> "Mapping[str, torch.Tensor]":
        text = data.Calibration.of(model, context, self.samples)
        modules = {id_: handle.modules for id_, handle in handles.items()}
        sizes = text.mean_inputs(model, modules, progress=context.progress)
        return {id_: size ** (2 * self.alpha) for id_, size in sizes.items()}
