"""Rows of results: docs/results/NAME.jsonl, one JSON object a line, one row for all that was declared in one way under one key.

A row holds what was run (the exact declaration and seed), on what (library versions, machine) and when, beside its
figures, so that a study knows from its rows alone what is done, and a reader can run a row again.
"""

import json
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from stackcomp import metrics
from stackcomp.core import __version__, fingerprint
from stackcomp.core.errors import ResultsDamaged
from stackcomp.core.files import locked, write_atomic
from stackcomp.core.ledger import Ledger

FOLDER = Path("docs/results")
# What a row says of how its entry was declared: the keys of `Entry.asked` and of `Entry.data`.
RECIPE = ("declaration", "model", "task", "seed", "split", "limit", "latency")
RECIPE += ("task_digest", "tokenizer", "before")
LOWER_IS_BETTER = ("perplexity",)
Row = Mapping[str, Any]
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one study. by: what tells two rows of one key apart, so that neither replaces the other."""

    name: str
    folder: Path = FOLDER
    by: tuple[str, ...] = RECIPE

    @property
    def path(self) -> Path:
        """The file that holds them."""
        return self.folder / f"{self.name}.jsonl"

    def read(self) -> list[Row]:
        """All rows in the order they were first added, of several that are the same in `by` (two files put together) the last one, and
        rather one that is finished than one that says how it failed; none when the study has not run. Raises ResultsDamaged, naming the
        line, for what is no row."""
        if not self.path.is_file():
            return []
        found: dict[str, Row] = {}
        for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
            try:
                self._put(found, json.loads(line.decode("utf8")))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ResultsDamaged(
                    f"{self.path}, line {number}: no row ({error!r}); remove the line"
                ) from error
        return [*found.values()]

    def add(self, *rows: Row) -> None:
        """Append `rows`, or put each in place of the row that is the same in `by`, unless that is finished and this one failed; a crash
        leaves the old file or the new one, and of two processes none loses the other's row."""
        with locked(self.folder, wait=True):
            kept: dict[str, Row] = {}
            for row in (*self.read(), *rows):
                self._put(kept, row)
            write_atomic(self.path, "".join(f"{json.dumps(row)}\n" for row in kept.values()))

    def _put(self, rows: dict[str, Row], row: Row) -> None:
        same = json.dumps([row["key"], *(row.get(name) for name in self.by)])
        if same not in rows or "error" not in row or "error" in rows[same]:
            rows[same] = row

    def has(self, key: str, **same: Any) -> bool:
        """Whether there is a row with this key whose other entries equal `same`: what the study would run again."""
        return any(
            row["key"] == key and all(row.get(name) == value for name, value in same.items())
            for row in self.read()
        )


def direction(metric: str) -> int:
    """1 where a higher score is better, -1 where a lower one is."""
    return -1 if metric in LOWER_IS_BETTER else 1


def unbeaten(
    items: Iterable[Item], *, cost: Callable[[Item], float], worth: Callable[[Item], float]
) -> list[Item]:
    """The Pareto front: items that no other one equals or beats in both, the cheapest first."""
    front: list[Item] = []
    for item in sorted(items, key=lambda item: (cost(item), -worth(item))):
        if not front or worth(item) > worth(front[-1]):
            front.append(item)
    return front


def figures(ledger: Ledger, step: int) -> dict[str, Any]:
    """What the tables show of one row of a ledger, and the bytes behind it."""
    row = ledger.rows[step]
    return {
        "score": row.measured.score,
        "noise": row.measured.noise,
        "metric": row.measured.metric,
        "examples": row.measured.examples,
        "difference": row.measured.difference,
        "difference_noise": row.measured.difference_noise,
        "output_error": row.measured.output_error,
        "size_bytes": row.size_bytes,
        "layer_bytes": row.layer_bytes,
        "compression": ledger.compression(row),
        "layer_compression": ledger.layer_compression(row),
        "components": dict(row.components),
        "seconds": row.seconds,
        "measuring_seconds": row.measured.seconds,
        "peak_memory_bytes": row.peak_memory_bytes,
        "findings": dict(row.findings),
        "fingerprint": row.fingerprint,
    }


def stamp(declaration: Any, seed: int) -> dict[str, Any]:
    """What every row says beside its figures: declaration (the `repr` of a pipeline or pass), seed, digest of the
    package's source, versions, machine, date."""
    return {
        "declaration": repr(declaration),
        "seed": seed,
        "source": fingerprint.digest(
            [fingerprint.source_digest(name) for name in ("stackcomp.manager", "stackcomp.passes")]
        )[:12],
        "versions": {
            "stackcomp": __version__,
            "python": platform.python_version(),
            **fingerprint.versions(),
        },
        "machine": machine(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def machine() -> dict[str, Any]:
    """Processor, its vector instructions as torch uses them, cores, threads of torch, memory."""
    import psutil
    import torch

    return {
        "processor": _processor(),
        "instructions": metrics.instructions(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.system(),
    }


def _processor() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
