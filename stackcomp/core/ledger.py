"""The ledger: one row a pass, every figure measured on the checkpoint as it was reloaded.

Sizes are bytes of the saved weights file, by component, and sum to its length. *compression* is the whole
file's, dense / compressed; *layer compression* counts only the linear weights that a pass of the pipeline changes
(`encoder compression` when these are the encoder).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from stackcomp.core.errors import CheckpointError

LEFT_DENSE = "left dense"  # how a finding begins of a layer that a pass left as it was
FORMAT = 1
RUNNING = "running.json"  # the ledger of a run until it ends, beside what an earlier run left in the folder


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Score and speed of one checkpoint.

    score: on the metric's 0-100 scale (perplexity as it is); noise: half its 95% bootstrap interval;
    difference: score minus that of the model as it came, with its own paired-bootstrap noise; output_error: the share of what the outputs
    of the model as it came tell examples apart by that is missed, which says how far apart two models are where scores do not; latency:
    milliseconds a batch, and the ratio to the model as it came (below 1 is faster), interleaved in one
    process; seconds: what all this took.
    """

    metric: str | None = None
    score: float | None = None
    noise: float | None = None
    difference: float | None = None
    difference_noise: float | None = None
    output_error: float | None = None
    examples: int | None = None
    latency_ms: float | None = None
    latency_ratio: float | None = None
    latency_batch: int | None = None
    latency_length: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One pass, or the model as it came (step 0)."""

    step: int
    name: str
    declaration: str
    fingerprint: str
    seed: int
    seconds: float
    peak_memory_bytes: int
    components: Mapping[str, int]
    layer_bytes: int
    findings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    machine: Mapping[str, Any] = field(default_factory=dict[str, Any])
    measured: Measured = Measured()

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights file."""
        return sum(self.components.values())


@dataclass(frozen=True)
class Ledger:
    """The rows in order; the first is the model as it came."""

    rows: tuple[Row, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON object with a format version."""
        return {"format": FORMAT, "rows": [asdict(row) | {"size_bytes": row.size_bytes} for row in self.rows]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Ledger":
        """Read what `to_json` wrote; raises CheckpointError for another format."""
        given: Any = data
        if not isinstance(given, dict):
            raise CheckpointError("the ledger is damaged (no JSON object): run the pipeline again")
        if data.get("format") != FORMAT:
            raise CheckpointError(
                f"ledger of format {data.get('format')!r}, this version reads {FORMAT}: update stackcomp"
            )
        rows: list[Row] = []
        for raw in data["rows"]:
            measured = Measured(**raw["measured"])
            rest = {name: value for name, value in raw.items() if name not in ("size_bytes", "measured")}
            row = Row(**rest, measured=measured)
            if row.size_bytes != raw["size_bytes"]:
                raise CheckpointError(
                    f"ledger row {row.step}: components sum to {row.size_bytes}, not {raw['size_bytes']}; it was altered"
                )
            rows.append(row)
        return Ledger(tuple(rows))

    def with_row(self, row: Row) -> "Ledger":
        """The ledger with `row` added, or put in place of the row of the same step."""
        return Ledger((*(other for other in self.rows if other.step < row.step), row))

    def compression(self, row: Row) -> float:
        """Whole-file compression at `row`."""
        return self.rows[0].size_bytes / row.size_bytes

    def layer_compression(self, row: Row) -> float | None:
        """Compression of the weights that the pipeline changes; None when it changes none."""
        return self.rows[0].layer_bytes / row.layer_bytes if row.layer_bytes else None

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Column titles and one list of cells a row, for the terminal, Markdown and pictures alike."""
        metric = self.rows[0].measured.metric if self.rows else None
        titles = [
            "pass",
            "size",
            "whole file",
            "layers",
            f"{metric or 'score'} ± noise",
            "vs dense",
            "output error",
            "latency",
            "seconds",
        ]
        shown = [self._cells(row) for row in self.rows]
        if all(row.measured.output_error is None for row in self.rows):
            place = titles.index("output error")
            for cells in (titles, *shown):
                del cells[place]
        return titles, shown

    def _cells(self, row: Row) -> list[str]:
        found = row.measured
        layers = self.layer_compression(row)
        return [
            "dense" if row.step == 0 else f"{row.step} {row.name}",
            f"{row.size_bytes / 1e6:.2f} MB",
            f"{self.compression(row):.2f}x",
            "-" if layers is None else f"{layers:.2f}x",
            "-" if found.score is None else f"{found.score:.2f} ± {found.noise:.2f}",
            "-" if found.difference is None else f"{found.difference:+.2f} ± {found.difference_noise:.2f}",
            "-" if found.output_error is None else f"{found.output_error:.4f}",
            _latency(row),
            f"{row.seconds:.1f}",
        ]

    def __str__(self) -> str:
        """The table as plain text."""
        titles, rows = self.table()
        widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
        lines = [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
            for cells in [titles, *rows]
        ]
        rule = "  ".join("-" * width for width in widths)
        return "\n".join(line.rstrip() for line in [lines[0], rule, *lines[1:], *self._left()])

    def _left(self) -> Iterator[str]:
        """A line for each pass that left some of its layers dense."""
        for row in self.rows:
            layers = row.findings.get("layers", {})
            left = [id_ for id_, said in layers.items() if str(said).startswith(LEFT_DENSE)]
            if left:
                yield f"{row.step} {row.name}: {len(left)} of {len(layers)} layers left dense, {left[0]} first (why: show --json)"


def _latency(row: Row) -> str:
    """Milliseconds of the model as it came, and the ratio to it of every other: of times taken minutes apart only that can be compared."""
    found = row.measured
    if found.latency_ms is None:
        return "-"
    return f"{found.latency_ratio:.2f}x" if row.step else f"{found.latency_ms:.1f} ms"


def read(text: str) -> Ledger:
    """The ledger in a JSON text; raises CheckpointError when it is damaged."""
    try:
        return Ledger.from_json(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the ledger is damaged ({error}); run the pipeline again") from error
