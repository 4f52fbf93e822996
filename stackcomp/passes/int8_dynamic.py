"""8-bit weights and 8-bit inputs, rounded as they come."""

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
class Int8Dynamic(Pass):
    """Round the selected weights to 8 bits, and the inputs of each of their products too, one scale a token,
    as they come.

    Weights as in `Int8Weights`; products are sums of 8-bit integers. In a factored layer the thin vector
    between the two products is rounded as well. The arithmetic is torchao's (symmetric; tokens for inputs,
    rows for weights).
    """

    paper: ClassVar[str] = "Zafrir et al., Q8BERT, arXiv:1910.06188"

    @property
    def contract(self) -> Contract:
        return Contract(
            requires=facts(Fact.FLOAT),
            forbids=facts(Fact.KRONECKER),
            adds=facts(Fact.INT8, Fact.DYNAMIC),
            removes=facts(Fact.FLOAT, Fact.TRAINABLE),
        )

    def stores(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        return (spec.rounded("int8", dynamic=True),)

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        for id_ in context.progress(context.targets, label="rounding"):
            nn.quantize(model, id_, dynamic=True)
        return {}
