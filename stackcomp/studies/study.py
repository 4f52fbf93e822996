"""What a study declares: entries, each one pipeline on one model, which may be what another entry leaves."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackcomp.core import headers, manifest
from stackcomp.core.errors import (
    PipelineFileError,
    SelectionEmpty,
    SettingError,
    StackcompError,
    StudyRefused,
)
from stackcomp.core.fingerprint import digest
from stackcomp.core.passes import Pass
from stackcomp.core.pipeline import Pipeline
from stackcomp.core.pipeline_file import read_file
from stackcomp.core.plan import Plan
from stackcomp.core.settings import switch, whole
from stackcomp.data.sources import anywhere
from stackcomp.loading import outline
from stackcomp.manager import check, plan_of

if TYPE_CHECKING:
    from stackcomp.data.task import Task

Techniques = tuple[tuple[str, ...], tuple[str, ...]]  # of a pipeline, in order, and the strength of each
LONGEST = 100  # characters of a key in the name of a folder
MODEL = ("config.json", "*.safetensors")  # the files of a folder that say what it holds
TOKENIZER = ("*token*.json", "vocab*", "merges.txt", "*.model")


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One pipeline on one model: one row of the study.

    key: what the row is called. model: a folder or hub name, or another entry, whose result is then the
    model this one starts from, is compared with, and is taught by. tokenizer: where to load it from, beside
    the model unless said. labels: what tables group by, as JSON values. split and limit: the examples that
    are scored; latency: whether the model is timed, too.
    """

    key: str
    model: "Entry | str | Path"
    pipeline: Pipeline | Pass
    task: "Task"
    seed: int = 0
    tokenizer: str | Path | None = None
    labels: Mapping[str, Any] = field(default_factory=dict[str, Any])
    split: str = "test"
    limit: int | None = None
    latency: bool = False

    def __post_init__(self) -> None:
        from stackcomp.data.task import ROLES, Task

        said: Any = self  # whatever a typo gives
        if not isinstance(said.key, str) or not said.key:
            raise SettingError(f"key={said.key!r} is no name: give a string, unique in the study")
        if not isinstance(said.model, Entry | str | Path):
            raise SettingError(
                f"entry {self.key!r}: model={said.model!r} is neither a folder, a hub name nor an Entry"
            )
        if not isinstance(said.pipeline, Pipeline | Pass):
            raise SettingError(
                f"entry {self.key!r}: pipeline={said.pipeline!r} is no pipeline: build it, as in Pipeline(Int8Weights())"
            )
        if not isinstance(said.task, Task):
            raise SettingError(
                f"entry {self.key!r}: task={said.task!r} is no task: build it, as in stackcomp.tasks.glue('sst2')"
            )
        if self.split not in ROLES:
            raise SettingError(f"entry {self.key!r}: split={self.split!r} is not one of {', '.join(ROLES)}")
        switch("latency", self.latency)
        whole("seed", self.seed, 0, 2**32 - 1)  # what numpy takes
        if self.limit is not None:
            whole("limit", self.limit, 1, 2**63 - 1)
        if not isinstance(said.labels, Mapping):
            raise SettingError(
                f"entry {self.key!r}: labels={said.labels!r} are no mapping: give names and values"
            )
        try:
            json.dumps(dict(self.labels), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise SettingError(f"entry {self.key!r}: labels={self.labels!r} are no JSON ({error})") from error

    @property
    def parent(self) -> "Entry | None":
        """The entry whose result this one starts from."""
        return self.model if isinstance(self.model, Entry) else None

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The passes in the order they run."""
        return self.pipeline.flat()

    @cached_property
    def asked(self) -> dict[str, Any]:
        """What the row says of the declaration: a row that says otherwise is of another entry."""
        return {
            "declaration": repr(self.pipeline),
            "model": self._origin,
            "task": self.task.name,
            "seed": self.seed,
            "split": self.split,
            "limit": self.limit,
            "latency": self.latency,
        }

    def is_done(self, row: Mapping[str, Any]) -> bool:
        """Whether `row` is this entry's, finished."""
        return "error" not in row and self.made(row)

    def made(self, row: Mapping[str, Any]) -> bool:
        """Whether `row` is this entry's, finished or failed: of the same key and declaration, and of the same `data` as far as it says."""
        asked = {"key": self.key, **self.asked}
        return all(row.get(name) == value for name, value in asked.items()) and any(
            all(row.get(name, value) == value for name, value in data.items())
            for data in (self.data, self._data(beside=False))
        )

    @cached_property
    def data(self) -> dict[str, Any]:
        """What the row says of task and tokenizer, its own and those of the entries before it, the first one first. Older rows do not, or
        do not of a tokenizer that lies beside the model."""
        return self._data(beside=True)

    def _data(self, *, beside: bool) -> dict[str, Any]:
        source = self.tokenizer
        if source is None and beside and self.parent is None and Path(str(self.model)).is_dir():
            source = str(self.model)
        before: list[Any] = []
        if self.parent is not None:
            told = self.parent._data(beside=beside)
            before = [*told["before"], [told["task_digest"], told["tokenizer"]]]
        tokenizer = None if source is None else _name(str(source), TOKENIZER)
        return {"task_digest": self.task_digest, "tokenizer": tokenizer, "before": before}

    @cached_property
    def task_digest(self) -> str:
        """A digest of how the task is declared, but for where its data lie, which differs between machines."""
        return digest(repr(replace(self.task, source=anywhere(self.task.source))))[:12]

    @cached_property
    def steps(self) -> tuple[str, ...]:
        """A name for the model as it came and for what each pass leaves: equal names are the same files, in
        whichever entry.

        Read off the declaration alone. Files may turn out equal where names differ, never the other way round.
        """
        # a head is drawn
        source = self.parent.steps[-1] if self.parent else [self._origin, self.task.name, self.seed]
        names = [digest([source, self.data["tokenizer"]])]
        for item in self.passes:
            data = [self.task.name, self.task_digest] if item.contract.needs else None
            names.append(digest([names[-1], repr(item), self.seed, data]))
        return tuple(names)

    @cached_property
    def slug(self) -> str:
        """The name of the entry's folder: its key, as far as file names go, and a digest of what it asks for."""
        asked = digest([self.key, self.asked, *filter(None, self.data.values())])
        return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', self.key)[:LONGEST]}-{asked[:8]}"

    @property
    def _origin(self) -> Any:
        """The model this entry starts from, down to the one that nothing here has made."""
        if not isinstance(self.model, Entry):
            return _name(str(self.model), MODEL)
        kept = ("declaration", "model", "task", "seed")
        return {name: self.model.asked[name] for name in kept}


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A pipeline that a study leaves out, as no contract allows it: its techniques in order and their strengths, the
    one that is refused, and the contract's words."""

    passes: tuple[str, ...]
    strengths: tuple[str, ...]
    refused: str
    why: str

    @property
    def reason(self) -> str:
        """Who is refused and for what, without the layers."""
        return f"{self.refused} {self.why.partition(' of ')[0]}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """Entries to run in order into `NAME.jsonl`; skipped: what `combinations` found illegal.

    Raises StudyRefused when two entries have one key, or an entry starts from one that is not in the study.
    """

    name: str
    entries: tuple[Entry, ...]
    skipped: tuple[Skipped, ...] = ()

    def __post_init__(self) -> None:
        check_name(self.name)
        if not isinstance(self.entries, Iterable):
            raise SettingError(f"study {self.name!r}: entries={self.entries!r}: give a sequence of entries")
        object.__setattr__(self, "entries", tuple(self.entries))
        if not self.entries:
            raise StudyRefused(f"study {self.name!r} has no entries: give at least one")
        for entry in self.entries:
            if not isinstance(entry, Entry):
                raise SettingError(
                    f"study {self.name!r}: {entry!r} is no entry: build it with stackcomp.Entry"
                )
        known: dict[str, Entry] = {}
        for entry in self.entries:
            if entry.key in known:
                raise StudyRefused(f"study {self.name!r} has two entries of key {entry.key!r}: rename one")
            known[entry.key] = entry
        for entry in self.entries:
            parent = entry.parent
            if parent is not None and known.get(parent.key) is not parent:
                raise StudyRefused(
                    f"entry {entry.key!r} starts from {parent.key!r}, which is not among the entries: add it"
                )

    def check(self) -> None:
        """Judge every pipeline without reading a weight, each on what the entry before it leaves.

        Raises what `stackcomp.check` raises, with the key of the entry.
        """
        known: dict[Entry | str, Plan] = {}
        for entry in self.entries:
            try:
                plan_after(entry, known)
            except SelectionEmpty:
                headed(entry, entry.task)

    def own(self, rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Those of `rows` that today's entries made, finished or failed, in the order of the entries; of an entry that failed and then
        finished, the latter."""
        entries, found = {one.key: one for one in self.entries}, dict[str, Mapping[str, Any]]()
        for row in rows:
            entry = entries.get(row["key"])
            if entry and entry.made(row) and ("error" not in row or "error" in found.get(entry.key, row)):
                found[entry.key] = row
        return [found[key] for key in entries if key in found]

    @property
    def pipelines(self) -> list[Techniques]:
        """The techniques of every entry that is one of `combinations`."""
        labels = [entry.labels for entry in self.entries if "passes" in entry.labels]
        return [(tuple(one["passes"]), tuple(one["strengths"])) for one in labels]

    def left_out(self) -> str:
        """How many pipelines are skipped and why, one line a reason; empty when none is."""
        reasons = Counter(one.reason for one in self.skipped)
        lines = [f"  {count} times: {reason}" for reason, count in reasons.most_common()]
        return "\n".join([f"{len(self.skipped)} illegal pipelines are left out", *lines] if lines else [])


def check_name(name: Any) -> None:
    """Refuse, with SettingError, what cannot name the rows of a study."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise SettingError(
            f"name={name!r} names a file: use letters, digits, dots, - and _, a letter or digit first"
        )


def declared(file: Path) -> Study:
    """The `study` that a file defines. Raises PipelineFileError where there is none."""
    found = read_file(file).get("study")
    if not isinstance(found, Study):
        raise PipelineFileError(f"{file} defines no `study`: write study = stackcomp.Study(...)")
    return found


def plan_after(model: Entry | str | Path, known: dict[Entry | str, Plan]) -> Plan:
    """The plan of the model at a folder or hub name, or of what an entry leaves; no weight is read.

    known: plans that were found before. Raises what `stackcomp.check` raises, with the key of the entry.
    """
    name = model if isinstance(model, Entry) else str(model)
    if name not in known:
        if isinstance(model, Entry):
            before = plan_after(model.model, known)
            try:
                known[name] = check(model.pipeline, before)[-1]
            except StackcompError as error:
                raise type(error)(f"entry {model.key!r}: {error}") from error
        else:
            known[name] = headers.plan_of(model)
    return known[name]


def headed(model: Entry | str | Path, task: "Task") -> Plan:
    """The same plan, where the model that nothing here has made has the head of the task that it is first run on."""
    line = line_of(model)
    source, first = (str(line[0].model), line[0].task) if line else (str(model), task)
    return plan_after(model, {source: plan_of(outline(source, first))})


def plan_for(model: Entry | str | Path, task: "Task", passes: Iterable[Pass]) -> Plan:
    """The plan on which pipelines of these passes are judged: with the head, where a glob of theirs matches nothing without it."""
    plan = plan_after(model, {})
    for item in passes:
        try:
            check(item, plan)
        except SelectionEmpty:
            return headed(model, task)
        except StackcompError:
            continue
    return plan


def line_of(model: Entry | str | Path) -> list[Entry]:
    """The entries that make `model`, the first one first; none for a folder or hub name."""
    return [*line_of(model.model), model] if isinstance(model, Entry) else []


@cache
def _name(source: str, globs: tuple[str, ...]) -> str:
    """A model or tokenizer in a row: a hub name as it is; a folder by its last part and a digest of those of its files that `globs` match,
    so that a row holds wherever the folder lies."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    content = [
        manifest.digest(file) for glob in globs for file in sorted(folder.glob(glob)) if file.is_file()
    ]
    return f"{folder.resolve().name}@{digest(content)[:12]}"
