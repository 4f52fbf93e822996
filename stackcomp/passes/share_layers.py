"""Fewer distinct layers: consecutive layers use the same weights."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stackcomp import nn
from stackcomp.core.contract import Contract
from stackcomp.core.errors import NothingToCompress, SettingError
from stackcomp.core.facts import Fact, facts
from stackcomp.core.families import stack_of
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.plan import Plan, PlannedWeight
from stackcomp.core.settings import one_of, whole
from stackcomp.core.spec import WeightSpec
from stackcomp.layerwise import FACTOR

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context

BRANCH = FACTOR | {Fact.BRANCH}  # a part of what layers keep for themselves


@dataclass(frozen=True, kw_only=True, repr=False)
class ShareLayers(Pass):
    """Let every `group` consecutive layers use one set of linear weights, stored once: the depth and the time stay, the bytes
    of the layers fall by the factor `group`. Put Distill after it.

    group: layers that share, from 1, which does nothing, up to all there are; the last group is smaller where their number is
    no multiple. start: what the shared weight starts from: "first", that of the group's first layer, or "mean", the mean of the
    weights it replaces, which is far from each of them in a trained model. With `only` and `skip` some weights are shared and
    others are not: only="*.attention" shares those of attention, as one variant of the paper does. Weights outside the layers
    are passed over.

    delta_rank: the rank r of a product that each layer keeps for itself beside what it shares, W_i = M + L_i R_i, which starts as a
    truncated SVD of what M lacks of W_i; 0 for none. It costs r (n + m) values for every layer and n x m weight.

    What is shared is one weight with several paths: later passes train, factorize or round it once, and select it by any of
    these paths. With products beside it, it can be trained, pruned and rounded, the products too, but not factorized, and layers can only
    be dropped before. The model's family must be in the table of families.

    Where we differ from the paper: the model is a trained one rather than one trained so from the start, and biases and norms,
    which are few and tell the layers of a group apart, stay each layer's own.
    """

    group: int = 2
    start: Literal["first", "mean"] = "first"
    delta_rank: int = 0

    paper: ClassVar[str] = (
        "Lan et al., ALBERT, arXiv:1909.11942; delta_rank: Bae et al., Relaxed Recursive Transformers, arXiv:2410.20672"
    )
    idle: ClassVar[dict[str, Any]] = {"group": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("group", self.group, 1)
        one_of("start", self.start, ("first", "mean"))
        whole("delta_rank", self.delta_rank, 0)

    @property
    def contract(self) -> Contract:
        asked = Contract(requires=facts(Fact.FLOAT, Fact.DENSE), forbids=facts(Fact.FACTOR))
        if not self._branches:
            return asked
        form = {"weight": FACTOR - {Fact.FACTOR}, "basis": BRANCH, "coefficients": BRANCH}
        return replace(asked, becomes=(form,), may_leave=True)

    @property
    def _branches(self) -> bool:
        """Whether layers keep something for themselves."""
        return self.group > 1 and self.delta_rank > 0

    def stores(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        return (spec.as_branched(rank=self.delta_rank) if self._branches else spec,)

    def selected(self, plan: Plan) -> tuple[str, ...]:
        stack = stack_of(plan.paths)
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
            if self._branches:
                self._examine_rank(found[first], sum(len(found[id_].paths) for id_ in (first, *others)))

    def _examine_rank(self, weight: PlannedWeight, layers: int) -> None:
        """Refuse products that hold as much as sharing saves."""
        if weight.kind != "linear":
            raise SettingError(
                f"ShareLayers: delta_rank={self.delta_rank} does not go with {weight.id}, an embedding: give skip={weight.id!r}"
            )
        saved = (layers - 1) * weight.rows * weight.cols
        most = (saved - 1) // (layers * (weight.rows + weight.cols))
        if layers > 1 and self.delta_rank > most:
            raise SettingError(
                f"ShareLayers: delta_rank={self.delta_rank} costs {weight.id} as many values as sharing saves: give at most {most}, "
                f"or skip={weight.id!r}"
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

        found = nn.weights(model)
        groups = [
            ids
            for ids in self._groups(context.targets)
            if len(ids) > 1 or (self._branches and len(found[ids[0]].spec.paths) > 1)
        ]
        for ids in context.progress(groups, label="sharing", total=len(groups)):
            handles = [nn.weights(model)[id_] for id_ in ids]
            came = [handle.dense().float().clone() for handle in handles]
            one = torch.stack(came).mean(0) if self.start == "mean" else came[0]
            nn.share(model, ids, one)
            if self._branches:
                of_layers = [
                    dense for handle, dense in zip(handles, came, strict=True) for _ in handle.spec.paths
                ]
                nn.branch(model, ids[0], _products(torch.stack(of_layers) - one, self.delta_rank))
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


def _products(left: "torch.Tensor", rank: int) -> "list[tuple[torch.Tensor, torch.Tensor]]":
    """For what the shared weight leaves of each layer's (c x n x m) the best product of this rank, both factors of about the same size.
    Where it leaves nothing, the first factor is zero and the second is not, so that both can learn."""
    import torch

    u, sigma, v = torch.linalg.svd(left, full_matrices=False)
    u, sigma, v = u[..., :rank], sigma[:, :rank], v[:, :rank]
    size = torch.where(sigma > 0, sigma.sqrt(), 1.0)
    return [*zip(u * (sigma / size)[:, None], size[..., None] * v, strict=True)]
