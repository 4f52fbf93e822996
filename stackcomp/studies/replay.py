"""A row run again from its declaration alone, into a fresh folder: does it leave the same bytes?"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from stackcomp.core.errors import SelectionEmpty, StudyRefused
from stackcomp.core.files import refuse_in_use
from stackcomp.core.pipeline import Pipeline
from stackcomp.core.selection import nearest
from stackcomp.core.settings import whole
from stackcomp.passes import registered
from stackcomp.studies.rows import Row, Rows
from stackcomp.studies.runner import Runner, say
from stackcomp.studies.study import Entry, Study, line_of

FIGURES = ("fingerprint", "file_sha256", "size_bytes", "score")
MADE_BY = ("source", "versions", "machine")


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A row and the one that running it again left."""

    old: Row
    new: Row

    @property
    def same(self) -> bool:
        """Whether both left the same weights file, byte by byte."""
        return self.old.get("file_sha256") == self.new["file_sha256"]

    @property
    def words(self) -> str:
        """The finding, and for other bytes what may have caused them."""
        if self.same:
            return f"{self.old['key']}: the same bytes ({self.new['size_bytes']:,}, SHA-256 {self.new['file_sha256'][:12]})"
        lines = [f"{self.old['key']}: other bytes"]
        for name in (*FIGURES, *MADE_BY):
            if self.old.get(name) != self.new[name]:
                lines.append(f"  {name}: {self.old.get(name)} in the row, {self.new[name]} now")
        return "\n".join(lines)


def replay(
    study: Study,
    rows: Rows,
    key: str,
    out: Path,
    *,
    threads: int | None = None,
    tell: Callable[[str], None] = say,
) -> Replay:
    """Run the row of `key` again in the new folder `out`: the pipeline is read from the row's text, model and task are those that the
    study gives it; the entries that make its model are run again, too. threads: of torch, as many as the row was made with unless said.

    Raises SelectionEmpty for a key without an entry, StudyRefused for an entry without a finished row, OutputInUse when
    `out` holds something.
    """
    entries = {entry.key: entry for entry in study.entries}
    if key not in entries:
        raise SelectionEmpty(f"{key!r} is no entry; the nearest keys are {nearest(key, list(entries))}")
    entry = entries[key]
    old = next((row for row in rows.read() if entry.is_done(row)), None)
    if old is None:
        raise StudyRefused(f"{key!r} has no finished row in {rows.path}: run the study first")
    if threads is not None:
        whole("threads", threads, 1)
    refuse_in_use(out)
    again = replace(entry, pipeline=_read(old["declaration"], entry))
    fresh = Rows(name=study.name, folder=out / "rows")
    line = Study(name=study.name, entries=tuple(line_of(again)))
    with _threads(threads or old["machine"]["threads"]):
        Runner(study=line, rows=fresh, out=out / "work", tell=tell).go()
    new = next(row for row in fresh.read() if row["key"] == key)
    if "error" in new:
        raise StudyRefused(f"{key!r} failed this time: {new['error']['type']}: {new['error']['message']}")
    return Replay(old=old, new=new)


@contextmanager
def _threads(count: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read(declaration: str, entry: Entry) -> Pipeline:
    """The pipeline in a row; passes that are not registered are those of the study file."""
    return Pipeline.parse(declaration, {**registered(), **{item.name: type(item) for item in entry.passes}})
