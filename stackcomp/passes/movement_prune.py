"""Movement pruning: which entries stay is learned while the model is fine-tuned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from stackcomp import nn, ops, training
from stackcomp.core.contract import Contract
from stackcomp.core.errors import SettingError
from stackcomp.core.facts import Fact, facts
from stackcomp.core.passes import Findings
from stackcomp.core.plan import PlannedWeight
from stackcomp.core.settings import groups_fit, one_of, sparsity_groups, within
from stackcomp.core.spec import WeightSpec
from stackcomp.training.training_pass import LearnedForm

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context
    from stackcomp.training.scores import ScoredMask

ROUNDING = 64  # values a weight, by which sizes predicted for even shares make up for bytes and groups that are not full


@dataclass(frozen=True, kw_only=True, repr=False)
class MovementPrune(LearnedForm):
    """Fine-tune the whole model while entries of the selected weights are dropped: those that training moves
    towards zero. Only the kept values are stored, beside a packed support.

    Each entry has a score S, which learns by dL/dS = W dL/dW' with W' the masked weight: the entries
    of the highest scores are kept, and a dropped one can come back. The share that is dropped rises as
    sparsity * (1 - (1 - p)^3), p going from 0 to 1 between the steps `begin` and `end`; then the mask is fixed
    and the other steps train what is kept.

    sparsity: share that is dropped, above 0 and below 1, stored as the kept values and a bitmap; or "n:m", which
    keeps n of every m consecutive inputs of a row (n falls from m by the same schedule); scope: "layer" drops
    this share of every weight, "global" of all selected weights together; begin, end: shares of the steps;
    start: what scores are at first, "zero" as in the paper, or "magnitude", |W|.

    only, skip: the weights that are pruned; everything but `frozen` is trained. distill: follow the model as it came,
    with this temperature and weight of the hidden states, as Distill does; without it, learn the labels of the task.
    The other settings are those of every training pass (see TrainSettings):
    epochs, steps, learning_rate, batch_size, warmup, schedule, weight_decay, gradient_clip, bf16, dropout, limit, save_every.

    Where we differ from the paper: embeddings are trained too unless frozen, and scores have the learning rate of the weights,
    as the order of scores under Adam does not depend on it.
    """

    sparsity: float | str = 0.5
    scope: Literal["layer", "global"] = "layer"
    begin: float = 0.1
    end: float = 0.7
    start: Literal["zero", "magnitude"] = "zero"

    paper: ClassVar[str] = "Sanh et al., arXiv:2005.07683"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._groups is None:
            within("sparsity", self.sparsity, 0.0, 0.999, above=True)
        elif self.scope == "global":
            raise SettingError(
                f"scope='global' does not go with sparsity={self.sparsity!r}, which keeps as many of every group: give a share"
            )
        one_of("scope", self.scope, ("layer", "global"))
        one_of("start", self.start, ("zero", "magnitude"))
        within("begin", self.begin, 0.0, 1.0)
        within("end", self.end, self.begin, 1.0)

    @property
    def _groups(self) -> tuple[int, int] | None:
        """(n, m) of an "n:m" sparsity."""
        return sparsity_groups(self.sparsity)

    @property
    def contract(self) -> Contract:
        asked = Contract(requires=facts(Fact.FLOAT, Fact.DENSE), forbids=facts(Fact.FACTOR))
        if self.epochs == 0:
            return asked
        return replace(
            asked,
            adds=facts(Fact.SPARSE),
            removes=facts(Fact.DENSE),
            trains=True,
            needs=self._needs,
        )

    def examine(self, weights: Sequence[PlannedWeight]) -> None:
        groups_fit(self.sparsity, weights)

    def stores(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        if self.epochs == 0:
            return (spec,)
        if self._groups:
            return (spec.pruned(self._groups),)
        kept = max(1, round(spec.dense_count * (1 - float(self.sparsity))))
        more = ROUNDING if self.scope == "global" else 0
        return (spec.pruned({"weight": min(spec.dense_count, kept + more)}),)

    @property
    def undetermined(self) -> str:
        if self.epochs == 0 or self.scope == "layer":
            return ""
        return "shares what is kept out over the weights by their scores"

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        if self.epochs == 0:
            return {}
        assert context.task is not None
        assert context.tokenizer is not None
        loss = self._loss(context)
        total = training.planned_steps(context.task, context.tokenizer, self, labelled=loss.labelled)
        end = min(int(self.end * total), total - 1)
        begin = min(int(self.begin * total), end)
        handles = {id_: nn.weights(model)[id_] for id_ in context.targets}
        with training.scored(model, context.targets, magnitude=self.start == "magnitude") as masks:

            def choose(step: int) -> None:
                if step <= end:
                    self._choose(handles, masks, rising(step, begin, end))

            report = self._train(model, context, loss, choose)
        for id_, handle in handles.items():
            kept = handle.oriented(masks[id_].mask)
            nn.sparsify(model, id_, lambda _, kept=kept: kept, groups=self._groups)
        return {
            **report,
            "kept": {id_: round(float(mask.mask.float().mean()), 4) for id_, mask in masks.items()},
        }

    def _choose(
        self, handles: "Mapping[str, nn.WeightHandle]", masks: "Mapping[str, ScoredMask]", progress: float
    ) -> None:
        """Set the masks to the highest scores, with `progress` of the sparsity."""
        scores = {id_: mask.scores.detach() for id_, mask in masks.items()}
        if self._groups:
            kept, group = self._groups
            count = group - round((group - kept) * progress)
            chosen = {
                id_: handle.oriented(ops.highest_in_groups(handle.oriented(scores[id_]), count, group))
                for id_, handle in handles.items()
            }
        else:
            share = 1 - float(self.sparsity) * progress
            together = [tuple(scores)] if self.scope == "global" else [(id_,) for id_ in scores]
            chosen = {
                id_: mask
                for ids in together
                for id_, mask in _highest({id_: scores[id_] for id_ in ids}, share).items()
            }
        for id_, mask in masks.items():
            mask.mask.copy_(chosen[id_])


def rising(step: int, begin: int, end: int) -> float:
    """The share of the sparsity at a step: 1 from `end` on, before it 0 up to `begin`, between them 1 - (1 - p)^3."""
    if step >= end:
        return 1.0
    if step <= begin:
        return 0.0
    return 1.0 - (1.0 - (step - begin) / (end - begin)) ** 3


def _highest(scores: "Mapping[str, torch.Tensor]", share: float) -> "dict[str, torch.Tensor]":
    """Masks of the highest `share` of all scores together, at least one entry."""
    import torch

    flat = torch.cat([part.flatten() for part in scores.values()])
    mask = ops.highest(flat, max(1, round(len(flat) * share)))
    pieces = mask.split([part.numel() for part in scores.values()])
    return {id_: piece.view_as(scores[id_]) for id_, piece in zip(scores, pieces, strict=True)}
