"""Knowledge distillation from the model as it came."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stackcomp import training
from stackcomp.core.contract import Contract, Need
from stackcomp.core.families import attention_of, known_heads
from stackcomp.core.plan import Plan
from stackcomp.training.settings import check_distillation
from stackcomp.training.training_pass import TrainingPass

if TYPE_CHECKING:
    from stackcomp.core.context import Context
    from stackcomp.training.losses import Loss


@dataclass(frozen=True, kw_only=True, repr=False)
class Distill(TrainingPass):
    """Train the compressed model to follow the model as it came: its outputs, its hidden states and attention
    layer by layer, and how the tokens of its last layer relate.

    loss = logits * T^2 KL(teacher / T || student / T) + hidden * relative squared error of hidden states +
    attention * relative squared error of attention scores + relations * KL(teacher || student) of relations +
    labels * task loss, T the temperature; for numbers the first term is a squared error, for plain encoders 1
    - cosine of the embeddings. Labels are read only with labels > 0. Layer i of s follows layer round(i t / s)
    of t. The other settings are those of every training pass (see TrainSettings):
    epochs, steps, learning_rate, batch_size, warmup, schedule, weight_decay, gradient_clip, bf16, dropout, limit, save_every.

    attention: scores are what the softmax makes attention maps of, q k^T / sqrt(d) of every head, with
    positions where the family adds or turns by them. They need as many heads as the model had when it came, so
    not after PruneHeads. relations: in the last layer of each model, softmax(A A^T / sqrt(e)) over all real
    tokens, A what one head computes with: of queries, keys and values, in equal parts. relation_heads: how
    many heads these are split into for it, whatever heads the model has; None is as many as the teacher has
    of keys and values, or the largest divisor of that number which divides all widths. Both work whatever the
    form of the weights and the kernel of attention, for the families in the table.

    Where we differ from the papers: errors are relative, which puts all layers on one scale; nothing is
    projected from one width to another; relations are always those of the teacher's last layer, where
    MiniLMv2 takes an earlier one of large teachers.
    """

    temperature: float = 2.0
    logits: float = 1.0
    hidden: float = 1.0
    attention: float = 0.0
    relations: float = 0.0
    relation_heads: int | None = None
    labels: float = 0.0
    dropout: bool = False

    paper: ClassVar[str] = (
        "Hinton et al., arXiv:1503.02531; hidden states, attention: Jiao et al., TinyBERT, arXiv:1909.10351; "
        "relations: Wang et al., MiniLMv2, arXiv:2012.15828"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_distillation(self)

    @property
    def contract(self) -> Contract:
        return Contract(
            trains=True, needs=frozenset({Need.TEACHER, Need.LABELS if self.labels else Need.TEXT})
        )

    def selected(self, plan: Plan) -> tuple[str, ...]:
        if self.attention or self.relations:
            known_heads(plan.head_features, self.name)
            attention_of(plan.paths)
        return super().selected(plan)

    def _loss(self, context: "Context") -> "Loss":
        assert context.task is not None
        assert context.teacher is not None
        return training.DistillationLoss(
            teacher=context.teacher(),
            task=context.task,
            temperature=self.temperature,
            logits=self.logits,
            hidden=self.hidden,
            attention=self.attention,
            relations=self.relations,
            relation_heads=self.relation_heads,
            labels=self.labels,
        )
