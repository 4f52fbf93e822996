"""What a pass promises about facts, and the static walk that judges a whole pipeline by these promises.

A contract is one declaration a pass. Legality is never a table of pairs of names: a plan is walked through
the contracts in order, and a step is refused when a part it selects lacks a fact it requires or has one it
forbids, in any form the weight may have by then.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import count
from typing import TYPE_CHECKING

from stackcomp.core.errors import ContractBroken, NothingToCompress, PipelineRefused, StackcompError
from stackcomp.core.facts import Fact, Facts, spell
from stackcomp.core.plan import Form, Plan, PlannedWeight, form, spell_form

if TYPE_CHECKING:
    from stackcomp.core.passes import Pass

TRIED = 5000  # steps that are tried for a legal order: about three seconds on a model of six layers


class Need(StrEnum):
    """Something a pass cannot work without."""

    CALIBRATION = "calibration"  # unlabelled text and a tokenizer
    LABELS = "labels"  # a task with labelled training examples
    TEXT = "text"  # a task; its training text is enough
    TEACHER = "teacher"  # the model as it came


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What a pass asks of every part it selects, and what it leaves.

    requires, forbids: facts each selected part must have, must not have; adds, removes: facts each selected
    part gains, loses; all others are preserved; becomes: the forms a selected weight may take when the pass
    rebuilds it (facts by part name), in place of adds and removes; may_leave: a selected weight may stay as
    it was (too small to gain; a setting that asks for nothing); finds: the pass works on the selected parts that
    have these facts and passes over the others, and there must be one that may have them; trains: the pass takes gradient steps over
    the whole model, and when it says nothing of facts it changes none and selects no part; needs: what the
    manager must be given.
    """

    requires: Facts = frozenset()
    forbids: Facts = frozenset()
    adds: Facts = frozenset()
    removes: Facts = frozenset()
    becomes: tuple[Mapping[str, Facts], ...] = ()
    may_leave: bool = False
    finds: Facts = frozenset()
    trains: bool = False
    needs: frozenset[Need] = frozenset()

    def __str__(self) -> str:
        """One line for the list of passes: `requires float, dense; forbids factor; needs calibration`."""
        said = [
            f"{name} {spell(words)}"
            for name, words in (
                ("requires", self.requires),
                ("forbids", self.forbids),
                ("adds", self.adds),
                ("removes", self.removes),
                ("works where it finds", self.finds),
            )
            if words
        ]
        said += [f"may leave [{spell_form(form(parts))}]" for parts in self.becomes]
        said += ["may leave a weight as it was"] if self.may_leave else []
        said += ["trains" if self.selects else "trains, keeps every fact"] if self.trains else []
        said += [f"needs {', '.join(sorted(self.needs))}"] if self.needs else []
        return "; ".join(said)

    @property
    def selects(self) -> bool:
        """Whether the pass works on the parts it selects; one that only trains works on all there are."""
        said = self.requires or self.forbids or self.adds or self.removes or self.becomes or self.finds
        return not self.trains or bool(said)

    def after(self, before: Form) -> frozenset[Form]:
        """The forms a selected weight of form `before` may have afterwards."""
        stays = {before} if self.may_leave else set[Form]()
        if self.becomes:
            return frozenset(stays | {form(parts) for parts in self.becomes})
        changed = frozenset((name, words - self.removes | self.adds) for name, words in before)
        return frozenset(stays | {changed})

    def found_in(self, before: Form) -> bool:
        """Whether a part of form `before` has the facts that the pass looks for."""
        return not self.finds or any(self.finds <= words for _, words in before)

    def objections(self, before: Form) -> Iterator[tuple[str, Fact, bool]]:
        """(part, fact, required) for every fact that is missing or forbidden in `before`."""
        for name, words in sorted(before):
            for fact in Fact:
                if fact in self.requires and fact not in words:
                    yield name, fact, True
                if fact in self.forbids and fact in words:
                    yield name, fact, False


def predict(passes: Sequence["Pass"], plan: Plan) -> list[Plan]:
    """The plans before the first pass and after each one; raises PipelineRefused for the first step that
    cannot follow.

    Raises NothingToCompress when a step selects no weight, SelectionEmpty when a glob matches none.
    """
    plans = [plan]
    for index, step in enumerate(passes):
        following = _follow(step, plans[-1])
        if following is None:
            raise PipelineRefused(_refusal(passes, plans, index))
        plans.append(following)
    return plans


def legal(passes: Sequence["Pass"], plan: Plan) -> bool:
    """Whether `passes` may run in this order on a model of this plan."""
    current: Plan | None = plan
    for step in passes:
        try:
            current = _follow(step, current)
        except NothingToCompress:
            return False
        if current is None:
            return False
    return True


def legal_order(passes: Sequence["Pass"], plan: Plan) -> tuple["Pass", ...] | None:
    """A legal order of the same passes, the first one in the order of declaration; None when there is none, or none is found in
    `TRIED` steps."""
    blind = set[tuple[tuple[int, ...], Plan]]()  # what is left to do there cannot be done; passes by identity
    tried = count()

    def search(
        done: tuple["Pass", ...], rest: tuple["Pass", ...], current: Plan
    ) -> tuple["Pass", ...] | None:
        if not rest:
            return done
        place = tuple(map(id, rest)), current
        if place in blind:
            return None
        for index, step in enumerate(rest):
            if step in rest[:index]:
                continue
            if next(tried) >= TRIED:
                return None
            try:
                following = _follow(step, current)
            except StackcompError:  # its globs or settings do not fit what is left by then
                continue
            if following is not None:
                found = search((*done, step), rest[:index] + rest[index + 1 :], following)
                if found is not None:
                    return found
        blind.add(place)
        return None

    return search((), tuple(passes), plan)


def verify(step: "Pass", predicted: Plan, found: Plan) -> None:
    """Compare the plan a pass predicted with the one it left; raises ContractBroken that names the pass and
    the layer."""
    expected = {weight.id: weight for weight in predicted.weights}
    real = {weight.id: weight for weight in found.weights}
    if expected.keys() != real.keys():
        odd = ", ".join(sorted(expected.keys() ^ real.keys()))
        raise ContractBroken(
            f"{step.name} changed which weights there are ({odd}), against its contract; mend the pass"
        )
    for id_, weight in real.items():
        (actual,) = weight.forms
        if actual not in expected[id_].forms:
            may = " | ".join(sorted(spell_form(parts) for parts in expected[id_].forms))
            raise ContractBroken(
                f"{step.name} broke its contract at {id_}: it left [{spell_form(actual)}] where its contract predicts [{may}]; "
                f"mend the pass or its contract"
            )


def _follow(step: "Pass", plan: Plan) -> Plan | None:
    """The plan after `step`, or None when the step is refused."""
    contract = step.contract
    chosen = set(step.selected(plan))
    if not contract.selects:
        return plan
    if not chosen:
        raise NothingToCompress(
            f"{step.name} selects no weight (only={step.only!r}, skip={step.skip!r}): the model has "
            f"{len(plan.weights)} weights; widen only= or narrow skip="
        )
    step.examine([weight for weight in plan.weights if weight.id in chosen])
    if not any(contract.found_in(before) for id_ in chosen for before in plan[id_].forms):
        return None
    weights: list[PlannedWeight] = []
    for weight in plan.weights:
        if weight.id not in chosen:
            weights.append(weight)
            continue
        if any(True for before in weight.forms for _ in contract.objections(before)):
            return None
        weights.append(
            replace(weight, forms=frozenset().union(*(contract.after(before) for before in weight.forms)))
        )
    return step.reshape(replace(plan, weights=tuple(weights)))


def _refusal(passes: Sequence["Pass"], plans: Sequence[Plan], index: int) -> str:
    """The whole message for the step at `index`, refused on plans[index]."""
    step, plan = passes[index], plans[index]
    chosen = step.selected(plan)
    found: dict[tuple[str, Fact, bool], list[str]] = {}
    for id_ in chosen:
        for objection in sorted(
            {item for before in plan[id_].forms for item in step.contract.objections(before)}
        ):
            found.setdefault(objection, []).append(id_)
    lines = [f"step {index + 1}, {step}, cannot run here:"]
    if not any(step.contract.found_in(before) for id_ in chosen for before in plan[id_].forms):
        lines.append(
            f"  it works on parts that are '{spell(step.contract.finds)}', and no selected weight has one"
        )
    for (part, fact, required), ids in found.items():
        what = f"requires '{fact}', which is missing" if required else f"forbids '{fact}', which is there"
        culprit = _culprit(passes, plans, index, ids[0], fact, required)
        lines.append(f"  it {what} on the {part} of {_some(ids)}{culprit}")
    order = legal_order(passes, plans[0])
    if order is None:
        lines.append(
            "  no legal order of these passes was found: drop one, or keep them apart with only= and skip="
        )
    else:
        lines.append("  a legal order: " + " -> ".join(str(item) for item in order))
    return "\n".join(lines)


def _culprit(
    passes: Sequence["Pass"], plans: Sequence[Plan], index: int, id_: str, fact: Fact, required: bool
) -> str:
    """Which earlier step took the required fact away from the weight, or brought the forbidden one."""

    origin = plans[index][id_].origin

    def fine(plan: Plan) -> bool:
        (weight,) = (weight for weight in plan.weights if weight.origin == origin)
        words = [facts for parts in weight.forms for _, facts in parts]
        return (
            all(fact in facts for facts in words) if required else not any(fact in facts for facts in words)
        )

    for earlier in reversed(range(index)):
        if fine(plans[earlier]) and not fine(plans[earlier + 1]):
            return f" since step {earlier + 1}, {passes[earlier].name}, {'took it away' if required else 'brought it'}"
    return " in the model as it came"


def _some(ids: Sequence[str], shown: int = 3) -> str:
    """The first few of `ids` and how many more there are."""
    more = f" and {len(ids) - shown} more" if len(ids) > shown else ""
    return ", ".join(ids[:shown]) + more
