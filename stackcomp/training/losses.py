"""What training minimises. A loss sees the model and one padded batch, and calls the model itself.

A batch is what `Collator` gives: tokens, labels where the loss wants them, and `index`, the number of each
example in the training data, by which a loss may keep what it computed once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stackcomp.core.context import Progress, quiet
from stackcomp.core.errors import SettingError, TrainingDiverged, UnsupportedModel
from stackcomp.data.batches import IGNORED_LABEL, inference_batches, mean_over_tokens
from stackcomp.data.question_answering import position_logits
from stackcomp.nn import evaluating
from stackcomp.training.attention import Heads, caught, depth, relation_divergence, score_error
from stackcomp.training.settings import check_distillation

if TYPE_CHECKING:
    from stackcomp.data.task import Task

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What a loss may use before the first step: the examples training will visit, and how to batch them.

    visits: indices in the order of the steps, repeats included. lengths: tokens of every example. collate:
    from indices to a batch on the right device. precision: the context the forward passes run in.
    """

    task: "Task"
    visits: Sequence[int]
    lengths: Sequence[int]
    batch_size: int
    collate: Callable[[Sequence[int]], Batch]
    precision: Callable[[], Any]
    progress: Progress = quiet


class Loss(ABC):
    """A scalar to minimise."""

    labelled: bool = True
    """Whether the batches must hold labels."""

    @abstractmethod
    def prepare(self, preparation: Preparation) -> None:
        """Compute, once before the first step, what the steps will share."""

    @abstractmethod
    def release(self) -> None:
        """Drop what `prepare` kept."""

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch, a float32 scalar with a gradient to the model's parameters."""


@dataclass(kw_only=True)
class TaskLoss(Loss):
    """The task's own loss on labels: cross-entropy for classes and next tokens, and for first and last tokens
    of answers (their mean; padding is no place to point to), squared error for numbers.

    For similarity the squared error of the cosine against labels scaled to [0, 1], by the task's `label_range`.
    """

    task: "Task"

    def prepare(self, preparation: Preparation) -> None:
        """Nothing: the labels are all it takes."""

    def release(self) -> None:
        """Nothing was kept."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.task.kind == "similarity":
            first, second = mean_over_tokens(
                model(**_tokens(batch)).last_hidden_state, batch["attention_mask"]
            ).chunk(2)
            low, high = self._range
            return functional.mse_loss(
                functional.cosine_similarity(first, second), (batch["labels"] - low) / (high - low)
            )
        return self.of_logits(_logits(model(**_tokens(batch)), batch, self.task), batch["labels"])

    @cached_property
    def _range(self) -> tuple[float, float]:
        return self.task.label_range

    def of_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of a head's outputs; for answers logits are (2 texts x tokens), as `labels` are flattened."""
        if self.task.kind == "language_modelling":
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            return functional.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL)
        if self.task.kind in ("classification", "question_answering"):
            return functional.cross_entropy(logits, labels.flatten())
        return functional.mse_loss(logits.squeeze(-1), labels)


@dataclass(kw_only=True)
class DistillationLoss(Loss):
    """Follow a teacher (Hinton et al., arXiv 1503.02531; hidden states and attention as TinyBERT, arXiv 1909.10351; relations as
    MiniLMv2, arXiv 2012.15828).

    loss = logits * L_out + labels * L_task + hidden * L_hid + attention * L_att + relations * L_rel, with the weights below.
    L_out: T^2 KL(teacher / T || student / T) over classes, next tokens, or the tokens that an answer may begin
    and end at (the mean of both), squared error for regression, and 1 - cosine of the pooled embeddings for
    plain encoders. L_hid: squared error of hidden states over real tokens relative to the teacher's energy,
    meaned over the student's layers; student layer i of s follows teacher layer round(i t / s) of t. L_att: the
    same error of attention scores, before the softmax, which need as many heads in both. L_rel: KL of the
    relations between tokens in the last layer of each, in `relation_heads` heads (see `relation_divergence`).
    Where we differ from TinyBERT: no projection (widths must agree), and the relative error puts every layer
    on one scale. Where we differ from MiniLMv2: it takes an earlier layer of large teachers. Only labels > 0
    needs labelled data.

    cache: where outputs alone are compared and examples come by more than once, the teacher runs once over
    them before the first step; it has no dropout, so nothing is lost. Otherwise it runs beside the student, as
    it does for next tokens and answers, whose outputs are large, and nothing is kept between steps.
    """

    teacher: nn.Module = field(repr=False)
    task: "Task"
    temperature: float = 2.0
    logits: float = 1.0
    hidden: float = 1.0
    attention: float = 0.0
    relations: float = 0.0
    relation_heads: int | None = None
    labels: float = 0.0
    cache: bool = True
    _kept: Tensor | None = field(default=None, init=False, repr=False)
    _place: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_distillation(self)
        self.labelled = self.labels > 0
        self._task_loss = TaskLoss(task=self.task)

    def prepare(self, preparation: Preparation) -> None:
        """Run the teacher once over every example that training will visit, if that pays."""
        needed = sorted(set(preparation.visits))
        repeated = len(preparation.visits) >= 2 * len(needed)
        large = self.task.kind in ("language_modelling", "question_answering")
        inner = self.hidden + self.attention + self.relations
        if not self.cache or inner > 0 or large or not repeated:
            return
        self._place = torch.full((len(preparation.lengths),), -1)
        self._place[needed] = torch.arange(len(needed))
        order = inference_batches([preparation.lengths[i] for i in needed], batch_size=preparation.batch_size)
        kept: list[Tensor] = [torch.empty(0)] * len(needed)
        for places in preparation.progress(order, label="teacher", total=len(order)):
            batch = preparation.collate([needed[place] for place in places])
            with preparation.precision():
                outputs = self._of_teacher(batch, ())[0].cpu()
            for row, place in enumerate(places):
                # Both texts of a similarity pair are kept together.
                kept[place] = outputs[row :: len(places)]
        self._kept = torch.stack(kept)

    def release(self) -> None:
        """Drop the kept outputs of the teacher."""
        self._kept = self._place = None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        followed = self._followed(model)
        outputs, ours = self._run(model, batch, tuple(followed))
        if self._kept is not None and self._place is not None:
            kept = self._kept[self._place[batch["index"].cpu()]]
            wanted, states, theirs = kept.transpose(0, 1).flatten(0, 1).to(batch["input_ids"].device), [], []
        else:
            wanted, states, theirs = self._of_teacher(batch, tuple(followed.values()))
        mask = batch["attention_mask"]
        loss = torch.zeros((), device=wanted.device)
        if self.logits:
            loss = loss + self.logits * self._of_outputs(self._compared(outputs, batch), wanted, batch)
        if self.hidden:
            loss = loss + self.hidden * _of_hidden(outputs.hidden_states, states, mask)
        if self.attention:
            loss = loss + self.attention * score_error(ours, theirs, mask)
        if self.relations:
            divergence = relation_divergence(ours[-1], theirs[-1], mask, self.relation_heads)
            loss = loss + self.relations * divergence
        if self.labels:
            loss = loss + self.labels * self._of_labels(outputs, batch)
        return loss

    def _followed(self, model: nn.Module) -> dict[int, int]:
        """The layers of the student whose attention is compared, from 0, each with the teacher's that it follows."""
        if not self.attention and not self.relations:
            return {}
        students, teachers = depth(model), depth(self.teacher)
        first = 0 if self.attention else students - 1
        return {layer: _matched(layer + 1, students, teachers) - 1 for layer in range(first, students)}

    def _run(self, model: nn.Module, batch: Batch, layers: Sequence[int]) -> tuple[Any, Sequence[Heads]]:
        """The outputs of a model, and the attention heads of these layers."""

        def run() -> Any:
            return model(**_tokens(batch), output_hidden_states=self.hidden > 0)

        return caught(model, layers, run) if layers else (run(), ())

    @torch.no_grad()
    def _of_teacher(
        self, batch: Batch, layers: Sequence[int]
    ) -> tuple[Tensor, Sequence[Tensor], Sequence[Heads]]:
        """What the teacher says, its hidden states where these are compared, and the attention heads of its `layers`."""
        with evaluating(self.teacher):
            outputs, heads = self._run(self.teacher, batch, layers)
        if self.hidden > 0 and outputs.get("hidden_states") is None:
            raise UnsupportedModel(
                f"hidden={self.hidden}: {type(self.teacher).__name__} gives no one list of hidden states, as it has an encoder and a "
                "decoder: set hidden=0"
            )
        wanted = self._compared(outputs, batch)
        if not wanted.isfinite().all():
            raise TrainingDiverged(
                "the teacher's outputs are not finite: look for NaN or infinite weights in the model as it "
                "came"
            )
        return wanted, outputs.hidden_states if self.hidden > 0 else (), heads

    def _compared(self, outputs: Any, batch: Batch) -> Tensor:
        if self.task.kind == "similarity":
            return mean_over_tokens(outputs.last_hidden_state, batch["attention_mask"])
        return _logits(outputs, batch, self.task)

    def _of_outputs(self, ours: Tensor, theirs: Tensor, batch: Batch) -> Tensor:
        if ours.shape != theirs.shape:
            raise UnsupportedModel(
                f"the teacher's outputs have shape {tuple(theirs.shape)} and the student's "
                f"{tuple(ours.shape)}: "
                "both must have the same head"
            )
        if self.task.kind == "similarity":
            return (1 - functional.cosine_similarity(ours, theirs)).mean()
        if self.task.kind == "regression":
            return functional.mse_loss(ours, theirs)
        if self.task.kind == "language_modelling":
            real = batch["attention_mask"].bool()
            ours, theirs = ours[real], theirs[real]
        ours, theirs = (functional.log_softmax(part / self.temperature, dim=-1) for part in (ours, theirs))
        return self.temperature**2 * functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)

    def _of_labels(self, outputs: Any, batch: Batch) -> Tensor:
        if self.task.kind == "similarity":
            raise SettingError(
                "labels: a weight above 0 needs a head; for similarity distil logits and hidden states"
            )
        return self._task_loss.of_logits(_logits(outputs, batch, self.task), batch["labels"])


def _matched(layer: int, students: int, teachers: int) -> int:
    """The teacher's layer that a student's follows; layers count from 1, and 0 are the embeddings."""
    return round(layer * teachers / students)


def _of_hidden(ours: Sequence[Tensor], theirs: Sequence[Tensor], mask: Tensor) -> Tensor:
    students, teachers = len(ours) - 1, len(theirs) - 1  # the first of each is the embeddings' output
    if ours[0].shape != theirs[0].shape:
        raise UnsupportedModel(
            f"hidden: the teacher's width is {theirs[0].shape[-1]} and the student's {ours[0].shape[-1]}; "
            "set hidden=0"
        )
    real = mask.bool()
    total = torch.zeros((), device=mask.device)
    for layer in range(students + 1):
        wanted = theirs[_matched(layer, students, teachers)][real].float()
        total = total + (ours[layer][real].float() - wanted).pow(2).sum() / wanted.pow(2).sum()
    return total / (students + 1)


def _logits(outputs: Any, batch: Batch, task: "Task") -> Tensor:
    """The head's outputs in float32; of answers a row of tokens each for first and last: (2 texts x tokens)."""
    if task.kind == "question_answering":
        return position_logits(outputs, batch["attention_mask"]).flatten(0, 1)
    return outputs.logits.float()


def _tokens(batch: Mapping[str, Tensor]) -> Batch:
    return {key: value for key, value in batch.items() if key not in ("labels", "index")}
