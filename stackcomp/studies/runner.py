"""The walk over a study: every entry without a finished row is run, and leaves one row at once.

    OUT/cache/FINGERPRINT/   a step: made once, whichever entries and processes want it
    OUT/entries/SLUG/        the result of an entry, while another one is to start from it
    OUT/locks/SLUG/          held by the process that runs the entry
    OUT/study                the name of the study

The rows alone say what is done. What no entry still to run can want is removed as soon as that is known.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from stackcomp import checkpoint
from stackcomp.core import manifest
from stackcomp.core.errors import MissingNeed, OutputInUse, SelectionEmpty
from stackcomp.core.files import disk_is_full, locked, write_atomic
from stackcomp.core.ledger import Ledger
from stackcomp.core.selection import nearest
from stackcomp.core.settings import within
from stackcomp.manager import Measuring, PassManager
from stackcomp.run import CHAIN
from stackcomp.studies.forecast import Forecast, duration, forecast
from stackcomp.studies.rows import Row, Rows, figures, stamp
from stackcomp.studies.study import Entry, Study, line_of

STUDY_FILE = "study"  # in the working folder: whose it is
PATIENCE = 2.0  # seconds between looks at entries that another process runs


def say(text: str) -> None:
    """A line of progress, at once. Where nobody reads any more (`| head`), the work goes on unheard."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = None


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Runs `study` into `rows`, with `out` as its working folder, which so many `workers` share.

    only: globs on the keys of the entries to run, all of them when there is none. minutes: after so many no
    further entry is started. kept: keys of entries whose result stays, for studies to come. tell: takes each line of
    progress. lost: finished entries whose result was wanted again and could not be made.
    """

    study: Study
    rows: Rows
    out: Path
    only: tuple[str, ...] = ()
    minutes: float | None = None
    workers: int = 1
    kept: frozenset[str] = frozenset()
    tell: Callable[[str], None] = say
    lost: set[str] = field(default_factory=set[str], init=False)

    def go(self) -> int:
        """Run what is missing; returns how many entries failed.

        Raises SelectionEmpty for a glob of `only` that matches no key, and what `Study.check` raises, before
        anything is run. An entry that raises gets a row that says so, and the others go on; a full disk
        stops the study.
        """
        self.begin()
        return self.walk()

    def begin(self) -> None:
        """Judge all pipelines, say what is to do, and mark the failures of earlier runs: they are tried again."""
        if self.minutes is not None:
            within("minutes", self.minutes, 0.0)
        self.rows.folder.mkdir(parents=True, exist_ok=True)
        self.chosen()
        self.study.check()
        self._claim()
        failed, rows = self.failed(), self._rows()
        self.rows.add(*({**rows[key], "again": True} for key in rows if key in failed))
        self.tell(self.summary())
        self._prune()

    def walk(self) -> int:
        """Run what is missing, beside whoever else is at it; returns how many entries have failed since `begin`, whoever ran them."""
        end = None if self.minutes is None else time.monotonic() + 60 * self.minutes
        waiting = self.chosen()
        while waiting:
            held: list[Entry] = []
            for entry in waiting:
                if entry.key in self.failed() or entry.key in self.finished():
                    continue
                if end is not None and time.monotonic() >= end:
                    self.tell(f"{self.minutes:g} minutes are over: run the same command again to go on")
                    return len(self.failed())
                if not self._settle(entry):
                    held.append(entry)
            if held and len(held) == len(waiting):  # other processes are at all of them
                time.sleep(PATIENCE)
            waiting = held
        return len(self.failed())

    # what is there, and what is to do

    def chosen(self) -> list[Entry]:
        """The entries that `only` lets in, in order."""
        keys = [entry.key for entry in self.study.entries]
        for glob in self.only:
            if not any(fnmatchcase(key, glob) for key in keys):
                raise SelectionEmpty(f"{glob!r} matches no entry; the nearest keys are {nearest(glob, keys)}")
        return [
            entry
            for entry in self.study.entries
            if not self.only or any(fnmatchcase(entry.key, glob) for glob in self.only)
        ]

    def finished(self) -> dict[str, Row]:
        """The rows of finished entries, by key."""
        return {key: row for key, row in self._rows().items() if "error" not in row}

    def failed(self) -> set[str]:
        """Keys of the chosen entries that failed, and of those that they start from; not those that are to be tried again."""
        line = {one.key for entry in self.chosen() for one in line_of(entry)}
        failed = (key for key, row in self._rows().items() if "error" in row and not row.get("again"))
        return self.lost | line.intersection(failed)

    def _rows(self) -> dict[str, Row]:
        """The rows that the entries made, by key."""
        return {row["key"]: row for row in self.study.own(self.rows.read())}

    def summary(self) -> str:
        """What is done and what remains, in one line, and below it why pipelines were left out, if any were."""
        chosen, done = self.chosen(), self.finished()
        ahead = self._forecast()
        line = (
            f"study {self.study.name}: {len(chosen)} entries, {sum(entry.key in done for entry in chosen)} done; "
            f"{sum(ahead.passes.values())} pass runs remain, {ahead.saved} more are saved by shared prefixes; "
            f"time: {ahead.time}"
        )
        return f"{line}\n{self.study.left_out()}".rstrip()

    def table(self) -> str:
        """One line an entry: done, failed or missing."""
        rows = self._rows()
        lines: list[str] = []
        for entry in self.chosen():
            row = rows.get(entry.key)
            if row and "error" not in row:
                lines.append(f"done     {_figures(row)}")
            elif row:
                lines.append(f"failed   {entry.key}  {row['error']['type']}: {row['error']['message']}")
            else:
                lines.append(f"missing  {entry.key}")
        return "\n".join(lines)

    def _to_run(self, entries: list[Entry]) -> list[Entry]:
        """Those of `entries` without a finished row, and the entries whose lost result one of these starts
        from."""
        done = self.finished()
        found: dict[str, Entry] = {}

        def want(entry: Entry) -> None:
            found[entry.key] = entry
            if entry.parent is not None and not self._is_kept(entry.parent, done):
                want(entry.parent)

        for entry in entries:
            if entry.key not in done:
                want(entry)
        return list(found.values())

    def _forecast(self) -> Forecast:
        """What running the chosen entries still takes, less the steps that are in the cache."""
        entries = self._to_run(self.chosen())
        made = {
            name
            for entry in entries
            for name, mark in zip(entry.steps, self._chain(entry), strict=False)
            if checkpoint.is_ours(self._cache / mark / "step")
        }
        return forecast(entries, made, self.rows.read(), self.workers)

    # one entry

    def _settle(self, entry: Entry, *, for_its_model: bool = False) -> bool:
        """See to it that `entry` has its row, or its result too; False when another process is at it."""
        parent = entry.parent
        ready = parent is None or parent.key in self.failed() or self._is_kept(parent, self.finished())
        if parent is not None and not ready and not self._settle(parent, for_its_model=True):
            return False
        with self._held(entry) as ours:
            if ours:
                done = self.finished()
                known = done.get(entry.key)
                if entry.key in self.failed():
                    return True
                if known is None or (for_its_model and not self._is_kept(entry, done)):
                    self._run(entry, known)
        return ours

    def _run(self, entry: Entry, known: Row | None) -> None:
        """Run `entry` and add its row; with a row `known` already, only its result was lost."""
        try:
            ledger = self._ledger(entry)
        except Exception as error:
            if disk_is_full(error):
                raise
            said = {"type": type(error).__name__, "message": str(error)}
            if known is None:
                self.rows.add({**self._head(entry), "error": said})
            else:
                self.lost.add(entry.key)
            self.tell(f"failed: {entry.key}: {said['type']}: {said['message']}")
            return
        row = {
            **self._head(entry),
            **_body(ledger, latency=entry.latency),
            "file_sha256": manifest.read(self._folder(entry))["files"][checkpoint.WEIGHTS]["sha256"],
        }
        if known is None:
            self.rows.add(row)
            chosen, finished = self.chosen(), self.finished()
            done = sum(one.key in finished for one in chosen)
            self.tell(f"[{done}/{len(chosen)}] {_figures(row)}; remaining: {self._forecast().time}")
        elif known["fingerprint"] != row["fingerprint"]:
            self.tell(
                f"{entry.key} was made again and is not the model of its row (made elsewhere); going on with it"
            )
        self._prune()

    def _ledger(self, entry: Entry) -> Ledger:
        """Run the entry's pipeline, from the cache as far as that goes."""
        source = entry.model
        if isinstance(source, Entry):
            if source.key in self.failed():
                raise MissingNeed(f"the entry it starts from, {source.key!r}, failed: mend that one first")
            source = self._folder(source)
        manager = PassManager(
            out=self._folder(entry),
            task=entry.task,
            tokenizer=source if entry.tokenizer is None else entry.tokenizer,
            seed=entry.seed,
            measuring=Measuring(split=entry.split, limit=entry.limit, latency=entry.latency),
            cache=self._cache,
        )
        return manager.run(source, entry.pipeline, resume=True).ledger

    def _head(self, entry: Entry) -> dict[str, Any]:
        """What a row says beside its figures."""
        return {
            "key": entry.key,
            "labels": dict(entry.labels),
            **stamp(entry.pipeline, entry.seed),
            **entry.asked,
            **entry.data,
        }

    # folders

    @property
    def _cache(self) -> Path:
        return self.out / "cache"

    def _folder(self, entry: Entry) -> Path:
        return self.out / "entries" / entry.slug

    def _is_kept(self, entry: Entry, finished: Mapping[str, Row]) -> bool:
        """Whether the entry's result is there to start from; without its row it may be one of before the data changed."""
        return entry.key in finished and checkpoint.is_ours(self._folder(entry))

    def _chain(self, entry: Entry) -> list[str]:
        """Names in the cache of the steps of `entry`; none before it first ran, or where the file is damaged."""
        try:
            return json.loads((self._folder(entry) / CHAIN).read_text("utf8"))
        except (FileNotFoundError, ValueError):
            return []

    @contextmanager
    def _held(self, entry: Entry) -> Generator[bool]:
        """Hold `entry` for this process; gives False when another one does."""
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.out / "locks" / entry.slug))
                ours = True
            except OutputInUse:
                ours = False
            yield ours

    def _claim(self) -> None:
        """Make `out` the folder of this study. Raises OutputInUse where it is another's, whose steps would be removed as nobody's."""
        mark = self.out / STUDY_FILE
        if mark.is_file() and (name := mark.read_text("utf8")) != self.study.name:
            raise OutputInUse(f"{self.out} is the working folder of the study {name!r}: give another (--out)")
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomic(mark, self.study.name)

    def _prune(self) -> None:
        """Remove steps and results that no entry still to run can want. A result whose steps another process holds stays until the next
        time: it names them."""
        open_ = self._to_run(list(self.study.entries))
        keys = {entry.key for entry in open_}
        sources = {entry.parent.key for entry in open_ if entry.parent is not None}
        for entry in self.study.entries:
            if entry.key in keys | self.kept:
                continue
            places = zip(entry.steps, self._chain(entry), strict=False)
            held = [mark for name, mark in places if not self._let_go(name, mark)]
            if not held and entry.key not in sources:
                shutil.rmtree(self._folder(entry), ignore_errors=True)

    def _let_go(self, name: str, mark: str) -> bool:
        """Remove a step that no entry still to run can want by now; False when another process holds it."""
        place = self._cache / mark
        if not place.is_dir():
            return True
        try:
            with locked(place):
                open_ = self._to_run(list(self.study.entries))
                wanted = any(name in entry.steps or mark in self._chain(entry) for entry in open_)
                if not wanted:
                    shutil.rmtree(place, ignore_errors=True)
        except OutputInUse:
            return False
        return True


def _body(ledger: Ledger, *, latency: bool) -> dict[str, Any]:
    """The figures of the last step, those of every step, and what they cost together."""
    steps = [
        {"name": row.name, "declaration": row.declaration, **figures(ledger, row.step)} for row in ledger.rows
    ]
    last = {name: value for name, value in figures(ledger, len(steps) - 1).items() if name != "findings"}
    measured = ledger.rows[-1].measured
    timed = {"latency_ms": measured.latency_ms, "latency_ratio": measured.latency_ratio} if latency else {}
    return {
        **last,
        **timed,
        "input_fingerprint": ledger.rows[0].fingerprint,
        "seconds": sum(row.seconds for row in ledger.rows),
        "peak_memory_bytes": max(row.peak_memory_bytes for row in ledger.rows),
        "steps": steps,
    }


def _figures(row: Mapping[str, Any]) -> str:
    """A finished row as one line."""
    layers = "-" if row["layer_compression"] is None else f"{row['layer_compression']:.2f}x"
    return (
        f"{row['key']}  {row['score']:.2f} ± {row['noise']:.2f}  {layers} encoder  "
        f"{row['compression']:.2f}x file  {duration(row['seconds'])}"
    )
