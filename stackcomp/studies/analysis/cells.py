"""The rows of a study of combinations, one cell a pipeline: its seeds together.

The baseline of every figure is the model as it came, which each row has as its first step. *File* bytes are those of the
whole weights file; *encoder* bytes are those of all its tensors but the embeddings.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, factorial, hypot, log, sqrt
from statistics import fmean, stdev

from scipy.special import stdtrit

from stackcomp.core.errors import StudyRefused
from stackcomp.studies.rows import Row, direction
from stackcomp.studies.study import Skipped, Techniques


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value, and half of its 95% interval: 0 where it is exact or its noise is not known."""

    value: float
    half: float = 0.0

    @property
    def within_noise(self) -> bool:
        """Whether the interval holds 0."""
        return abs(self.value) <= self.half

    def __str__(self) -> str:
        noise = f" ± {self.half:.2f}" if self.half else ""
        return f"{round(self.value, 2) + 0.0:+.2f}{noise}"  # never -0.00


def estimate(values: Sequence[float], noises: Sequence[float]) -> Estimate:
    """The mean over seeds. Its interval adds, in squares, the spread over seeds (Student's t) and the noise of the
    examples, which all seeds share: the mean of `noises`."""
    spread = 0.0
    if len(values) > 1:
        spread = float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / sqrt(len(values))
    return Estimate(value=fmean(values), half=hypot(spread, fmean(noises)))


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over pipelines: scored on the same examples, it is no less noisy than one of them."""
    return Estimate(value=fmean(one.value for one in estimates), half=fmean(one.half for one in estimates))


def combined(terms: Iterable[tuple[float, Estimate]]) -> Estimate:
    """The sum of weight times estimate; the noises add in squares, as those of independent figures do. Those of pipelines scored
    on the same examples are less: the interval is on the safe side."""
    found = list(terms)
    return Estimate(
        value=sum(weight * one.value for weight, one in found),
        half=hypot(*(weight * one.half for weight, one in found)),
    )


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One pipeline: its techniques in order, their strengths ("" where there is one), and its finished rows, one a seed."""

    passes: tuple[str, ...]
    strengths: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """The techniques in order, each with its strength; without any, the recovery alone or the model as it came."""
        alone = "recovery alone" if len(self.rows[0]["steps"]) > 1 else "dense"
        return _name(self.passes, self.strengths) or alone

    @property
    def seeds(self) -> set[int]:
        """Of its rows."""
        return {row["seed"] for row in self.rows}

    @cached_property
    def size_bytes(self) -> float:
        """Bytes of the weights file."""
        return fmean(row["size_bytes"] for row in self.rows)

    @cached_property
    def encoder_bytes(self) -> float:
        """Bytes of the tensors that are no embeddings."""
        return fmean(map(_encoder, self.rows))

    @cached_property
    def score(self) -> float:
        """On the metric's own scale."""
        return fmean(row["score"] for row in self.rows)

    @cached_property
    def change(self) -> Estimate:
        """Score minus that of the model as it came."""
        return estimate(
            [row["difference"] for row in self.rows], [row["difference_noise"] for row in self.rows]
        )

    @cached_property
    def log_file(self) -> Estimate:
        """log(bytes of the file as it came / bytes of the file)."""
        return _exact([log(row["steps"][0]["size_bytes"] / row["size_bytes"]) for row in self.rows])

    @cached_property
    def log_encoder(self) -> Estimate:
        """The same of the encoder."""
        return _exact([log(_encoder(row["steps"][0]) / _encoder(row)) for row in self.rows])

    @cached_property
    def log_speed(self) -> Estimate | None:
        """log(milliseconds of the model as it came / milliseconds); None where it was not timed."""
        if any(row.get("latency_ratio") is None for row in self.rows):
            return None
        return _exact([-log(row["latency_ratio"]) for row in self.rows])

    @property
    def latency(self) -> float:
        """Milliseconds over those of the model as it came, of a pipeline that was timed."""
        assert self.log_speed is not None
        return exp(-self.log_speed.value)

    @property
    def compression(self) -> float:
        """Of the file."""
        return exp(self.log_file.value)


def _name(passes: Sequence[str], strengths: Sequence[str]) -> str:
    named = zip(passes, strengths, strict=True)
    return " > ".join(f"{name} {strength}".strip() for name, strength in named)


def _techniques(row: Row) -> Techniques:
    return tuple(row["labels"]["passes"]), tuple(row["labels"]["strengths"])


def _encoder(row: Row) -> int:
    return row["size_bytes"] - row["components"]["embeddings"] - row["components"]["header"]


def _exact(values: Sequence[float]) -> Estimate:
    return estimate(values, [0.0] * len(values))


@dataclass(frozen=True, kw_only=True)
class Cells:
    """All finished pipelines of a study, what failed in it, and what was left out as illegal.

    came: the model as it came; dense: what techniques are added to, which is that model with the recovery that every
    pipeline has, if they have one, and None before that has finished; cells: the pipelines with techniques; planned: all pipelines.
    """

    came: Cell
    dense: Cell | None
    cells: tuple[Cell, ...]
    planned: tuple[Techniques, ...] = ()
    failed: tuple[Row, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    @staticmethod
    def of(
        rows: Iterable[Row], skipped: Iterable[Skipped] = (), planned: Iterable[Techniques] = ()
    ) -> "Cells":
        """The cells of `rows`; those without `passes` among their labels are no combinations and are passed over. planned: the pipelines of
        the study, those of `rows` unless said.

        Raises StudyRefused when no pipeline with a technique has finished, and for rows of several tasks or models.
        """
        ours = [row for row in rows if "passes" in row["labels"]]
        done = [row for row in ours if "error" not in row]
        apart = [row["key"] for row in done if row["difference"] is None]
        if apart:
            raise StudyRefused(
                f"{len(apart)} rows, {apart[0]!r} the first of them, have no difference to the model as it came (perplexities over two "
                "vocabularies cannot be compared): leave passes that change the vocabulary out of the study"
            )
        for name in ("task", "split", "limit", "model"):
            if len({str(row[name]) for row in done}) > 1:
                raise StudyRefused(f"rows of more than one {name} cannot be compared: give those of one")
        groups: dict[Techniques, list[Row]] = {}
        for row in done:
            groups.setdefault(_techniques(row), []).append(row)
        cells = [
            Cell(passes=passes, strengths=strengths, rows=tuple(found))
            for (passes, strengths), found in groups.items()
        ]
        stacked = tuple(cell for cell in cells if cell.passes)
        if not stacked:
            raise StudyRefused(
                "no pipeline of a combination has finished: run the study first, or name the folder of its rows; a study whose entries "
                "are no `combinations` has no report"
            )
        came = Cell(passes=(), strengths=(), rows=tuple(_as_it_came(stacked[0].rows)))
        every = tuple(dict.fromkeys([*planned, *map(_techniques, ours)]))
        recovered = any(not passes for passes, _ in every)
        return Cells(
            came=came,
            dense=next((cell for cell in cells if not cell.passes), None if recovered else came),
            cells=stacked,
            planned=every,
            failed=tuple(row for row in ours if "error" in row),
            skipped=tuple(skipped),
        )

    @cached_property
    def passes(self) -> tuple[str, ...]:
        """All techniques, in the order of the study."""
        named = [*(passes for passes, _ in self.planned), *(one.passes for one in self.skipped)]
        return tuple(dict.fromkeys(name for names in named for name in names))

    @property
    def ran(self) -> tuple[Cell, ...]:
        """All pipelines: those with techniques, and before them the recovery alone, if there is one."""
        dense = self.dense
        return self.cells if dense is None or dense is self.came else (dense, *self.cells)

    @property
    def awaited(self) -> list[str]:
        """The single techniques without a finished row."""
        done = {(cell.passes, cell.strengths) for cell in self.cells}
        return [_name(*one) for one in self.planned if len(one[0]) == 1 and one not in done]

    @property
    def seeds(self) -> list[int]:
        """The seeds of all pipelines with techniques."""
        return sorted({row["seed"] for cell in self.cells for row in cell.rows})

    @property
    def timed(self) -> bool:
        """Whether all pipelines were timed."""
        return all(cell.log_speed is not None for cell in self.ran)

    @property
    def metric(self) -> str:
        """What is scored."""
        return self.came.rows[0]["metric"]

    @property
    def sign(self) -> int:
        """1 where a higher score is better, -1 where a lower one is."""
        return direction(self.metric)

    @property
    def bound(self) -> str:
        """What a floor is, in words: lower scores may be the better ones."""
        return "at least" if self.sign > 0 else "at most"

    def misses(self, cell: Cell, floor: float) -> float:
        """By how many points of the metric the cell misses the floor; 0 or less where it reaches it."""
        return self.sign * (floor - cell.score)

    def orders(self, passes: Iterable[str], choice: Mapping[str, str]) -> list[Cell]:
        """The finished orders of these techniques, each at the strength chosen for it."""
        return [cell for cell in self.cells if _is_of(cell.passes, cell.strengths, set(passes), choice)]

    def planned_orders(self, passes: Iterable[str], choice: Mapping[str, str]) -> int:
        """How many orders of these techniques the study has, finished or not."""
        return sum(_is_of(*one, set(passes), choice) for one in self.planned)

    def said(self, passes: Iterable[str]) -> str:
        """Techniques as a set, in words."""
        return " with ".join(name for name in self.passes if name in set(passes)) or "dense"

    def choice(self, best: Cell | None = None) -> dict[str, str]:
        """A strength for every technique: that of `best` where it has it, else the first one of the study."""
        found: dict[str, str] = {}
        ran = [(one.passes, one.strengths) for one in [*([best] if best else []), *self.cells]]
        for passes, strengths in [
            *ran,
            *self.planned,
            *((one.passes, one.strengths) for one in self.skipped),
        ]:
            for name, strength in zip(passes, strengths, strict=True):
                found.setdefault(name, strength)
        return {name: found[name] for name in self.passes}

    def missing(self, passes: Iterable[str], choice: Mapping[str, str]) -> str:
        """Why these techniques have no finished order, in words."""
        wanted, said = set(passes), self.said(passes)
        for row in self.failed:
            if _is_of(row["labels"]["passes"], row["labels"]["strengths"], wanted, choice):
                return f"{said}: failed with {row['error']['type']}: {row['error']['message']}"
        illegal = [one for one in self.skipped if _is_of(one.passes, one.strengths, wanted, choice)]
        if len(illegal) == factorial(len(wanted)):
            return f"{said}: no order is legal: {'; '.join(dict.fromkeys(one.reason for one in illegal))}"
        return f"{said}: not run yet"


def _is_of(
    passes: Sequence[str], strengths: Sequence[str], wanted: set[str], choice: Mapping[str, str]
) -> bool:
    """Whether a pipeline is an order of the wanted techniques at the chosen strengths."""
    return set(passes) == wanted and all(
        choice[name] == strength for name, strength in zip(passes, strengths, strict=True)
    )


def _as_it_came(rows: Iterable[Row]) -> list[Row]:
    """The first step of each row as a row of its own."""
    return [
        {
            **row["steps"][0],
            "latency_ratio": None if row.get("latency_ratio") is None else 1.0,
            "seed": row["seed"],
            "steps": row["steps"][:1],
        }
        for row in rows
    ]
