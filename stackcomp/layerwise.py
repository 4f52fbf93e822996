"""Post-training factorization, layer by layer: calibrate once, price every layer, split one budget, rebuild.

    text -> moments of inputs and of gradients -> candidates (bytes, error) of each layer -> allocation ->
    factors

What a pass adds is how a layer is priced and how it is built; the flow, and with it the fairness between
methods, is shared. Methods that are published without a budget share a simpler flow: one ratio for every layer.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from stackcomp import data, nn, ops
from stackcomp.core.contract import Contract, Need
from stackcomp.core.errors import UnreachableRatio
from stackcomp.core.facts import Fact, Facts, facts
from stackcomp.core.ledger import LEFT_DENSE
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.plan import PlannedWeight
from stackcomp.core.settings import have_inputs, whole, within
from stackcomp.core.spec import WeightSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context
    from stackcomp.ops.allocate import Candidate
    from stackcomp.ops.factorize import DenseSparseFactors
    from stackcomp.ops.whiten import Whitener


FACTOR = facts(Fact.FLOAT, Fact.TRAINABLE, Fact.FACTOR, Fact.DENSE)  # a part of a low-rank weight
FEW_DIRECTIONS = 20.0  # effective rank of the gradients at a layer's outputs up to which they span few, as those of a classifier do
LOCAL_SPREAD = 1.3  # where an error is that of a layer's own outputs
MANY_SPREAD = 2.0  # where it is that of the model's output, and gradients span many directions
SENSITIVITY_TEXTS = 1024  # gradients cost more than inputs, and rank layers well with fewer texts


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Which errors of a weight (n x m) count: `inputs` the moment of what flows in, `outputs` that of the gradients flowing back, plain
    where they are None; `mean`: of what flows in (m), where the layer's bias is to take up the mean of an error."""

    inputs: "Whitener | None" = None
    outputs: "Whitener | None" = None
    mean: "torch.Tensor | None" = None


@dataclass(frozen=True, kw_only=True)
class Layer(Metric):
    """A weight (n x m) with the metric of its errors.

    size_bytes: of the dense weight; value_bytes: of one value, as it is priced; unread: nothing that the model says depends on the
    layer, as gradients tell.
    """

    weight: "torch.Tensor"
    value_bytes: float
    unread: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes of the dense weight."""
        return int(self.weight.numel() * self.value_bytes)

    def error(self, factors: "DenseSparseFactors") -> float:
        """What the factors leave of the weight, in its metric."""
        return ops.metric_error(self.weight - factors.product(), inputs=self.inputs, outputs=self.outputs)

    @property
    def few_directions(self) -> bool:
        """Whether the gradients at its outputs span few directions: then the metric is sharp."""
        return self.outputs is not None and self.outputs.effective_rank <= FEW_DIRECTIONS

    @cached_property
    def scale(self) -> float:
        """What errors are divided by to compare layers: 1 where the metric reaches to the model's output, where those of an unread layer
        cost nothing, else the layer's own energy."""
        if self.unread:
            return inf
        if self.outputs is not None:
            return 1.0
        return max(ops.metric_error(self.weight, inputs=self.inputs), 1e-30)


class MetricSettings(Protocol):
    """What a pass says of the metric of its errors: see `FactorizingPass`."""

    @property
    def data_aware(self) -> bool: ...
    @property
    def sensitivity(self) -> bool: ...
    @property
    def samples(self) -> int: ...
    @property
    def damping(self) -> float: ...


def error_metrics(
    asked: MetricSettings,
    model: "PreTrainedModel",
    handles: "Mapping[str, nn.WeightHandle]",
    context: "Context",
) -> dict[str, Metric]:
    """The metric of each weight on calibration text, as a pass asks for it."""
    if not asked.data_aware:
        return dict.fromkeys(handles, Metric())
    modules = {id_: handle.modules for id_, handle in handles.items()}
    text = data.Calibration.of(model, context, asked.samples)
    moments = text.second_moments(model, modules, progress=context.progress)
    gradients: dict[str, Any] = {}
    if asked.sensitivity:
        some = data.Calibration.of(model, context, asked.samples, first=SENSITIVITY_TEXTS)
        gradients = data.gradient_moments(some, model, modules, seed=context.seed, progress=context.progress)
        gradients = {id_: moment for id_, moment in gradients.items() if moment is not None and moment.any()}
    found: dict[str, Metric] = {}
    for id_, handle in handles.items():
        inputs, mean = data.input_metric(handle, moments[id_], damping=asked.damping)
        moment = gradients.get(id_)
        outputs = None if moment is None else ops.whitener(moment, damping=10 * asked.damping)
        found[id_] = Metric(inputs=inputs, outputs=outputs, mean=mean)
    return found


@dataclass(frozen=True, kw_only=True, repr=False)
class FactorizingPass(Pass):
    """A pass that replaces weights by factors under one budget for all of them.

    ratio: dense bytes / stored bytes of all selected weights together, indices counted, at least 1, where 1
    does nothing; data_aware: minimise the error of each layer's outputs on calibration text rather than that
    of its weights; sensitivity: weigh these outputs by what the model's own output makes of them (gradients,
    but no labels and no training); samples: calibration texts; damping: share of the mean diagonal that is
    added to a moment of inputs; spread: how far the ratio of one layer may be from that of all, as a factor
    of at least 1: 1 gives every layer the same ratio (nothing is shared out); None takes 1.3 without sensitivity, where errors are
    local and a layer that they call cheap may not be, 2 with it, and no limit where the gradients at most layers span few directions;
    value_bits: bits that a value will take in the end, scales included, where a later pass rounds it (4.5 for 4 bits in groups of 32):
    the ratio then counts these bytes, of the dense weight too, so that indices have their true share, and dense-sparse factors are
    made to be rounded; None: bits as they are.
    """

    ratio: float = 2.0
    data_aware: bool = True
    sensitivity: bool = True
    samples: int = 2048
    damping: float = 1e-3
    spread: float | None = None
    value_bits: float | None = None

    idle: ClassVar[Mapping[str, Any]] = {"ratio": 1.0}
    becomes: ClassVar[tuple[Mapping[str, Facts], ...]] = ({"basis": FACTOR, "coefficients": FACTOR},)

    def __post_init__(self) -> None:
        super().__post_init__()
        within("ratio", self.ratio, 1.0, 10_000.0)
        within("damping", self.damping, 0.0, 1.0, above=True)
        whole("samples", self.samples, 1)
        if self.spread is not None:
            within("spread", self.spread, 1.0)
        if self.value_bits is not None:
            within("value_bits", self.value_bits, 1.0, 32.0)

    @property
    def contract(self) -> Contract:
        return Contract(
            requires=facts(Fact.FLOAT, Fact.DENSE),
            forbids=facts(Fact.FACTOR),
            becomes=self.becomes if self.ratio > 1 else (),
            may_leave=True,
            needs=frozenset({Need.CALIBRATION}) if self.data_aware and self.ratio > 1 else frozenset(),
        )

    @abstractmethod
    def _priced(self, layer: Layer) -> "list[Candidate]":
        """Ways to store the layer, with their bytes, predicted error in its metric, and choice."""

    @abstractmethod
    def _build(self, layer: Layer, choice: Any, seed: int) -> "tuple[DenseSparseFactors, Any]":
        """The factors of the layer for a choice, and that choice, or one of no more bytes that turned out better."""

    @abstractmethod
    def _smallest(self, rows: int, cols: int) -> float:
        """Values of the smallest form of a rows x cols weight, indices counted as parts of a value."""

    @abstractmethod
    def _forms(self, spec: WeightSpec) -> Iterator[WeightSpec]:
        """Every way in which a whole weight may be factorized."""

    def stores(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        return (spec,) if self.ratio == 1 else (spec, *self._forms(spec))

    def budget(self, specs: Sequence[WeightSpec]) -> float | None:
        return None if self.ratio == 1 else sum(map(self.counted, specs)) / self.ratio

    def counted(self, spec: WeightSpec) -> float:
        return sum(
            matrix.count * (self.value_bits or matrix.bits) / 8 + matrix.index_bytes
            for matrix in spec.matrices.values()
        )

    @property
    def undetermined(self) -> str:
        return "" if self.ratio == 1 else "shares one budget out over the weights by their errors"

    def examine(self, weights: Sequence[PlannedWeight]) -> None:
        if self.data_aware and self.ratio > 1:
            have_inputs(weights, "data_aware=False")
        self._examine_ratio(weights)

    def _examine_ratio(self, weights: Sequence[PlannedWeight]) -> None:
        """Refuse a ratio that the smallest forms of the weights do not reach."""
        dense = sum(weight.rows * weight.cols for weight in weights)
        least = sum(
            min(weight.rows * weight.cols, self._smallest(weight.rows, weight.cols)) for weight in weights
        )
        if self.ratio > dense / least:
            raise UnreachableRatio(
                f"{self.name}: ratio={self.ratio:g} cannot be reached on these {len(weights)} weights: the largest is {dense / least:.2f}"
            )

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        if self.ratio == 1.0:
            return {}
        layers = self._layers(model, context)
        candidates = {
            id_: [
                ops.Candidate(size_bytes=layer.size_bytes, error=0.0, choice=None),
                *(
                    replace(option, error=option.error / layer.scale)
                    for option in self._priced(layer)
                    if option.size_bytes < layer.size_bytes
                ),
            ]
            for id_, layer in context.progress(layers.items(), label="pricing", total=len(layers))
        }
        built: dict[str, Any] = {}
        taken = self._share(candidates, layers)
        for id_, layer in context.progress(layers.items(), label="factorizing", total=len(layers)):
            if taken[id_].choice is not None:
                factors, built[id_] = self._build(layer, taken[id_].choice, context.seed)
                _replace(model, id_, layer, factors)
        after = nn.weights(model)
        return {
            "layers": {
                id_: f"{built[id_]}, {layer.size_bytes / self.counted(after[id_].spec):.2f}x{self._remark(layer)}"
                if id_ in built
                else f"{LEFT_DENSE}: too small to gain, or better spent elsewhere"
                for id_, layer in layers.items()
            }
        }

    def _remark(self, layer: Layer) -> str:
        """What to say of a layer that nothing reads, and of a moment of inputs that had to be damped more than was asked for."""
        if layer.unread:
            return "; nothing that the model says depends on it"
        if layer.inputs is None or layer.inputs.damping <= self.damping:
            return ""
        return (
            f"; its inputs span {layer.inputs.effective_rank:.0f} of {layer.weight.shape[1]} directions: damping raised to "
            f"{layer.inputs.damping:g}"
        )

    def _share(
        self, candidates: "dict[str, list[Candidate]]", layers: Mapping[str, Layer]
    ) -> "dict[str, Candidate]":
        """The candidate of each layer; the first of each leaves it dense."""
        budget = int(sum(layer.size_bytes for layer in layers.values()) / self.ratio)
        return ops.allocate(self._near(candidates, layers, budget), budget)

    def _near(
        self, candidates: "dict[str, list[Candidate]]", layers: Mapping[str, Layer], budget: int
    ) -> "dict[str, list[Candidate]]":
        """The candidates whose own ratio is within `spread` of the ratio of all; a layer that has none is
        left dense. All candidates where no budget can be kept so."""
        if self.spread == 1.0:
            return self._even(candidates, layers, budget)
        spread = self.spread or _spread(layers.values())
        low, high = self.ratio / spread, self.ratio * spread
        near: dict[str, list[Candidate]] = {}
        for id_, options in candidates.items():
            kept = [option for option in options if low <= layers[id_].size_bytes / option.size_bytes <= high]
            near[id_] = kept or options[:1]
        least = sum(min(option.size_bytes for option in options) for options in near.values())
        return near if least <= budget else candidates

    def _even(
        self, candidates: "dict[str, list[Candidate]]", layers: Mapping[str, Layer], budget: int
    ) -> "dict[str, list[Candidate]]":
        """For each layer the best candidate that keeps the ratio. A layer that has none is left dense, and
        the ratio of all others rises by what it costs."""

        def keeping(id_: str, ratio: float) -> "list[Candidate]":
            kept = [opt for opt in candidates[id_] if layers[id_].size_bytes >= ratio * opt.size_bytes]
            return sorted(kept, key=lambda option: option.error)[:1]

        able = {id_ for id_ in candidates if keeping(id_, self.ratio)}
        left = budget - sum(layers[id_].size_bytes for id_ in candidates.keys() - able)
        ratio = sum(layers[id_].size_bytes for id_ in able) / max(left, 1)
        return {id_: keeping(id_, ratio) or options[:1] for id_, options in candidates.items()}

    def _layers(self, model: "PreTrainedModel", context: "Context") -> dict[str, Layer]:
        """The selected weights with their metrics."""
        handles = {id_: handle for id_, handle in nn.weights(model).items() if id_ in context.targets}
        found = error_metrics(self, model, handles, context)
        weighed = any(metric.outputs is not None for metric in found.values())
        return {
            id_: Layer(
                **vars(found[id_]),
                weight=handle.dense().float(),
                value_bytes=(self.value_bits or handle.spec.matrices["weight"].bits) / 8,
                unread=weighed and found[id_].outputs is None,
            )
            for id_, handle in handles.items()
        }


@dataclass(frozen=True, kw_only=True, repr=False)
class WeightedSVDPass(Pass):
    """A pass that replaces each selected weight W (n x m) by a product of rank r: a truncated SVD in which rows, or columns, count by
    their importance.

    ratio: dense bytes / stored bytes of each layer, at least 1, where 1 does nothing: r = nm / (ratio (n + m)) rounded down. Nothing is
    shared out over layers; one for which that is no whole rank is left dense.
    """

    ratio: float = 2.0

    idle: ClassVar[Mapping[str, Any]] = {"ratio": 1.0}
    needs: ClassVar[Need]  # what the importance is measured on
    of_columns: ClassVar[bool] = False  # whether it is that of columns

    def __post_init__(self) -> None:
        super().__post_init__()
        within("ratio", self.ratio, 1.0, 10_000.0)

    @property
    def contract(self) -> Contract:
        return Contract(
            requires=facts(Fact.FLOAT, Fact.DENSE),
            forbids=facts(Fact.FACTOR),
            becomes=({"basis": FACTOR, "coefficients": FACTOR},) if self.ratio > 1 else (),
            may_leave=True,
            needs=frozenset({self.needs}) if self.ratio > 1 else frozenset(),
        )

    def stores(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        rank = ops.rank_of_ratio(spec.rows, spec.cols, self.ratio)
        return (spec.as_product(atoms=rank) if rank and self.ratio > 1 else spec,)

    def examine(self, weights: Sequence[PlannedWeight]) -> None:
        largest = max(weight.rows * weight.cols / (weight.rows + weight.cols) for weight in weights)
        if self.ratio > 1 and self.ratio > largest:
            raise UnreachableRatio(
                f"{self.name}: ratio={self.ratio:g} leaves no rank to any of these {len(weights)} weights: the largest is {largest:.2f}"
            )

    @abstractmethod
    def _importance(
        self, model: "PreTrainedModel", handles: "Mapping[str, nn.WeightHandle]", context: "Context"
    ) -> "Mapping[str, torch.Tensor]":
        """How much each row (or column) of these weights counts, at least 0, by id."""

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        if self.ratio == 1.0:
            return {}
        handles = {id_: handle for id_, handle in nn.weights(model).items() if id_ in context.targets}
        ranks = {
            id_: ops.rank_of_ratio(handle.spec.rows, handle.spec.cols, self.ratio)
            for id_, handle in handles.items()
        }
        chosen = {id_: handle for id_, handle in handles.items() if ranks[id_]}
        importance = self._importance(model, chosen, context)
        for id_, handle in context.progress(chosen.items(), label="factorizing", total=len(chosen)):
            weight = handle.dense().float()
            left, right = ops.low_rank_of_rows(
                weight.T if self.of_columns else weight,
                rank=ranks[id_],
                importance=importance[id_].to(weight),
            )
            left, right = (right.T, left.T) if self.of_columns else (left, right)
            nn.factorize(model, id_, basis=right, values=left)
        return {
            "layers": {
                id_: f"rank {rank}" if rank else f"{LEFT_DENSE}: too small to gain"
                for id_, rank in ranks.items()
            }
        }


def _spread(layers: Iterable[Layer]) -> float:
    """How far the ratio of one of these layers may be from that of all, as a factor, where the pass does not say."""
    ranks = [layer.outputs.effective_rank for layer in layers if layer.outputs is not None]
    if not ranks:
        return LOCAL_SPREAD
    return inf if median(ranks) <= FEW_DIRECTIONS else MANY_SPREAD


def _replace(model: "PreTrainedModel", id_: str, layer: Layer, factors: "DenseSparseFactors") -> None:
    """Put the factors in the place of the weight; its bias takes up the mean of the error, E[(W - W') x]."""
    import torch

    sparse = factors.support[0].numel() < factors.basis[..., 0].numel()
    nn.factorize(
        model,
        id_,
        basis=factors.basis.flatten(0, 1),
        values=factors.values if sparse else factors.values.flatten(1),
        support=factors.support if sparse else None,
        transposed=factors.transposed,
    )
    if layer.mean is not None:
        (module,) = nn.weights(model)[id_].modules
        bias: Any = module.bias
        with torch.no_grad():
            bias += ((layer.weight - factors.product()) @ layer.mean).to(bias)
