"""8-bit weights: one scale a row, computed in floating point."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stackcomp import nn
from stackcomp.core.contract import Contract
from stackcomp.core.facts import Fact, facts
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.spec import WeightSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context


@dataclass(frozen=True, kw_only=True, repr=False)
class Int8Weights(Pass):
    """Round every stored value of the selected weights to 8 bits, with one floating-point scale a row.

    Reaches whatever a weight is stored as: a whole matrix, the dense basis and the sparse coefficients of a
    dense-sparse layer, both factors of a low-rank one; a support is left alone. Embeddings are rounded when
    `only` names them. The product is computed in floating point, so inputs are exact. The arithmetic is
    torchao's (symmetric, rows); the storage is our own, plain tensors. The scales stay trainable, the rounded
    values do not.
    """

    paper: ClassVar[str] = "Zafrir et al., Q8BERT, arXiv:1910.06188"

    @property
    def contract(self) -> Contract:
        return Contract(
            requires=facts(Fact.FLOAT), adds=facts(Fact.INT8), removes=facts(Fact.FLOAT, Fact.TRAINABLE)
        )

    def stores(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        return (spec.rounded("int8"),)

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        for id_ in context.progress(context.targets, label="rounding"):
            nn.quantize(model, id_, dynamic=False)
        return {}
