"""Fine-tuning on labels."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stackcomp import training
from stackcomp.core.contract import Contract, Need
from stackcomp.training.training_pass import TrainingPass

if TYPE_CHECKING:
    from stackcomp.core.context import Context
    from stackcomp.training.losses import Loss


@dataclass(frozen=True, kw_only=True, repr=False)
class FineTune(TrainingPass):
    """Train the whole model on the labels of the task: cross-entropy, or squared error for numbers.

    The settings are those of every training pass (see TrainSettings):
    epochs, steps, learning_rate, batch_size, warmup, schedule, weight_decay, gradient_clip, bf16, dropout, limit, save_every.
    """

    paper: ClassVar[str] = "Devlin et al., BERT, arXiv:1810.04805"

    @property
    def contract(self) -> Contract:
        return Contract(trains=True, needs=frozenset({Need.LABELS}))

    def _loss(self, context: "Context") -> "Loss":
        assert context.task is not None
        return training.TaskLoss(task=context.task)
