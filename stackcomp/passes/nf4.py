"""NF4: 4-bit codes of the quantiles of a normal distribution."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stackcomp import nn
from stackcomp.core.contract import Contract
from stackcomp.core.facts import Fact, facts
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.settings import whole
from stackcomp.core.spec import WeightSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context


@dataclass(frozen=True, kw_only=True, repr=False)
class NF4(Pass):
    """Round every stored value of the selected weights to the nearest of 16 levels, which hold about as many values each of
    a normal distribution, times the largest magnitude of its group: 4 + 16 / group bits a value.

    group: how many consecutive stored values of a row share a 16-bit scale, at least 1.

    Reaches what LowBitWeights reaches: whole matrices, both factors of a dense-sparse or low-rank layer, what pruning kept,
    and embeddings that `only` names. The product is computed in floating point, after a matrix was unpacked. The scales
    stay trainable, the codes do not.

    At the same bytes LowBitWeights leaves a little less squared error of normal values: its scales are searched for, and
    these are the largest magnitudes.

    The values are those of bitsandbytes, the storage is ours: once its CPU layers have computed a product, they save scales in another
    order where these are not rounded a second time, and the checkpoint is spoiled.

    Where we differ from the paper: scales have 16 bits and are not rounded a second time, and a group does not reach into
    the next row.
    """

    group: int = 64

    paper: ClassVar[str] = "Dettmers et al., QLoRA, arXiv:2305.14314"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("group", self.group, 1)

    @property
    def contract(self) -> Contract:
        return Contract(
            requires=facts(Fact.FLOAT), adds=facts(Fact.NF4), removes=facts(Fact.FLOAT, Fact.TRAINABLE)
        )

    def stores(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        return (spec.rounded("nf4", self.group),)

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        for id_ in context.progress(context.targets, label="rounding"):
            nn.quantize(model, id_, coding="nf4", group=self.group)
        return {}
