"""Every combination of passes that the contracts allow, in every order: the study that tells what a stack gives.

A *technique* is one of the named passes. *Recovery* (distillation into the same shape, fine-tuning) is no technique: every
pipeline gets the same steps of it, the singles and the model as it came too.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stackcomp.core.errors import SettingError, StackcompError, StudyRefused
from stackcomp.core.passes import Pass
from stackcomp.core.pipeline import Pipeline
from stackcomp.core.plan import Plan
from stackcomp.core.settings import one_of
from stackcomp.manager import check
from stackcomp.studies.study import Entry, Skipped, Study, line_of, plan_for

if TYPE_CHECKING:
    from stackcomp.data.task import Task

DENSE, LEFT_OUT = "dense", "-"
TAKEN = {DENSE: "the model without a technique", LEFT_OUT: "a technique that a search leaves out"}
THEN = " > "  # between the names of techniques in a key


@dataclass(frozen=True, kw_only=True)
class Technique:
    """A technique at one of its strengths; strength: the settings in which the strengths differ, "" where there is one."""

    name: str
    strength: str
    item: Pass

    def __str__(self) -> str:
        return f"{self.name} {self.strength}".strip()


def combinations(
    *,
    name: str,
    model: Entry | str | Path,
    task: "Task",
    passes: Mapping[str, Pass | Sequence[Pass]],
    seeds: Sequence[int] = (0,),
    again: Mapping[str, Sequence[int]] | None = None,
    recovery: Pass | None = None,
    recover: Literal["end", "each"] = "end",
    tokenizer: str | Path | None = None,
    split: str = "test",
    limit: int | None = None,
    latency: bool = False,
) -> Study:
    """The study of every subset of `passes` in every order, and at every strength, that the contracts allow on `model`.

    passes: by the name that keys and tables use; several passes of one class under one name are its strengths. again: further
    seeds of some pipelines, by the names that keys have without their seed: those that the sweep has found to matter. recovery:
    "end" puts it once behind every pipeline; "each" puts it behind every technique, and behind the last one as often as
    it takes for all pipelines to have as many of them as there are techniques. With one, the model as it came gets it, too.
    The others are those of `Entry`.

    Entries of one seed follow one another so that those with a common beginning are neighbours: each beginning is run once, and
    few checkpoints are kept at a time. What is illegal is in `Study.skipped`. The model's headers are read, no weight.

    Raises StudyRefused when a technique is in no legal pipeline, with the words of the contract, SettingError for wrong types and for
    pipelines in `again` that there are not.
    """
    one_of("recover", recover, ("end", "each"))
    steps = techniques(passes)
    plan = plan_for(model, task, [*(step.item for step in steps), *([recovery] if recovery else [])])
    legal: list[tuple[tuple[Technique, ...], Pipeline]] = []
    skipped: list[Skipped] = []
    for order in _orders(steps):
        pipeline = _pipeline(order, recovery, recover, len(passes))
        illegal = _refusal(order, pipeline, plan)
        if illegal is None:
            legal.append((order, pipeline))
        else:
            skipped.append(illegal)
    _refuse_unused(steps, legal, skipped)
    if recovery is not None:
        legal.insert(0, ((), _pipeline((), recovery, recover, len(passes))))
    named = {THEN.join(map(str, order)) or DENSE: (order, pipeline) for order, pipeline in legal}
    again = again or {}
    for key, more in again.items():
        if key not in named:
            raise SettingError(f"again: no legal pipeline of the study is named {key!r}: see --list")
        if isinstance(more, str) or not isinstance(more, Sequence):
            raise SettingError(
                f"again: {more!r} is no sequence of seeds of {key!r}: give one, such as (1, 2)"
            )
    entries = [
        Entry(
            key=f"{key}/{seed}",
            model=model,
            pipeline=pipeline,
            task=task,
            seed=seed,
            tokenizer=tokenizer,
            labels={"passes": [step.name for step in order], "strengths": [step.strength for step in order]},
            split=split,
            limit=limit,
            latency=latency,
        )
        for seed in dict.fromkeys((*seeds, *(seed for more in again.values() for seed in more)))
        for key, (order, pipeline) in named.items()
        if seed in seeds or seed in again.get(key, ())
    ]
    return Study(name=name, entries=(*line_of(model), *entries), skipped=tuple(skipped))


def techniques(passes: Mapping[str, Pass | Sequence[Pass]]) -> list[Technique]:
    """All techniques at all strengths. Raises SettingError for what is no technique."""
    found: list[Technique] = []
    said: Any = passes  # whatever a typo gives
    if not isinstance(said, Mapping):
        raise SettingError(f"passes={said!r}: give a mapping of names to passes")
    for name, given in passes.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+( [\w.-]+)*", name):
            raise SettingError(
                f"passes: {name!r} is no name of a technique: use words of letters, digits, . - _"
            )
        if name in TAKEN:
            raise SettingError(
                f"passes: {name!r} is what {TAKEN[name]} is called: give the technique another name"
            )
        items = [given] if isinstance(given, Pass) else [*given] if isinstance(given, Iterable) else []
        if not items or not all(isinstance(item, Pass) for item in items):
            raise SettingError(
                f"passes: {name!r} is {given!r}: give a pass, or its strengths as several passes"
            )
        if len({type(item) for item in items}) > 1 or len(set(items)) < len(items):
            raise SettingError(
                f"passes: the strengths of {name!r} are not one pass with different settings: give each pass its own name"
            )
        changed = [
            field.name for field in fields(items[0]) if len({getattr(item, field.name) for item in items}) > 1
        ]
        for item in items:
            strength = " ".join(f"{setting}={getattr(item, setting)}" for setting in changed)
            found.append(Technique(name=name, strength=strength, item=item))
    if not found:
        raise SettingError(f"passes={passes!r} holds no technique: give at least one")
    return found


def _orders(steps: Sequence[Technique], begun: tuple[Technique, ...] = ()) -> Iterator[tuple[Technique, ...]]:
    """Every ordered subset that goes on from `begun`, each technique at one strength; a beginning before what goes on from it."""
    for step in steps:
        if step.name not in {other.name for other in begun}:
            yield (*begun, step)
            yield from _orders(steps, (*begun, step))


def _pipeline(order: Sequence[Technique], recovery: Pass | None, recover: str, count: int) -> Pipeline:
    """The techniques in this order with their recovery, of which every pipeline has as much."""
    items = [step.item for step in order]
    if recovery is None:
        return Pipeline(*items)
    if recover == "end":
        return Pipeline(*items, recovery)
    rest = [recovery] * (count - len(items))
    return Pipeline(*(part for item in items for part in (item, recovery)), *rest)


def _refusal(order: Sequence[Technique], pipeline: Pipeline, plan: Plan) -> Skipped | None:
    """Why the pipeline is illegal on `plan`, with the first technique (or the recovery) that is refused; None when it is legal."""
    try:
        check(pipeline, plan)
    except StackcompError as error:
        said = [line.strip() for line in str(error).splitlines()]
        words = [line.removeprefix("it ") for line in said if line.startswith("it ")] or said[:1]
        return Skipped(
            passes=tuple(step.name for step in order),
            strengths=tuple(step.strength for step in order),
            refused=_refused(order, pipeline.flat(), plan),
            why="; ".join(words),
        )
    return None


def _refused(order: Sequence[Technique], passes: Sequence[Pass], plan: Plan) -> str:
    """The name of the first pass that may not run: that of its technique, or recovery."""
    left = list(order)
    for end, item in enumerate(passes, 1):
        name = left.pop(0).name if left and left[0].item is item else "recovery"
        if not _fits(passes[:end], plan):
            return name
    raise AssertionError("every beginning of an illegal pipeline is legal")


def _fits(passes: Sequence[Pass], plan: Plan) -> bool:
    """Whether the passes may run in this order on a model of this plan."""
    try:
        check(Pipeline(*passes), plan)
    except StackcompError:
        return False
    return True


def _refuse_unused(
    steps: Sequence[Technique],
    legal: Sequence[tuple[tuple[Technique, ...], Pipeline]],
    skipped: Sequence[Skipped],
) -> None:
    """Raise StudyRefused for a technique that is in no legal pipeline: its name, or its globs, are wrong."""
    for step in steps:
        if not any(step in order for order, _ in legal):
            (alone,) = (
                one for one in skipped if (one.passes, one.strengths) == ((step.name,), (step.strength,))
            )
            raise StudyRefused(
                f"{str(step)!r} is in no legal pipeline; alone: {alone.refused} {alone.why}; leave it out, or give it other "
                "weights with only="
            )
