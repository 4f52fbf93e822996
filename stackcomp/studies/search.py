"""Search: the smallest file that loses at most so many points, or scores at least so much, or the best score within so many bytes.

Pipelines are a strength, or nothing, of each technique, in the order in which these are given, or in any. Optuna's tree-structured Parzen
estimator (arXiv 2304.11127) proposes them from what the rows say so far; successive halving (arXiv 1502.07943) spends the time: the first
rung runs many of them cheaply, few examples and few training steps, and each further rung a share of the best for longer. What is larger
than was asked for goes no further, as steps hardly change a size. A rung may go by the error of the outputs in the place of the score,
which tells pipelines apart on examples that are too few for a score; what error goes with what loss is not known by then, so those go on
that none beats in bytes and error. All of this is scored on the selection split; the pipeline that is chosen is scored once on the test
split.

The rows alone say what is done: proposals follow from the seed and the rows before them, so a search that was stopped goes on anywhere.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, log2
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stackcomp.core.errors import MissingNeed, SettingError, StackcompError, StudyRefused
from stackcomp.core.passes import Pass
from stackcomp.core.pipeline import Pipeline
from stackcomp.core.plan import Plan
from stackcomp.core.selection import as_tuple
from stackcomp.core.settings import one_of, switch, whole, within
from stackcomp.manager import check
from stackcomp.studies.combinations import LEFT_OUT, THEN, Technique, techniques
from stackcomp.studies.rows import Row, Rows, direction, unbeaten
from stackcomp.studies.runner import Runner, say
from stackcomp.studies.study import Entry, Study, check_name, line_of, plan_for

if TYPE_CHECKING:
    from stackcomp.data.task import Task

POINT = 1.0  # a point beyond what may be lost weighs as much as a factor of two in bytes
OVER = 1e3  # points that a doubling beyond the size allowed weighs as much as: none is worth it
BATCH = 8  # proposals between looks at the rows: those of a batch share their steps
PATIENCE = 50  # proposals in a row that are illegal or known already, after which the space counts as tried


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One round of a search. examples: how many are scored, all of the selection split for None; steps: the share of every training
    pass's `steps` that is run, one at least, or of its epochs where it has no `steps` (give no more steps than its epochs hold); samples:
    the share of every pass's calibration `samples` that is read; by: what pipelines are judged by, their "score" or the "output error"
    (see `Measured`)."""

    examples: int | None = None
    steps: float = 1.0
    samples: float = 1.0
    by: Literal["score", "output error"] = "score"

    def __post_init__(self) -> None:
        if self.examples is not None:
            whole("examples", self.examples, 1)
        within("steps", self.steps, 0.0, 1.0, above=True)
        within("samples", self.samples, 0.0, 1.0, above=True)
        one_of("by", self.by, ("score", "output error"))


@dataclass(frozen=True, kw_only=True, eq=False)
class Search:
    """What is searched for, and how much is spent on it.

    name, model, task, tokenizer: as in `Entry`; passes: as in `combinations`, in the order in which they are to run; orders: search for
    the order, too; always: the names of those that no pipeline leaves out. Give one goal:
    loss, the points that the smallest file may lose against the model as it came (the rise, where lower is better); floor, the score
    that it must reach, on the metric's own scale; or size_bytes, the largest file for the best score.
    pipelines: how many the first rung tries; rungs: the rounds, cheap ones first, the last one in full; keep: the share of the
    pipelines that goes from one rung to the next.

    Raises SettingError for a goal or rungs that make no sense, and what `combinations` raises for its passes.
    """

    name: str
    model: Entry | str | Path
    task: "Task"
    passes: Mapping[str, Pass | Sequence[Pass]]
    loss: float | None = None
    floor: float | None = None
    size_bytes: int | None = None
    always: str | tuple[str, ...] = ()
    orders: bool = False
    pipelines: int = 48
    rungs: tuple[Rung, ...] = (Rung(examples=256, steps=0.1), Rung(examples=1000, steps=0.3), Rung())
    keep: float = 0.25
    seed: int = 0
    tokenizer: str | Path | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        object.__setattr__(self, "always", as_tuple(self.always))
        goals = (self.loss, self.floor, self.size_bytes)
        if goals.count(None) != len(goals) - 1:
            raise SettingError(
                f"loss={self.loss!r}, floor={self.floor!r}, size_bytes={self.size_bytes!r}: give one of them, as the goal"
            )
        if self.loss is not None:
            within("loss", self.loss, 0.0)
        if self.floor is not None:
            within("floor", self.floor, -inf)
        if self.size_bytes is not None:
            whole("size_bytes", self.size_bytes, 1)
        self.final(tuple(techniques(self.passes)[:1]))  # an entry judges model, task and tokenizer
        switch("orders", self.orders)
        whole("pipelines", self.pipelines, 1)
        whole("seed", self.seed, 0, 2**32 - 1)
        within("keep", self.keep, 0.0, 1.0, above=True)
        said: Any = self.rungs  # whatever a typo gives
        if not isinstance(said, Sequence) or not all(isinstance(rung, Rung) for rung in said):
            raise SettingError(f"rungs={said!r}: give a sequence of them, as in (stackcomp.Rung(),)")
        if (
            not self.rungs
            or (last := self.rungs[-1]).steps != 1.0
            or last.samples != 1.0
            or last.by != "score"
        ):
            raise SettingError(
                "rungs: the last one must run all steps (steps=1.0) on all samples (samples=1.0) and go by the score"
            )
        if self.task.kind == "question_answering" and any(rung.by != "score" for rung in self.rungs):
            raise SettingError(
                "rungs: by='output error' needs outputs, which answers have none of: give by='score'"
            )
        for name in self.always:
            one_of("always", name, self.passes)

    def entry(self, choice: "Choice", place: int) -> Entry:
        """A pipeline as it is run in a rung, of which the first one's place is 1."""
        rung = self.rungs[place - 1]
        return replace(
            self.final(choice),
            key=_key(choice, place),
            pipeline=Pipeline(*(_shortened(one.item, rung) for one in choice)),
            labels={**_labels(choice), "rung": place},
            split="selection",
            limit=rung.examples,
        )

    def final(self, choice: "Choice") -> Entry:
        """A pipeline in full, scored on the test split."""
        return Entry(
            key=_key(choice, "chosen"),
            model=self.model,
            task=self.task,
            pipeline=Pipeline(*(one.item for one in choice)),
            seed=self.seed,
            tokenizer=self.tokenizer,
            labels={**_labels(choice), "rung": "chosen"},
        )

    def made(self, row: Row) -> bool:
        """Whether the search as it is declared today would run what this row is of."""
        labels, known = row["labels"], {(one.name, one.strength): one for one in techniques(self.passes)}
        named = [*zip(labels.get("passes", ()), labels.get("strengths", ()), strict=True)]
        places = [*range(1, len(self.rungs) + 1), "chosen"]
        if not named or labels.get("rung") not in places or not all(one in known for one in named):
            return False
        choice, place = tuple(known[one] for one in named), labels["rung"]
        return (self.final(choice) if place == "chosen" else self.entry(choice, place)).made(row)

    def cost(self, row: Row) -> float:
        """What is minimised: log2 of the bytes and the points missed; or the points lost and the doublings beyond `size_bytes`.

        A row that failed, or has no difference, costs infinitely much."""
        if not _is_compared(row):
            return inf
        if self.size_bytes is None:
            return log2(row["size_bytes"]) + max(0.0, self.missed(row)) / POINT
        return _lost(row) + OVER * max(0.0, log2(row["size_bytes"] / self.size_bytes))

    def missed(self, row: Row) -> float:
        """By how much a finished row misses the goal's bound, in points or in bytes; 0 or less where it keeps to it."""
        if self.size_bytes is not None:
            return row["size_bytes"] - self.size_bytes
        if self.loss is not None:
            return _lost(row) - self.loss
        assert self.floor is not None
        return direction(row["metric"]) * (self.floor - row["score"])

    def place(self, row: Row) -> tuple[float, float]:
        """Where a finished row stands among those of the last rung: by how far it is from the bound, and within it by cost."""
        return max(0.0, self.missed(row)), self.cost(row)

    def reaches(self, row: Row) -> bool:
        """Whether a finished row keeps to the goal's bound."""
        return self.missed(row) <= 0

    @property
    def goal(self) -> str:
        """The bound, in words."""
        if self.size_bytes is not None:
            return f"at most {self.size_bytes:,} bytes"
        return (
            f"a loss of at most {self.loss:g} points"
            if self.loss is not None
            else f"a score of {self.floor:g}"
        )

    def fits(self, row: Row) -> bool:
        """Whether a finished row is within the size, where one was asked for."""
        return self.size_bytes is None or self.reaches(row)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search ended with. chosen: its row on the test split; searched: its row of the last rung; missed: how that one misses the
    bound, in words, where none keeps to it: it is the one that comes nearest; front: rows of the last rung that none other beats in bytes
    and score."""

    chosen: Row
    searched: Row
    missed: str
    front: tuple[Row, ...]

    @property
    def reached(self) -> bool:
        """Whether the chosen pipeline keeps to the bound on the selection split."""
        return not self.missed

    def __str__(self) -> str:
        """What a person wants to know, the declaration included."""
        goal = self.missed or "found"
        lines = [f"  {_figures(row)}  {row['key'].partition('/')[2]}" for row in self.front]
        return "\n".join(
            [
                f"{goal}: {self.chosen['key'].partition('/')[2]}",
                f"  {self.chosen['declaration']}",
                f"  test split: {_figures(self.chosen)}",
                f"  selection split: {_figures(self.searched)}",
                "what no other pipeline of the last rung beats in bytes and score (selection split):",
                *lines,
            ]
        )


def search(asked: Search, rows: Rows, out: Path, *, tell: Callable[[str], None] = say) -> Found:
    """Search, in the folder `out`, into `rows`; what stands in them already is not run again.

    Raises MissingNeed without Optuna, StudyRefused where no pipeline is legal, all failed or the chosen one fails on the test split, and
    what `Runner.go` raises.
    """
    walk = _Walk(asked, rows, out, tell)
    best = walk.first_rung()
    for place, rung in enumerate(asked.rungs[1:], 2):
        count = max(1, round(len(best) * asked.keep))
        finished = walk.finished(best)
        going = [one for one in finished if asked.fits(one[1])] or finished
        tell(f"rung {place}: the best {min(count, len(going))} of {len(best)} pipelines")
        best = walk.rank([choice for choice, _ in going[:count]], rung, place)
    finished = walk.finished(best)
    choice, searched = min(finished, key=lambda one: asked.place(one[1]))
    (chosen,) = walk.run([asked.final(choice)]).values()
    if "error" in chosen:
        raise StudyRefused(
            f"search {asked.name!r}: {chosen['key']} failed on the test split ({chosen['error']['type']}: {chosen['error']['message']}): "
            "mend that, and run the search again, which goes on from there"
        )
    return Found(
        chosen=chosen,
        searched=searched,
        missed=_missed(asked, searched),
        front=tuple(
            unbeaten(
                [row for _, row in finished],
                cost=lambda row: row["size_bytes"],
                worth=lambda row: -_lost(row),
            )
        ),
    )


Choice = tuple[Technique, ...]
Costs = tuple[float, ...]  # what is minimised: one figure, or several that are not weighed against each other


class _Walk:
    """A search under way."""

    def __init__(self, asked: Search, rows: Rows, out: Path, tell: Callable[[str], None]) -> None:
        self._asked, self._rows, self._out, self._tell = asked, rows, out, tell
        self._techniques = techniques(asked.passes)
        self._plan: Plan = plan_for(asked.model, asked.task, (one.item for one in self._techniques))
        self._refused = ""
        self._latest = dict[Choice, Row]()

    def first_rung(self) -> list[Choice]:
        """Propose and run pipelines until there are as many as asked for, or none is new; the best first."""
        rung, tried = self._asked.rungs[0], dict[Choice, Costs]()
        for batch in self._proposals(tried):
            tried.update(self._tried(batch, rung, 1))
        if not tried:
            raise StudyRefused(
                f"search {self._asked.name!r} has no legal pipeline; the first one that was tried: {self._refused}"
            )
        return _ranked(tried)

    def rank(self, choices: Sequence[Choice], rung: Rung, place: int) -> list[Choice]:
        """Run pipelines in a rung; the best first."""
        return _ranked(self._tried(choices, rung, place))

    def _tried(self, choices: Sequence[Choice], rung: Rung, place: int) -> "dict[Choice, Costs]":
        """Run pipelines in a rung; what each costs."""
        found = self.run([self._asked.entry(choice, place) for choice in choices])
        self._latest |= {choice: found[_key(choice, place)] for choice in choices}
        return {choice: self._costs(self._latest[choice], rung) for choice in choices}

    def _costs(self, row: Row, rung: Rung) -> "Costs":
        """What is minimised in a rung: the cost, or bytes and error."""
        if rung.by == "score":
            return (self._asked.cost(row),)
        error = row.get("output_error")  # none where it failed
        if error is None:
            return inf, inf
        return log2(row["size_bytes"]), error if self._asked.fits(row) else inf

    def row(self, choice: Choice) -> Row:
        """The row of a pipeline in the last rung that ran it."""
        return self._latest[choice]

    def finished(self, choices: Sequence[Choice]) -> list[tuple[Choice, Row]]:
        """Those of `choices` that did not fail, with their rows. Raises StudyRefused when all of them did, or none can be compared with
        the model as it came."""
        found = [(choice, row) for choice in choices if _is_compared(row := self.row(choice))]
        if not found:
            raise StudyRefused(
                f"search {self._asked.name!r}: every pipeline of a rung failed, or cannot be compared with the model as it came (as "
                f"perplexity over another vocabulary cannot); see {self._rows.path}"
            )
        return found

    def _proposals(self, tried: "dict[Choice, Costs]") -> Iterator[list[Choice]]:
        """Batches of legal pipelines that are not in `tried`, which holds the costs of each earlier one by the next call."""
        optuna = _optuna()
        asked = self._asked
        sampler = optuna.samplers.TPESampler(seed=asked.seed, n_startup_trials=2 * BATCH, multivariate=True)
        goals = 1 if asked.rungs[0].by == "score" else 2
        study = optuna.create_study(sampler=sampler, directions=["minimize"] * goals)
        space = {
            name: optuna.distributions.CategoricalDistribution(
                [LEFT_OUT] * (name not in asked.always)
                + [str(one) for one in self._techniques if one.name == name]
            )
            for name in asked.passes
        }
        places = {name: f"place of {name}" for name in asked.passes if asked.orders}
        space |= {place: optuna.distributions.FloatDistribution(0.0, 1.0) for place in places.values()}
        vain = 0
        while len(tried) < asked.pipelines and vain < PATIENCE:
            trials = dict[Choice, Any]()
            while len(trials) < min(BATCH, asked.pipelines - len(tried)) and vain < PATIENCE:
                trial = study.ask(space)
                chosen = [one for one in self._techniques if trial.params[one.name] == str(one)]
                order = {one: trial.params[places[one.name]] if places else 0.0 for one in chosen}
                choice = tuple(sorted(chosen, key=lambda one: order[one]))
                if choice in tried:
                    study.tell(trial, _finite(tried[choice]))
                elif choice in trials or not self._is_legal(choice):
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                else:
                    trials[choice], vain = trial, -1
                vain += 1
            if trials:
                yield list(trials)
            for choice, trial in trials.items():
                study.tell(trial, _finite(tried[choice]))

    def _is_legal(self, choice: Choice) -> bool:
        if not choice:
            return False
        try:
            check(Pipeline(*(one.item for one in choice)), self._plan)
        except StackcompError as error:
            self._refused = self._refused or str(error)
            return False
        return True

    def run(self, entries: Sequence[Entry]) -> dict[str, Row]:
        """The rows of `entries`, finished or failed, by key."""
        line = line_of(self._asked.model)
        study = Study(name=self._asked.name, entries=(*line, *entries))
        keys = {entry.key for entry in entries}
        known = {row["key"] for row in study.own(self._rows.read()) if "error" not in row}
        if not keys <= known:
            # what all rungs start from, and what is chosen from
            last = (entry for entry in entries if entry.labels["rung"] == len(self._asked.rungs))
            kept = frozenset(entry.key for entry in (*line, *last))
            Runner(study=study, rows=self._rows, out=self._out, kept=kept, tell=self._tell).go()
        return {row["key"]: row for row in study.own(self._rows.read()) if row["key"] in keys}


def _missed(asked: Search, row: Row) -> str:
    """How a row misses the goal, in words; empty where it does not."""
    if asked.reaches(row):
        return ""
    missed = asked.missed(row)
    by = f"{missed:,} bytes" if asked.size_bytes is not None else f"{missed:.2f} points"
    return f"no pipeline reaches the goal, {asked.goal}; the nearest one misses it by {by}"


def _ranked(costs: Mapping[Choice, Costs]) -> list[Choice]:
    """The best first. Where there are two figures: those that none beats in both, the dearer ones of them first, then those that none of
    the others beats, and so on."""
    left, ranked = sorted(costs, key=lambda choice: costs[choice]), list[Choice]()
    if all(len(cost) == 1 for cost in costs.values()):
        return left
    while left:
        front = unbeaten(left, cost=lambda choice: costs[choice][0], worth=lambda choice: -costs[choice][1])
        ranked += reversed(front)
        left = [choice for choice in left if choice not in front]
    return ranked


def _finite(costs: Costs) -> Costs:
    """Costs as Optuna takes them."""
    return tuple(min(cost, 1e9) for cost in costs)


def _is_compared(row: Row) -> bool:
    """Whether a row is finished and tells a difference to the model as it came: perplexities over two vocabularies have none."""
    return "error" not in row and row["difference"] is not None


def _lost(row: Row) -> float:
    """The points that a pipeline lost against the model as it came, in the direction of its metric."""
    return -direction(row["metric"]) * row["difference"]


def _figures(row: Row) -> str:
    """A finished row as one line."""
    return (
        f"{row['size_bytes']:>11,} bytes ({row['compression']:.2f}x)  {row['metric']} {row['score']:.2f} "
        f"({row['difference']:+.2f} ± {row['difference_noise']:.2f})"
    )


def _key(choice: Choice, rung: int | str) -> str:
    return f"{rung}/{THEN.join(map(str, choice))}"


def _labels(choice: Choice) -> dict[str, Any]:
    return {"passes": [one.name for one in choice], "strengths": [one.strength for one in choice]}


def _shortened(item: Pass, rung: Rung) -> Pass:
    """A pass with a rung's share of its training steps and calibration samples, one at least; as it is where it has none."""
    settings: Any = item
    found: dict[str, Any] = {}
    if rung.steps != 1.0 and item.contract.trains:
        if settings.steps is None:
            found["epochs"] = settings.epochs * rung.steps
        else:
            found["steps"] = max(1, round(settings.steps * rung.steps))
    if rung.samples != 1.0 and hasattr(settings, "samples"):
        found["samples"] = max(1, round(settings.samples * rung.samples))
    return replace(settings, **found)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingNeed("a search needs Optuna: pip install 'stackcomp[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
