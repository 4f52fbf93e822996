"""Quantization-aware training: weights learn with their rounding in the loop."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from stackcomp import training
from stackcomp.core.contract import Contract
from stackcomp.core.facts import Fact, facts
from stackcomp.core.matrices import ROUNDED
from stackcomp.core.passes import Findings
from stackcomp.core.settings import rounding, whole
from stackcomp.core.spec import WeightSpec
from stackcomp.training.training_pass import LearnedForm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context


@dataclass(frozen=True, kw_only=True, repr=False)
class QuantizationAware(LearnedForm):
    """Train the selected weights while the model runs on their rounded values, and leave them stored so: in the bytes of
    LowBitWeights, or with 8 bits of Int8Weights.

    Every value keeps its floating-point v; the model computes with the level of the grid nearest to it, and the gradient of that
    goes straight through to v. Reaches whatever a weight is stored as: a whole matrix, both factors of a dense-sparse or low-rank
    one, and what pruning kept; a support is left alone. Embeddings are rounded when `only` names them.

    bits: of a value, 8, 4, 3, 2, 1.6 (ternary) or 1 (binary); group: how many consecutive stored values of a row share a 16-bit
    scale, 32 where nothing is said; 8 bits have a scale a row, and no group. every: steps between fits of the scales to values that
    have moved; ternary scales, which are found anew, are so at every step, as in TernaryBERT, whatever it says.

    only, skip: the weights that are rounded; everything but `frozen` is trained. distill: follow the model as it came, with this
    temperature and weight of the hidden states, as Distill does; without it, learn the labels of the task. The other settings are
    those of every training pass (see TrainSettings):
    epochs, steps, learning_rate, batch_size, warmup, schedule, weight_decay, gradient_clip, bf16, dropout, limit, save_every.

    Where we differ from the papers: scales follow the values by least squares, where LSQ gives them gradients; the gradient
    reaches clipped values too; activations are not rounded; and binary weights start from the model as it is, where BinaryBERT
    splits those of a ternary one of half the width.
    """

    bits: float = 4
    group: int | None = None
    every: int = 8

    paper: ClassVar[str] = (
        "Zhang et al., TernaryBERT, arXiv:2009.12812; Bai et al., BinaryBERT, arXiv:2012.15701; Esser et al., LSQ, arXiv:1902.08153; "
        "straight through: Bengio et al., arXiv:1308.3432"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        rounding(self.bits, self.group)
        whole("every", self.every, 1)

    @property
    def contract(self) -> Contract:
        asked = Contract(requires=facts(Fact.FLOAT))
        if self.epochs == 0:
            return asked
        return replace(
            asked,
            adds=facts(Fact(ROUNDED[self.bits])),
            removes=facts(Fact.FLOAT, Fact.TRAINABLE),
            trains=True,
            needs=self._needs,
        )

    def stores(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        return (spec.rounded(*rounding(self.bits, self.group)) if self.epochs else spec,)

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        if self.epochs == 0:
            return {}
        coding, group = rounding(self.bits, self.group)
        every = 1 if coding == "ternary" else self.every
        with training.rounded(model, context.targets, coding=coding, group=group) as matrices:

            def refit(step: int) -> None:
                if step and step % every == 0:
                    for matrix in matrices:
                        matrix.refit()

            report = self._train(model, context, self._loss(context), refit)
        return {**report, "weights": len(context.targets)}
