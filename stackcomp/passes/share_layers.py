"""Fewer distinct layers: consecutive layers use the same weights."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stackcomp import nn
from stackcomp.core.contract import Contract
from stackcomp.core.errors import NothingToCompress, SettingError
from stackcomp.core.facts import Fact, facts
from stackcomp.core.families import Stack, stack_of
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.plan import Plan, PlannedWeight
from stackcomp.core.settings import one_of, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context


@dataclass(frozen=True, kw_only=True, repr=False)
class ShareLayers(Pass):
    """Let every `group` consecutive layers use one set of linear weights, stored once: the depth and the time stay, the bytes
    of the layers fall by the factor `group`. Put Distill after it.

    group: layers that share, from 1, which does nothing, up to all there are; the last group is smaller where their number is
    no multiple. start: what the shared weight starts from: "first", that of the group's first layer, or "mean", the mean of the
    weights it replaces, which is far from each of them in a trained model. With `only` and `skip` some weights are shared and
    others are not: only="*.attention" shares those of attention, as one variant of the paper does. Weights outside the layers
    are passed over.

    What is shared is one weight with several paths: later passes train, factorize or round it once, and select it by any of
    these paths. The model's family must be in the table of families.

    Where we differ from the paper: the model is a trained one rather than one trained so from the start, and biases and norms,
    which are few and tell the layers of a group apart, stay each layer's own.
    """

    group: int = 2
    start: Literal["first", "mean"] = "first"

    paper: ClassVar[str] = "Lan et al., ALBERT, arXiv:1909.11942"
    idle: ClassVar[dict[str, Any]] = {"group": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("group", self.group, 1)
        one_of("start", self.start, ("first", "mean"))

    @property
    def contract(self) -> Contract:
        return Contract(requires=facts(Fact.FLOAT, Fact.DENSE), forbids=facts(Fact.FACTOR))

    def selected(self, plan: Plan) -> tuple[str, ...]:
        stack = _stack(plan)
        if self.group > stack.count:
            raise SettingError(
                f"ShareLayers: group={self.group} of {stack.count} layers: give at most {stack.count}"
            )
        return tuple(id_ for id_ in super().selected(plan) if stack.split(id_))

    def examine(self, weights: Sequence[PlannedWeight]) -> None:
        found = {weight.id: weight for weight in weights}
        groups = self._groups(found)
        if self.group > 1 and all(
            len(ids) == 1 and len(found[id_].paths) == 1 for ids in groups for id_ in ids
        ):
            raise NothingToCompress(
                f"ShareLayers: no two of the {len(weights)} selected weights are alike in one group of {self.group} layers: "
                "widen only= or narrow skip="
            )
        for first, *others in groups:
            for id_ in others:
                shapes = [(found[name].rows, found[name].cols) for name in (first, id_)]
                if shapes[0] != shapes[1]:
                    raise SettingError(
                        f"ShareLayers: {first} is {shapes[0]} and {id_} is {shapes[1]}: give skip={id_!r}"
                    )

    def reshape(self, plan: Plan) -> Plan:
        found = {weight.id: weight for weight in plan.weights}
        merged = {
            ids[0]: replace(
                found[ids[0]],
                paths=tuple(path for id_ in ids for path in found[id_].paths),
                forms=frozenset().union(*(found[id_].forms for id_ in ids)),
            )
            for ids in self._groups(self.selected(plan))
        }
        gone = {*self.selected(plan)} - merged.keys()
        left = tuple(merged.get(weight.id, weight) for weight in plan.weights if weight.id not in gone)
        return replace(plan, weights=left)

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        import torch

        groups = [ids for ids in self._groups(context.targets) if len(ids) > 1]
        for ids in context.progress(groups, label="sharing", total=len(groups)):
            weights = nn.weights(model)
            of = ids if self.start == "mean" else ids[:1]
            nn.share(model, ids, torch.stack([weights[id_].dense().float() for id_ in of]).mean(0))
        return {"shared": {ids[0]: len(ids) for ids in groups}}

    def _groups(self, ids: Collection[str]) -> list[list[str]]:
        """The ids that become one weight, in the order of the layers. A weight that is shared already counts by the first of its
        layers."""
        groups: dict[tuple[int, str], list[str]] = {}
        stack = stack_of(ids)
        for id_ in ids:
            place = stack.split(id_)
            assert place is not None
            groups.setdefault((place[0] // self.group, place[1]), []).append(id_)
        return list(groups.values())


def _stack(plan: Plan) -> Stack:
    """The stack of layers of a planned model."""
    return stack_of(path for weight in plan.weights for path in weight.paths)
