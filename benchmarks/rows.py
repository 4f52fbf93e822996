"""Rows of results: docs/results/NAME.jsonl, one JSON object a line, one row a key.

A row holds what was run (the exact declaration and seed), on what (library versions, machine) and when, beside its
figures, so that a study knows from its rows alone what is done, and a reader can run a row again.
"""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import stackcomp
from stackcomp.core import fingerprint
from stackcomp.core.files import write_atomic

FOLDER = Path("docs/results")
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one study."""

    name: str
    folder: Path = FOLDER

    @property
    def path(self) -> Path:
        """The file that holds them."""
        return self.folder / f"{self.name}.jsonl"

    def read(self) -> list[Row]:
        """All rows in the order they were first added; none when the study has not run. Raises ValueError, naming the
        line, for what is no row."""
        if not self.path.is_file():
            return []
        found = []
        for number, line in enumerate(self.path.read_text("utf8").splitlines(), 1):
            try:
                row = json.loads(line)
                row["key"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}, line {number}: no row ({error!r}); remove the line"
                ) from error
            found.append(row)
        return found

    def add(self, row: Row) -> None:
        """Append `row`, or put it in place of the row with the same key; a crash leaves the old file or the new one."""
        kept = self.read()
        places = [index for index, old in enumerate(kept) if old["key"] == row["key"]]
        kept = [row if index in places else old for index, old in enumerate(kept)] if places else [*kept, row]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, "".join(f"{json.dumps(item)}\n" for item in kept))

    def has(self, key: str, **same: Any) -> bool:
        """Whether there is a row with this key whose other entries equal `same`: what the study would run again."""
        return any(
            row["key"] == key and all(row.get(name) == value for name, value in same.items())
            for row in self.read()
        )


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
            "stackcomp": stackcomp.__version__,
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
        "instructions": torch.backends.cpu.get_cpu_capability(),
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
