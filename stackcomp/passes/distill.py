"""Knowledge distillation from the model as it came."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stackcomp import training
from stackcomp.core.contract import Contract, Need
from stackcomp.core.errors import SettingError
from stackcomp.core.settings import within
from stackcomp.training.training_pass import TrainingPass

if TYPE_CHECKING:
    from stackcomp.core.context import Context
    from stackcomp.training.losses import Loss


@dataclass(frozen=True, kw_only=True, repr=False)
class Distill(TrainingPass):
    """Train the compressed model to follow the model as it came: its outputs, and its hidden states layer by
    layer.

    loss = logits * T^2 KL(teacher / T || student / T) + hidden * relative squared error of hidden states +
    labels * task loss, T the temperature; for numbers the first term is a squared error, for plain encoders 1
    - cosine of the embeddings. Labels are read only with labels > 0. The other settings are those of every
    training pass: epochs, steps, learning_rate, batch_size, warmup, schedule, weight_decay, bf16, dropout,
    limit, save_every.
    """

    temperature: float = 2.0
    logits: float = 1.0
    hidden: float = 1.0
    labels: float = 0.0
    dropout: bool = False

    paper: ClassVar[str] = (
        "Hinton et al., arXiv:1503.02531; hidden states: Jiao et al., TinyBERT, arXiv:1909.10351"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        within("temperature", self.temperature, 0.0, above=True)
        for name in ("logits", "hidden", "labels"):
            within(name, getattr(self, name), 0.0)
        if self.logits + self.hidden + self.labels == 0:
            raise SettingError(
                "logits=0, hidden=0, labels=0: one weight must be above 0, or there is nothing to learn"
            )

    @property
    def contract(self) -> Contract:
        return Contract(
            trains=True, needs=frozenset({Need.TEACHER, Need.LABELS if self.labels else Need.TEXT})
        )

    def _loss(self, context: "Context") -> "Loss":
        assert context.task is not None
        assert context.teacher is not None
        return training.DistillationLoss(
            teacher=context.teacher(),
            task=context.task,
            temperature=self.temperature,
            logits=self.logits,
            hidden=self.hidden,
            labels=self.labels,
        )
