"""Fewer attention heads: whole heads go."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from stackcomp import nn
from stackcomp.core.errors import SettingError
from stackcomp.core.families import Attention, Stack, attention_of, known_heads
from stackcomp.core.plan import Plan, PlannedWeight
from stackcomp.pruning import NarrowingPass

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context


@dataclass(frozen=True, kw_only=True, repr=False)
class PruneHeads(NarrowingPass):
    """Keep the most important attention heads of every layer, and drop the others whole: with their rows of query, key and value, and the
    columns that read them. Put Distill after it.

    The importance of head h is E |sum_tj x_tj dL/dx_tj| over labelled training examples, x_tj its outputs j at token t: to first order,
    what the loss of an example changes by without the head. Where heads share keys and values (grouped-query attention), whole groups go.

    keep: share of a layer's heads, or groups, that stay, in (0, 1], rounded to a whole number and at least one; 1 does nothing; or a share
    for each layer, from the first on. samples: labelled training examples, a fixed random subset; batch_size: of one gradient, which
    changes nothing but the time. `only` and `skip` cannot be given. Layers that share their weights keep the same heads, and so do those
    that add one bias by head (MPNet). The model's family must be in the table of families.

    A Llama-like model becomes an ordinary smaller one, where its config allows the number of heads. Other configs say only one number, from
    which the size of a head follows, and none says a number for each layer: theirs stays, how many heads each layer has left stands beside
    it, and the checkpoint is read as all compressed ones are.

    Where we differ from the paper: it ranks the heads of all layers together, and drops a few at a time.
    """

    paper: ClassVar[str] = "Michel et al., arXiv:1905.10650"

    def selected(self, plan: Plan) -> tuple[str, ...]:
        _, part = self._part(plan.paths)
        chosen = {*super().selected(plan), part.bias}
        return tuple(weight.id for weight in plan.weights if weight.id in chosen)

    def examine(self, weights: Sequence[PlannedWeight]) -> None:
        super().examine(weights)
        _, part = self._part(path for weight in weights for path in weight.paths)
        if len({*self._asked}) > 1 and part.bias in {weight.id for weight in weights}:
            raise SettingError(
                f"{self.name}: keep={self.keep}, and all layers add one bias by head, {part.bias}: give one share for all"
            )

    def reshape(self, plan: Plan) -> Plan:
        stack, part = self._part(plan.paths)
        narrower = super().reshape(plan)
        found = {weight.id: weight for weight in narrower.weights}
        if part.bias not in found:
            return narrower
        left = found[f"{stack.path}.0.{part.out_of}"].cols // self._features(plan.head_features)
        found[part.bias] = replace(found[part.bias], cols=left)
        return replace(narrower, weights=tuple(found.values()))

    def _part(self, paths: Iterable[str]) -> tuple[Stack, Attention]:
        return attention_of(paths)

    def _features(self, of_head: int | None) -> int:
        return known_heads(of_head, self.name)

    def _importance(self, model: "PreTrainedModel", context: "Context") -> "Mapping[str, torch.Tensor]":
        found = super()._importance(model, context)
        _, part = self._part(path for handle in nn.weights(model).values() for path in handle.spec.paths)
        return dict.fromkeys(found, sum(found.values())) if part.bias in context.targets else found  # pyright: ignore[reportReturnType]

    def _cut(self, model: "PreTrainedModel", kept: Mapping[str, Sequence[int]]) -> None:
        nn.keep_heads(model, kept)
