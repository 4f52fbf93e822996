"""GPTQ: rounding with a view to the inputs, where later columns make up for the errors of those before."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stackcomp import data, nn
from stackcomp.core.contract import Contract, Need
from stackcomp.core.facts import Fact, facts
from stackcomp.core.matrices import ROUNDED
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.plan import PlannedWeight
from stackcomp.core.settings import have_inputs, rounding, whole, within
from stackcomp.core.spec import WeightSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context


@dataclass(frozen=True, kw_only=True, repr=False)
class GPTQ(Pass):
    """Round the selected weights to the stored form of LowBitWeights, or with 8 bits of Int8Weights, so that the outputs of each
    layer on calibration text change little: no labels, no training.

    With H the second moment of a layer's inputs, columns are rounded one by one, and those to come move so that
    tr((W - W') H (W - W')^T) is least: w_k <- w_k - e U_jk with e = (w_j - w'_j) / U_jj, H^-1 = U^T U.

    bits: of a value, 8, 4, 3, 2, 1.6 (ternary) or 1 (binary); group: how many consecutive stored values of a row share a 16-bit
    scale, 32 where nothing is said; 8 bits have a scale a row, and no group. samples: calibration texts; damping: share of the mean
    diagonal that is added to H; order: round columns by falling diagonal of H ("act-order"), rather than as they stand: what the
    inputs weigh most has the most left to make up for it.

    Reaches what LowBitWeights reaches, but for embeddings: both factors of a low-rank or dense-sparse layer, the second with the
    moment of what the first, rounded, lets through; and what pruning kept: dropped entries stay zero, and the kept ones to come take
    up the error.

    Where we differ from the paper: the scales of all groups are found before the first column is rounded, by a search that weighs
    errors by 1 / [H^-1]_jj, and not when the sweep reaches a group: so every order of columns keeps the stored form. All layers are
    calibrated at once, on the model as this pass finds it.
    """

    bits: float = 4
    group: int | None = None
    samples: int = 1024
    damping: float = 0.01
    order: bool = True

    paper: ClassVar[str] = "Frantar et al., GPTQ, arXiv:2210.17323"

    def __post_init__(self) -> None:
        super().__post_init__()
        rounding(self.bits, self.group)
        whole("samples", self.samples, 1)
        within("damping", self.damping, 0.0, 1.0, above=True)

    @property
    def contract(self) -> Contract:
        return Contract(
            requires=facts(Fact.FLOAT),
            forbids=facts(Fact.KRONECKER),
            adds=facts(Fact(ROUNDED[self.bits])),
            removes=facts(Fact.FLOAT, Fact.TRAINABLE),
            needs=frozenset({Need.CALIBRATION}),
        )

    def examine(self, weights: Sequence[PlannedWeight]) -> None:
        have_inputs(weights, "LowBitWeights or Int8Weights")

    def stores(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        return (spec.rounded(*rounding(self.bits, self.group)),)

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        coding, group = rounding(self.bits, self.group)
        moments = data.input_moments(model, context, self.samples)
        for id_ in context.progress(context.targets, label="rounding"):
            nn.round_columns(
                model,
                id_,
                moment=moments[id_],
                coding=coding,
                group=group,
                damping=self.damping,
                ordered=self.order,
            )
        return {}
