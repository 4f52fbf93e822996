"""8-bit weights and 8-bit inputs, rounded as they come."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stackcomp import nn
from stackcomp.core.contract import Contract
from stackcomp.core.facts import Fact, facts
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.settings import within
from stackcomp.core.spec import WeightSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context


@dataclass(frozen=True, kw_only=True, repr=False)
class Int8Dynamic(Pass):
    """Round the selected weights to 8 bits, and the inputs of each of their products too, one scale a token,
    as they come.

    outliers: inputs of at least this magnitude, above 0, are left as they are, so that the scale of their token need not cover them, and
    their products are added in floating point; LLM.int8() takes 6.0. None rounds them all. Only time is lost: the file is the same.

    Weights as in `Int8Weights`; products are sums of 8-bit integers. In a factored layer the thin vector
    between the two products is rounded as well. The arithmetic is torchao's (symmetric; tokens for inputs,
    rows for weights). Where we differ from LLM.int8(): an outlier is one of a token, where there a column of inputs in which one
    token has an outlier is left as it is for all tokens of the batch, so that scores depend on it; and the weights of such a column stay
    rounded.
    """

    outliers: float | None = None

    paper: ClassVar[str] = (
        "Zafrir et al., Q8BERT, arXiv:1910.06188; outliers: Dettmers et al., LLM.int8(), arXiv:2208.07339"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outliers is not None:
            within("outliers", self.outliers, 0, above=True)

    @property
    def contract(self) -> Contract:
        return Contract(
            requires=facts(Fact.FLOAT),
            forbids=facts(Fact.KRONECKER),
            adds=facts(Fact.INT8, Fact.DYNAMIC),
            removes=facts(Fact.FLOAT, Fact.TRAINABLE),
        )

    def stores(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        return (spec.rounded("int8", dynamic=True, outliers=self.outliers),)

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        for id_ in context.progress(context.targets, label="rounding"):
            nn.quantize(model, id_, dynamic=True, outliers=self.outliers)
        return {}
