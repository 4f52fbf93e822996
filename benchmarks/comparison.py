"""What the rows of a study that compares methods say together: means over seeds, paired differences, compression at equal score.

Entries are labelled with a task, a method and an asked ratio; the model that all start from is the method "dense". Every
interval is the half-width of a 95% interval. Only finished rows of today's declarations count.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, hypot, inf, log, sqrt
from statistics import fmean
from typing import Any, Literal

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.special import stdtrit

from stackcomp.studies import Entry, Study
from stackcomp.studies.analysis.cells import Estimate as Interval
from stackcomp.studies.analysis.cells import estimate
from stackcomp.studies.rows import Row

Asked = tuple[str, float | None]  # a method and its ratio
Figure = Literal["score", "nearness"]  # of a row: the second is -log of the error of its outputs
DENSE: Asked = ("dense", None)
SLOPE = 1e-9  # of a score from a point to the next, so that a flat curve, too, has one compression at a score
DRAWS = 1000  # of pairs of task and seed, for an interval


@dataclass(frozen=True, kw_only=True)
class Estimate(Interval):
    """A value and the half-width of its 95% interval, of `count` rows or pairs in `tasks` tasks."""

    count: int
    tasks: int = 1


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method at one ratio on one task: the rows there are, one a seed, how many are planned, and how many failed."""

    rows: Sequence[Row]
    planned: int
    failed: int = 0

    @property
    def score(self) -> Estimate:
        """Mean over seeds: a t-interval over them and the bootstrap noise of the examples."""
        found = estimate([row["score"] for row in self.rows], [row["noise"] for row in self.rows])
        return Estimate(value=found.value, half=found.half, count=len(self.rows))

    def mean(self, name: str) -> float:
        """Mean of a figure over the seeds."""
        return fmean(row[name] for row in self.rows)

    def beside(self, dense: "Cell") -> float:
        """The mean score, if these seeds' dense models scored as all seeds' do on average: so far as some seeds are missing, what their
        dense models are worth is no merit of a method."""
        return dense.score.value + self.mean("difference")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Score against encoder compression, from the lowest compression to the highest."""

    points: Sequence[tuple[float, float]]

    @property
    def falling(self) -> "Curve":
        """The falling curve nearest to this one, by least squares: where a score rises with compression, noise made it."""
        fitted = isotonic_regression([score for _, score in self.points], increasing=False).x
        return Curve(
            points=[
                (compression, float(score) - SLOPE * place)
                for place, ((compression, _), score) in enumerate(zip(self.points, fitted, strict=True))
            ]
        )

    @property
    def scores(self) -> tuple[float, float]:
        """The lowest and the highest score."""
        found = [score for _, score in self.points]
        return min(found), max(found)

    def compression(self, score: float) -> float:
        """The compression at `score`, linear in its logarithm between points."""
        rising = self.points[::-1]
        return exp(np.interp(score, [point[1] for point in rising], [log(point[0]) for point in rising]))


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Compression of one curve over that of another at `score`, or in words why there is no figure."""

    value: float | None = None
    score: float | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Equal:
    """Compression of one method over that of another at equal mean score: the ratio, and the interval of 95% of the draws of `count`
    pairs of task and seed that have a figure, which are the share `drawn`."""

    ratio: Ratio
    low: float
    high: float
    drawn: float
    count: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The entries of `study`, and the rows there are of them. by: the label that says how far each method was to compress, below called
    its ratio; that of the dense model is None."""

    study: Study
    rows: Sequence[Row]
    by: str = "ratio"

    @cached_property
    def finished(self) -> list[Row]:
        """The rows of finished entries, in the order of the study, all beside the dense models of the study.

        The same training on another processor gives another dense model, up to a point of score away: a row that came of one is told
        as the score of ours plus its own difference to that one.
        """
        done = [row for row in self.study.own(self.rows) if "error" not in row]
        dense = {
            (row["labels"]["task"], row["seed"]): row["score"]
            for row in done
            if row["labels"]["method"] == DENSE[0]
        }
        return [
            row
            if row["labels"]["method"] == DENSE[0]
            else {
                **row,
                "score": dense.get((row["labels"]["task"], row["seed"]), _parent(row)) + row["difference"],
            }
            for row in done
        ]

    @cached_property
    def failed(self) -> list[Row]:
        """The rows that say why an entry failed."""
        return [row for row in self.study.own(self.rows) if "error" in row]

    @cached_property
    def missing(self) -> list[Entry]:
        """The entries without a finished row."""
        done = {row["key"] for row in self.finished}
        return [entry for entry in self.study.entries if entry.key not in done]

    @cached_property
    def tasks(self) -> list[str]:
        """All tasks, in the order of the study."""
        return list(dict.fromkeys(entry.labels["task"] for entry in self.study.entries))

    def methods(self, ratio: float) -> list[str]:
        """All methods that are to run at a ratio, in the order of the study."""
        found = (self._place(entry.labels) for entry in self.study.entries)
        return list(dict.fromkeys(method for _, method, asked in found if asked == ratio))

    @cached_property
    def ratios(self) -> list[float]:
        """All ratios that are asked for, in the order of the study."""
        found = (self._place(entry.labels) for entry in self.study.entries)
        return list(dict.fromkeys(asked for *_, asked in found if asked is not None))

    def cell(self, task: str, method: str, ratio: float | None) -> Cell:
        """The rows of one method at one ratio on one task."""
        asked = (task, method, ratio)
        keys = {entry.key for entry in self.study.entries if self._place(entry.labels) == asked}
        return Cell(
            rows=[row for row in self.finished if row["key"] in keys],
            planned=len(keys),
            failed=sum(row["key"] in keys for row in self.failed),
        )

    def cells(self, method: str, ratio: float | None) -> list[Cell]:
        """The cells of a method at a ratio that have rows, one a task."""
        found = [self.cell(task, method, ratio) for task in self.tasks]
        return [cell for cell in found if cell.rows]

    def difference(self, first: Asked, second: Asked) -> Estimate | None:
        """Score of one (method, ratio) minus that of another: the mean over tasks of the mean over seeds that both have.

        The interval is that of the mean over these very tasks: what a method gives differs from task to task, and that is no noise. It
        adds in squares a t-interval over the pairs of a task and seed around the mean of their task, each task weighing the same, where
        some task has two pairs, and the paired bootstrap noise of the examples, which all seeds of a task share: that beside the dense
        model, of two methods both, which is no less than that of their difference. None where there is no pair.
        """
        found = [pairs for task in self.tasks if (pairs := self._pairs(task, first, second))]
        if not found:
            return None
        gaps = [[mine["score"] - other["score"] for mine, other in pairs] for pairs in found]
        weights = [1 / (len(found) * len(pairs)) for pairs in found for _ in pairs]
        around = [gap - fmean(some) for some in gaps for gap in some]
        freedom = len(weights) - len(found)
        spread = _t(freedom) * hypot(*around) / sqrt(freedom) * hypot(*weights) if freedom else 0.0
        noises = [fmean(map(_noise, pairs)) for pairs in found]
        return Estimate(
            value=fmean(map(fmean, gaps)),
            half=hypot(spread, hypot(*noises) / len(found)),
            count=len(weights),
            tasks=len(found),
        )

    def curve(self, task: str, method: str) -> Curve:
        """The means over seeds of a method's ratios; empty unless all of them have rows."""
        cells = [self.cell(task, method, ratio) for ratio in self._asked(method)]
        if not all(cell.rows for cell in cells):
            return Curve(points=())
        return Curve(points=sorted((cell.mean("layer_compression"), cell.score.value) for cell in cells))

    def shared(self, methods: Sequence[str], figure: Figure = "score") -> list[tuple[str, int]]:
        """The pairs of task and seed for which all these methods have the figure at all their ratios."""
        found = [
            set(self._points(method, ratio, figure)) for method in methods for ratio in self._asked(method)
        ]
        return sorted(set.intersection(*found))

    def mean_curve(self, method: str, pairs: Sequence[tuple[str, int]], figure: Figure = "score") -> Curve:
        """The means over tasks of the means over seeds, of these pairs of task and seed, which may repeat."""
        if not pairs:
            return Curve(points=())
        weights = _weights(pairs)
        found = [self._points(method, ratio, figure) for ratio in self._asked(method)]
        means = [np.average([points[pair] for pair in pairs], axis=0, weights=weights) for points in found]
        return Curve(points=sorted((float(compression), float(value)) for compression, value in means))

    def error(self, method: str, ratio: float | None) -> float | None:
        """The error of a method's outputs: the geometric mean over tasks of that over seeds; None where a row does not say it."""
        points = self._points(method, ratio, "nearness")
        if not points or points.keys() != self._points(method, ratio).keys():
            return None
        nearness = [value for _, value in points.values()]
        return exp(-np.average(nearness, weights=_weights([*points])))

    def _asked(self, method: str) -> list[float]:
        """The ratios at which a method is to run."""
        return [ratio for ratio in self.ratios if method in self.methods(ratio)]

    def _points(
        self, method: str, ratio: float | None, figure: Figure = "score"
    ) -> dict[tuple[str, int], tuple[float, float]]:
        """Encoder compression and a figure by task and seed."""
        return self._table.get((method, ratio, figure), {})

    @cached_property
    def _table(self) -> dict[tuple[str, float | None, Figure], dict[tuple[str, int], tuple[float, float]]]:
        """The same by method, ratio and figure."""
        found: dict[tuple[str, float | None, Figure], dict[tuple[str, int], tuple[float, float]]] = {}
        for row in self.finished:
            _, method, ratio = self._place(row["labels"])
            figures: dict[Figure, float] = {"score": row["score"]}
            if row.get("output_error"):  # rows of the first version have none
                figures["nearness"] = -log(row["output_error"])
            for figure, value in figures.items():
                points = found.setdefault((method, ratio, figure), {})
                points[row["labels"]["task"], row["seed"]] = (row["layer_compression"], value)
        return found

    def _place(self, labels: Mapping[str, Any]) -> tuple[str, str, float | None]:
        """Task, method and ratio of an entry or a row."""
        method = labels["method"]
        return labels["task"], method, None if method == DENSE[0] else labels[self.by]

    def _pairs(self, task: str, first: Asked, second: Asked) -> list[tuple[Row, Row]]:
        """Rows of the two with the same seed."""
        others = {row["seed"]: row for row in self.cell(task, *second).rows}
        return [(row, others[row["seed"]]) for row in self.cell(task, *first).rows if row["seed"] in others]


def _weights(pairs: Sequence[tuple[str, int]]) -> list[float]:
    """Of pairs of task and seed in a mean in which every task weighs the same."""
    counts = Counter(task for task, _ in pairs)
    return [1 / (len(counts) * counts[task]) for task, _ in pairs]


def _noise(pair: tuple[Row, Row]) -> float:
    """Of the examples, in the difference of two rows: both are compared with one dense model, which has none to itself."""
    return hypot(*(row["difference_noise"] for row in pair if row["labels"]["method"] != DENSE[0]))


def _parent(row: Row) -> float:
    """The score of the dense model that a row came of."""
    return row["score"] - row["difference"]


def at_equal_score(first: Curve, second: Curve, *, lowest: bool = False) -> Ratio:
    """Compression of `first` over that of `second`, along the falling curves nearest to them, in the middle of the scores that both
    reach, or at the lowest one: that which the better of the two has at its highest compression."""
    if not first.points or not second.points:
        return Ratio(why="not run yet")
    first, second = first.falling, second.falling
    (low, high), (other_low, other_high) = first.scores, second.scores
    if min(high - low, other_high - other_low) < SLOPE * (len(first.points) + len(second.points)):
        return Ratio(why="no figure: a score does not fall with compression")
    if low > other_high:
        bound = first.points[-1][0] / second.points[0][0]
        return Ratio(why=f"no figure: the curves share no score; above {bound:.2f}")
    if high < other_low:
        bound = first.points[0][0] / second.points[-1][0]
        return Ratio(why=f"no figure: the curves share no score; below {bound:.2f}")
    score = max(low, other_low)
    score = score if lowest else (score + min(high, other_high)) / 2
    return Ratio(value=first.compression(score) / second.compression(score), score=score)


def at_equal_mean(
    found: Comparison, first: str, second: str, *, figure: Figure = "score", lowest: bool = False
) -> Equal:
    """Compression of the method `first` over that of `second` at equal mean score over the tasks, or mean of another figure (see
    `at_equal_score`)."""
    pairs = found.shared([first, second], figure)

    def ratio(drawn: Sequence[tuple[str, int]]) -> Ratio:
        curves = found.mean_curve(first, drawn, figure), found.mean_curve(second, drawn, figure)
        return at_equal_score(*curves, lowest=lowest)

    chance = np.random.default_rng(0)
    draws = [
        ratio([pairs[place] for place in chance.integers(len(pairs), size=len(pairs))]) for _ in range(DRAWS)
    ]
    values = [draw.value for draw in draws if draw.value is not None]
    low, high = np.percentile(values, [2.5, 97.5]) if len(pairs) > 1 and values else (0.0, inf)
    return Equal(
        ratio=ratio(pairs), low=float(low), high=float(high), drawn=len(values) / DRAWS, count=len(pairs)
    )


def _t(freedom: int) -> Any:
    """The 97.5% point of Student's t."""
    return float(stdtrit(freedom, 0.975))
