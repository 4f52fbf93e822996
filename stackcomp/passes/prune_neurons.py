"""Narrower feed-forward parts: whole neurons go."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from stackcomp import data, nn, training
from stackcomp.core.contract import Contract, Need
from stackcomp.core.errors import UnsupportedModel
from stackcomp.core.facts import Fact, facts
from stackcomp.core.families import feed_forward_of
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.plan import Plan, PlannedWeight
from stackcomp.core.settings import whole, within

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context


@dataclass(frozen=True, kw_only=True, repr=False)
class PruneNeurons(Pass):
    """Keep the most important neurons of every layer's feed-forward part, the same number in each, and drop the others whole: an ordinary
    model of the same family with a smaller intermediate size. Put Distill after it.

    The importance of neuron j is E |sum_t x_tj dL/dx_tj| over labelled training examples, x_tj its activation at token t: to first order,
    what the loss of an example changes by when the neuron is silent. Nothing makes up for a neuron that goes.

    keep: share of the neurons that stay, in (0, 1], rounded to a whole number and at least one; 1 does nothing. samples: labelled training
    examples, a fixed random subset; batch_size: of one gradient, which changes nothing but the time. `only` and `skip` cannot be given,
    since a config has one size for all layers. Layers that share their weights keep the same neurons. The model's family must be in the
    table of families.

    Where we differ from the papers: their units are the channels of convolutions and the heads of attention.
    """

    keep: float = 0.5
    samples: int = 512
    batch_size: int = 32

    paper: ClassVar[str] = "Molchanov et al., arXiv:1611.06440; of heads: Michel et al., arXiv:1905.10650"
    undivided: ClassVar[str] = "makes all layers equally narrow"
    idle: ClassVar[dict[str, Any]] = {"keep": 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        within("keep", self.keep, 0.0, 1.0, above=True)
        whole("samples", self.samples, 1)
        whole("batch_size", self.batch_size, 1)

    @property
    def contract(self) -> Contract:
        return Contract(
            requires=facts(Fact.FLOAT, Fact.DENSE),
            forbids=facts(Fact.FACTOR),
            needs=frozenset({Need.LABELS}) if self.keep < 1 else frozenset(),
        )

    def selected(self, plan: Plan) -> tuple[str, ...]:
        stack, part = feed_forward_of(path for weight in plan.weights for path in weight.paths)
        inside = {*part.into, part.out_of}
        return tuple(
            weight.id
            for weight in plan.weights
            if any((place := stack.split(path)) and place[1] in inside for path in weight.paths)
        )

    def examine(self, weights: Sequence[PlannedWeight]) -> None:
        _parts({weight.id: weight.paths for weight in weights})

    def reshape(self, plan: Plan) -> Plan:
        found = {weight.id: weight for weight in plan.weights}
        chosen = self.selected(plan)
        narrower = dict(found)
        for out_of, into in _parts({id_: found[id_].paths for id_ in chosen}).items():
            count = self._count(found[out_of].cols)
            narrower[out_of] = replace(found[out_of], cols=count)
            narrower |= {id_: replace(found[id_], rows=count) for id_ in into}
        return Plan(tuple(narrower.values()))

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        if self.keep == 1.0:
            return {}
        handles = {id_: handle for id_, handle in nn.weights(model).items() if id_ in context.targets}
        parts = _parts({id_: handle.spec.paths for id_, handle in handles.items()})
        importance = self._importance(model, {id_: handles[id_].modules for id_ in parts}, context)
        share: dict[str, float] = {}
        neurons = kept = 0
        for out_of, into in parts.items():
            scores = importance[out_of]
            neurons, kept = len(scores), self._count(len(scores))
            best = scores.topk(kept)
            nn.keep_neurons(model, into, out_of, best.indices.sort().values.tolist())
            share[out_of] = float(best.values.sum() / scores.sum().clamp_min(1e-30))
        _, part = feed_forward_of(path for handle in handles.values() for path in handle.spec.paths)
        setattr(model.config, part.size, kept)
        return {"kept": kept, "of": neurons, "share_of_importance": share}

    def _count(self, neurons: int) -> int:
        """How many of a layer's neurons stay."""
        return max(1, round(self.keep * neurons))

    def _importance(
        self, model: "PreTrainedModel", modules: Mapping[str, Any], context: "Context"
    ) -> "dict[str, torch.Tensor]":
        """The importance of the neurons that each weight reads."""
        assert context.task is not None
        batches = data.labelled_batches(context, self.samples, batch_size=self.batch_size, label="importance")
        return data.input_importance(model, modules, batches, training.TaskLoss(task=context.task))


def _parts(paths: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """The weights into the neurons that each weight reads, by id. Raises UnsupportedModel where one is shared by layers that do not share
    the other."""
    stack, part = feed_forward_of(path for several in paths.values() for path in several)
    layers: dict[str, dict[str, set[int]]] = {}  # by name in the layer and by id
    for id_, several in paths.items():
        for path in several:
            place = stack.split(path)
            assert place is not None
            layers.setdefault(place[1], {}).setdefault(id_, set()).add(place[0])
    parts: dict[str, list[str]] = {}
    for out_of, used in layers[part.out_of].items():
        for name in part.into:
            into = next((id_ for id_, found in layers[name].items() if found == used), None)
            if into is None:
                raise UnsupportedModel(
                    f"{out_of}: layers {sorted(used)} share it and do not share their {name}: share both or neither"
                )
            parts.setdefault(out_of, []).append(into)
    return parts
