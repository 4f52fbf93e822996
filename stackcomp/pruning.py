"""Post-training pruning: of single values (how a sparsity is spelt, how what it leaves is stored, how inputs are looked at), and of whole
units of every layer.

What a pass adds is which entries stay, or what a unit is.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from stackcomp import data, nn, training
from stackcomp.core.contract import Contract, Need
from stackcomp.core.errors import SettingError
from stackcomp.core.facts import Fact, facts
from stackcomp.core.families import Part, Stack, between, head_features
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.plan import Plan, PlannedWeight
from stackcomp.core.settings import groups_fit, have_inputs, sparsity_groups, whole, within
from stackcomp.core.spec import WeightSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context


@dataclass(frozen=True, kw_only=True, repr=False)
class PruningPass(Pass):
    """A pass that stores only some values of each selected weight, beside a packed support.

    sparsity: share of each matrix that is dropped, in [0, 1), 0 does nothing: stored as the kept values and a
    bitmap (1 bit an entry); or "n:m", which keeps n of every m consecutive inputs of a row, stored with
    log2 C(m, n) bits a group.
    """

    sparsity: float | str = 0.5

    idle: ClassVar[Mapping[str, Any]] = {"sparsity": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._groups

    @property
    def _groups(self) -> tuple[int, int] | None:
        """(n, m) of an "n:m" sparsity."""
        return sparsity_groups(self.sparsity)

    @property
    def _block(self) -> tuple[int, int]:
        """The shape of what is kept or dropped together."""
        return 1, 1

    @property
    def _share(self) -> float:
        """The share that is kept, of a sparsity that is a share."""
        return 1 - float(self.sparsity)

    @property
    def contract(self) -> Contract:
        if self.sparsity == 0:
            return Contract(requires=facts(Fact.FLOAT, Fact.DENSE))
        return Contract(
            requires=facts(Fact.FLOAT, Fact.DENSE),
            forbids=facts(Fact.FACTOR) if self._groups or self._block != (1, 1) else facts(),
            adds=facts(Fact.SPARSE),
            removes=facts(Fact.DENSE),
        )

    def stores(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        if self.sparsity == 0:
            return (spec,)
        kept = self._groups or {part: self._kept(spec, part) for part in spec.matrices}
        return (spec.pruned(kept, self._block),)

    def _kept(self, spec: WeightSpec, part: str) -> int:
        """How many entries of a matrix stay, of a sparsity that is a share."""
        matrix, area = spec.matrices[part], prod(self._block)
        return area * max(1, round(matrix.rows * matrix.cols // area * self._share))

    def examine(self, weights: Sequence[PlannedWeight]) -> None:
        groups_fit(self.sparsity, weights)


@dataclass(frozen=True, kw_only=True, repr=False)
class CalibratedPruningPass(PruningPass):
    """A pruning pass that looks at what flows into each weight, on unlabelled text.

    Of a low-rank layer both factors are pruned, the second by what the first, pruned, lets through. All layers are calibrated at
    once, on the model as the pass finds it, where the papers calibrate each on the layers compressed before it. samples:
    calibration texts.
    """

    samples: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("samples", self.samples, 1)

    @property
    def contract(self) -> Contract:
        asked = super().contract
        return replace(
            asked,
            forbids=asked.forbids | {Fact.KRONECKER},
            needs=frozenset({Need.CALIBRATION} if self.sparsity else ()),
        )

    def examine(self, weights: Sequence[PlannedWeight]) -> None:
        super().examine(weights)
        have_inputs(weights, "MagnitudePrune")

    def _kept(self, spec: WeightSpec, part: str) -> int:
        matrix = spec.matrices[part]
        pieces = spec.blocks if part == "basis" else 1
        n, m = matrix.rows // pieces, matrix.cols
        return pieces * self._kept_of(*((m, n) if spec.transposed else (n, m)))

    @abstractmethod
    def _kept_of(self, rows: int, cols: int) -> int:
        """How many entries of a weight of this shape stay, of a sparsity that is a share."""

    @abstractmethod
    def _choose(self, weight: "torch.Tensor", moment: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """New values of a weight (n x m), and which of them to keep, given the second moment of its inputs (m x m)."""

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        if self.sparsity == 0:
            return {}
        moments = data.input_moments(model, context, self.samples)
        for id_ in context.progress(context.targets, label="pruning"):
            nn.prune(model, id_, self._choose, moment=moments[id_], groups=self._groups)
        return {}


@dataclass(frozen=True, kw_only=True, repr=False)
class NarrowingPass(Pass):
    """A pass that keeps the most important units of one part of every layer, and drops the others whole.

    A unit is a run of inputs of the weight out of the part, and what makes these inputs. Its importance is E |sum_tj x_tj dL/dx_tj| over
    labelled training examples, x_tj its inputs j at token t: to first order, what the loss of an example changes by without it.

    keep: share of a layer's units that stay, in (0, 1], rounded to a whole number and at least one; 1 does nothing; or a share for each
    layer, from the first on. samples: labelled training examples, a fixed random subset; batch_size: of one gradient, which changes nothing
    but the time.
    """

    keep: float | tuple[float, ...] = 0.5
    samples: int = 512
    batch_size: int = 32

    undivided: ClassVar[str] = "narrows layers by the share that keep= names for each"
    idle: ClassVar[Mapping[str, Any]] = {"keep": 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.keep, list):
            object.__setattr__(self, "keep", tuple(self.keep))  # a list would make the pass unhashable
        for share in self._asked:
            within("keep", share, 0.0, 1.0, above=True)
        whole("samples", self.samples, 1)
        whole("batch_size", self.batch_size, 1)

    @property
    def contract(self) -> Contract:
        return Contract(
            requires=facts(Fact.FLOAT, Fact.DENSE),
            forbids=facts(Fact.FACTOR),
            needs=frozenset() if self._does_nothing else frozenset({Need.LABELS}),
        )

    @property
    def _asked(self) -> tuple[float, ...]:
        """The share of every layer, or the one that is all layers'."""
        return self.keep if isinstance(self.keep, tuple) else (self.keep,)

    @property
    def _does_nothing(self) -> bool:
        return {*self._asked} == {1.0}

    @abstractmethod
    def _part(self, paths: Iterable[str]) -> tuple[Stack, Part]:
        """The stack that these paths of weights are in, and the part of its layers."""

    @abstractmethod
    def _features(self, of_head: int | None) -> int:
        """How many inputs make a unit, in a model whose heads have so many features."""

    @abstractmethod
    def _cut(self, model: "PreTrainedModel", kept: Mapping[str, Sequence[int]]) -> None:
        """Leave of the units of every layer those that `kept` names by the id of the weight out of them."""

    def selected(self, plan: Plan) -> tuple[str, ...]:
        stack, part = self._part(plan.paths)
        inside = {*part.into, part.out_of}
        return tuple(
            weight.id
            for weight in plan.weights
            if any((place := stack.split(path)) and place[1] in inside for path in weight.paths)
        )

    def examine(self, weights: Sequence[PlannedWeight]) -> None:
        self._shares({weight.id: weight.paths for weight in weights})

    def reshape(self, plan: Plan) -> Plan:
        found = {weight.id: weight for weight in plan.weights}
        narrower = dict(found)
        features = self._features(plan.head_features)
        paths = {id_: found[id_].paths for id_ in self.selected(plan)}
        shares = self._shares(paths)
        for out_of, into in self._between(paths).items():
            units = found[out_of].cols // features
            kept = _count(shares[out_of], units)
            narrower[out_of] = replace(found[out_of], cols=kept * features)
            narrower |= {id_: replace(found[id_], rows=found[id_].rows * kept // units) for id_ in into}
        return replace(plan, weights=tuple(narrower.values()))

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        if self._does_nothing:
            return {}
        importance = self._importance(model, context)
        shares = self._shares({id_: handle.spec.paths for id_, handle in nn.weights(model).items()})
        best = {id_: scores.topk(_count(shares[id_], len(scores))) for id_, scores in importance.items()}
        self._cut(model, {id_: found.indices.sort().values.tolist() for id_, found in best.items()})
        nn.say_widths(model)
        share = {
            id_: float(found.values.sum() / importance[id_].sum().clamp_min(1e-30))
            for id_, found in best.items()
        }
        return {
            "kept": {id_: len(found.indices) for id_, found in best.items()},
            "of": {id_: len(scores) for id_, scores in importance.items()},
            "share_of_importance": share,
        }

    def _importance(self, model: "PreTrainedModel", context: "Context") -> "Mapping[str, torch.Tensor]":
        """The importance of the units of every layer, by the id of the weight out of them."""
        assert context.task is not None
        handles = nn.weights(model)
        parts = self._between({id_: handles[id_].spec.paths for id_ in context.targets})
        batches = data.labelled_batches(
            context, model, self.samples, batch_size=self.batch_size, label="importance"
        )
        return data.input_importance(
            model,
            {id_: handles[id_].modules for id_ in parts},
            batches,
            training.TaskLoss(task=context.task),
            together=self._features(head_features(model.config.to_dict())),
        )

    def _between(self, paths: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
        """The weights into the units that each weight reads, by id."""
        return between(*self._part(path for several in paths.values() for path in several), paths)

    def _shares(self, paths: Mapping[str, Iterable[str]]) -> dict[str, float]:
        """The share that stays of the units of every layer, by the id of the weight out of them. Raises SettingError where there is not one
        for each layer, or layers that share their weights have unlike ones."""
        stack, part = self._part(path for several in paths.values() for path in several)
        shares = self._asked if isinstance(self.keep, tuple) else self._asked * stack.count
        if len(shares) != stack.count:
            raise SettingError(
                f"{self.name}: keep={self.keep} has {len(shares)} shares for {stack.count} layers: give one for each, or one number for all"
            )
        found: dict[str, float] = {}
        for out_of in self._between(paths):
            places = (stack.split(path) for path in paths[out_of])
            layers = [place[0] for place in places if place and place[1] == part.out_of]
            found[out_of] = shares[layers[0]]
            if {shares[layer] for layer in layers} != {found[out_of]}:
                raise SettingError(
                    f"{self.name}: keep={self.keep}, and layers {layers} share {out_of}: give them one share"
                )
        return found


def _count(share: float, units: int) -> int:
    """How many of a layer's units stay."""
    return max(1, round(share * units))
