"""Weights of 4 bits to 1: one scale a group, packed, computed in floating point."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stackcomp import nn
from stackcomp.core.contract import Contract
from stackcomp.core.facts import Fact, facts
from stackcomp.core.matrices import ROUNDED
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.settings import one_of, whole
from stackcomp.core.spec import WeightSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context


@dataclass(frozen=True, kw_only=True, repr=False)
class LowBitWeights(Pass):
    """Round every stored value of the selected weights to the nearest of a few levels, with one 16-bit scale for
    every group of values, and pack the codes: bits + 16 / group bits a value.

    bits: of a value: 4, 3 or 2, for 2^bits levels; 1.6, ternary: -1, 0 or 1 times the scale, five to a byte; 1, binary:
    one of two opposite values. group: how many consecutive stored values of a row share a scale, at least 1.

    Reaches whatever a weight is stored as: a whole matrix, the dense basis and the sparse coefficients of a
    dense-sparse layer, both factors of a low-rank one, and what pruning kept; a support is left alone. Embeddings
    are rounded when `only` names them. The scale of a group is the one of several clipping ratios that leaves the
    least squared error (Q-BERT takes the range, and learns under it); ternary and binary ones are exactly the best (TWN
    guesses a threshold, for a whole layer). The product is computed in floating point, after a matrix was unpacked. The
    scales stay trainable, the codes do not.
    """

    bits: float = 4
    group: int = 32

    paper: ClassVar[str] = (
        "Shen et al., Q-BERT, arXiv:1909.05840; ternary: Li et al., TWN, arXiv:1605.04711; "
        "binary: Rastegari et al., XNOR-Net, arXiv:1603.05279"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("bits", self.bits, [bits for bits in ROUNDED if bits < 8])
        whole("group", self.group, 1)

    @property
    def contract(self) -> Contract:
        return Contract(
            requires=facts(Fact.FLOAT),
            adds=facts(Fact(ROUNDED[self.bits])),
            removes=facts(Fact.FLOAT, Fact.TRAINABLE),
        )

    def stores(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        return (spec.rounded(ROUNDED[self.bits], self.group),)

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        for id_ in context.progress(context.targets, label="rounding"):
            nn.quantize(model, id_, coding=ROUNDED[self.bits], group=self.group)
        return {}
