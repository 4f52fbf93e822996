"""A shallower model: whole layers go."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from stackcomp import data, nn
from stackcomp.core.contract import Contract, Need
from stackcomp.core.errors import SettingError
from stackcomp.core.facts import Fact, facts
from stackcomp.core.families import stack_of
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.plan import Plan, PlannedWeight
from stackcomp.core.settings import one_of, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context


@dataclass(frozen=True, kw_only=True, repr=False)
class DropLayers(Pass):
    """Keep some of the model's layers as they are, and drop the others whole: an ordinary, shallower model of
    the same family, however its layers are stored.

    keep: how many layers stay; None is half of them, rounded up, or all that `which` names; which: "first", the
    layers nearest to the input, which the paper found best; "last"; "even", spread evenly up to and including
    the last one: layer i of k kept is layer round((i + 1) t / k) - 1 of t, whose output is also what Distill
    makes it follow; "influence", those that change most what passes through them, by 1 - E cos(h, h') of the hidden
    states that enter and leave a layer (ShortGPT), on `samples` calibration texts; or the layers themselves, as
    (0, 3, 5), in ascending order from 0.

    Layers are numbered anew, so globs of later passes speak of the new numbers. `only` and `skip` cannot be
    given. The model's family must be in the table of families. "influence" needs layers that are all stored alike and
    share no weight, so that it is known beforehand what any of them leaves.
    """

    keep: int | None = None
    which: str | tuple[int, ...] = "even"
    samples: int = 256

    paper: ClassVar[str] = (
        "Sajjad et al., arXiv:2004.03844; as a student's start: Sanh et al., DistilBERT, arXiv:1910.01108; "
        "influence: Men et al., ShortGPT, arXiv:2403.03853"
    )
    undivided: ClassVar[str] = "chooses layers by keep= and which="

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.which, str):
            one_of("which", self.which, ("even", "first", "last", "influence"))
        else:
            named = cast("tuple[Any, ...]", tuple(self.which))
            for place in named:
                whole("which", place, 0)
            if not named or list(named) != sorted(set(named)):
                raise SettingError(
                    f"which={self.which!r}: name at least one layer, in ascending order, each once"
                )
            object.__setattr__(self, "which", named)  # a list would make the pass unhashable
        whole("samples", self.samples, 1)
        if self.keep is not None:
            whole("keep", self.keep, 1)
            if not isinstance(self.which, str) and self.keep != len(self.which):
                raise SettingError(
                    f"keep={self.keep} and which={self.which!r} differ: leave keep out where layers are named"
                )

    @property
    def contract(self) -> Contract:
        return Contract(
            forbids=facts(Fact.BRANCH),
            needs=frozenset({Need.CALIBRATION}) if self.which == "influence" else frozenset(),
        )

    def selected(self, plan: Plan) -> tuple[str, ...]:
        stack = stack_of(plan.paths)
        return tuple(weight.id for weight in plan.weights if any(map(stack.split, weight.paths)))

    def examine(self, weights: Sequence[PlannedWeight]) -> None:
        if self.which != "influence":
            return
        stack = stack_of(path for weight in weights for path in weight.paths)
        forms: dict[str, PlannedWeight] = {}
        for weight in weights:
            places = [place for path in weight.paths if (place := stack.split(path))]
            first = forms.setdefault(places[0][1], weight)
            shared = len({number for number, _ in places}) > 1
            if shared or (first.rows, first.cols, first.forms) != (weight.rows, weight.cols, weight.forms):
                why = "belongs to several layers" if shared else f"is not stored as {first.id}"
                raise SettingError(
                    f"DropLayers: which='influence', and {weight.id} {why}: name the layers that stay, as which=(0, 2), or put "
                    "DropLayers first"
                )

    def bound(self, findings: Findings) -> "DropLayers":
        return replace(self, keep=None, which=tuple(findings["kept"]))

    def reshape(self, plan: Plan) -> Plan:
        stack = stack_of(plan.paths)
        places = {old: new for new, old in enumerate(self.kept(stack.count))}

        def moved(path: str) -> str | None:
            place = stack.split(path)
            if place is None:
                return path
            return f"{stack.path}.{places[place[0]]}.{place[1]}" if place[0] in places else None

        weights = [
            (weight, tuple(new for path in weight.paths if (new := moved(path)) is not None))
            for weight in plan.weights
        ]
        left = tuple(replace(weight, id=paths[0], paths=paths) for weight, paths in weights if paths)
        return replace(plan, weights=left)

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        # the ids of its targets do not tell how many layers there are: one weight may be that of several
        stack = stack_of(path for handle in nn.weights(model).values() for path in handle.spec.paths)
        kept = self.kept(stack.count)
        found: dict[str, list[float]] = {}
        if self.which == "influence":
            name = nn.absolute(model, stack.path)
            assert name is not None
            layers: Any = model.get_submodule(name)
            text = data.Calibration.of(model, context, self.samples)
            influence = text.influence(model, [*layers], progress=context.progress)
            most = sorted(range(stack.count), key=lambda place: -influence[place])[: len(kept)]
            kept, found = tuple(sorted(most)), {"influence": [round(share, 6) for share in influence]}
        nn.keep_layers(model, stack.path, kept)
        return {"kept": list(kept), "of": stack.count, **found}

    def kept(self, count: int) -> tuple[int, ...]:
        """The layers of `count` that stay, as far as it is known before the run: by influence, as many. Raises SettingError when there
        are too few."""
        if isinstance(self.which, tuple):
            if self.which[-1] >= count:
                raise SettingError(
                    f"DropLayers: which={self.which!r} names layer {self.which[-1]} of {count}: give 0 to {count - 1}"
                )
            return self.which
        keep = -(-count // 2) if self.keep is None else self.keep
        if keep > count:
            raise SettingError(f"DropLayers: keep={keep} of {count} layers: give at most {count}")
        if self.which in ("even", "influence"):
            return tuple(round((place + 1) * count / keep) - 1 for place in range(keep))
        return tuple(range(keep)) if self.which == "first" else tuple(range(count - keep, count))
