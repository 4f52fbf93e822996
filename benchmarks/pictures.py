"""Pictures of results, as SVG text: the STS benchmark's curves, the quickstart's table as a terminal shows it, the methods that
DSFormer is compared with, and the methods in few bits.

The colours are Okabe and Ito's, some darkened to be read as text, told apart with any colour vision; line style and marker say the same
again. Every picture has a white ground, so that it reads on dark pages too.
"""

import io
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import inf
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.comparison import DENSE, Comparison
from stackcomp.core.ledger import Ledger
from stackcomp.studies.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE = "#0072B2", "#D55E00"
_STYLES = {  # name, colour, marker
    ("DenseSparse", False): ("dense-sparse", BLUE, "o"),
    ("DenseSparse", True): ("dense-sparse, then int8", BLUE, "o"),
    ("LowRank", False): ("low rank", ORANGE, "s"),
    ("LowRank", True): ("low rank, then int8", ORANGE, "s"),
    ("Int8Weights", True): ("int8 alone", "0.2", "D"),
}
GREEN, PURPLE, GREY = "#007A5A", "#9C4478", "0.35"
_METHODS = {  # name, colour, marker, line
    "STF": ("DSFormer (STF)", BLUE, "o", "-"),
    "conventional": ("conventional", ORANGE, "s", "-"),
    "STF, plain start": ("DSFormer,\nplain start", BLUE, "p", ":"),
    "conventional, plain start": ("conventional,\nplain start", ORANGE, "s", ":"),
    "STF, gradients": ("DSFormer,\ngradients", BLUE, "h", "-."),
    "conventional, gradients": ("conventional,\ngradients", ORANGE, "P", "-."),
    "data-aware SVD": ("data-aware SVD", GREEN, "^", "--"),
    "data-aware SVD, gradients": ("data-aware SVD,\ngradients", GREEN, ">", "-."),
    "SVD": ("SVD", GREEN, "v", ""),
    "FWSVD": ("FWSVD", GREEN, "<", ""),
    "1:3 sparsity": ("1:3 sparsity", PURPLE, "D", ""),
    "movement pruning": ("movement pruning", PURPLE, "P", ""),
    "2 layers": ("2 layers", GREY, "X", ""),
    "2 layers, hidden states": ("2 layers,\nhidden states", GREY, "*", ""),
}
_PLAIN = "plain start"  # these, too, must not flatten the others
_FAR_BELOW = ("pruned, int4",)  # what must not flatten the other lines
_FEW_BITS = {  # methods that are one line, and its name, colour, marker, line
    ("dense-sparse, int4",): ("dense-sparse,\nint4", BLUE, "o", "-"),
    ("dense-sparse, int8",): ("dense-sparse,\nint8", BLUE, "o", ":"),
    ("STF, int4", "STF, GPTQ int4"): ("best of STF", BLUE, "p", ""),
    ("low rank, int4",): ("low rank,\nint4", GREEN, "^", "--"),
    ("low rank, int8",): ("low rank,\nint8", GREEN, "^", ":"),
    ("rounded, trained", "ternary, trained", "binary, trained"): (
        "best rounding,\ntrained",
        ORANGE,
        "s",
        "-",
    ),
    _FAR_BELOW: ("pruned,\nint4", PURPLE, "D", "-."),
}


def stsb(rows: Sequence[Row], rounded: Sequence[Row] = ()) -> str:
    """Score against encoder compression: each method in floating point and with int8 on top, the dense line and its
    noise. rounded: rows of plain rounding to fewer bits, to read all of them beside."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    (dense,) = (row for row in rows if row["method"] == "dense")
    with rc_context(_look(14)):
        figure = Figure(figsize=(7, 5.4), layout="constrained")
        axes = figure.add_subplot()
        low, high = dense["score"] - dense["noise"], dense["score"] + dense["noise"]
        axes.axhline(dense["score"], color="0.35", linewidth=1.5, label=f"as it came: {dense['score']:.2f}")
        axes.axhspan(low, high, color="0.9", linewidth=0, label="its noise (95%)")
        for method in ("DenseSparse", "LowRank"):
            for int8 in (False, True):
                _curve(axes, rows, method, int8)
        _curve(axes, rows, "Int8Weights", True)
        for row in rounded:
            place = row["layer_compression"], row["score"]
            first = row is rounded[0]
            axes.plot(*place, "*", color="0.2", markersize=13, label="plain rounding" if first else None)
            axes.annotate(
                row["key"].partition(" every")[0], place, (11, 0), textcoords="offset points", va="center"
            )
        reached = max(row["layer_compression"] or 1 for row in rows)
        ticks = [tick for tick in (1.5, 2, 3, 4, 6, 8, 12, 16, 24) if tick <= reached * 1.3]
        _logarithmic(axes, {tick: f"{tick:g}x" for tick in ticks})
        axes.set_xlabel("encoder compression, all bytes counted (log scale)")
        axes.set_ylabel("Spearman x 100, STS-B test")
        figure.legend(loc="outside lower center", ncols=2, fontsize=12, frameon=False)
        return _svg(figure)


def _curve(axes: "Axes", rows: Sequence[Row], method: str, int8: bool) -> None:
    name, colour, marker = _STYLES[method, int8]
    points = sorted(
        (row["layer_compression"], row["score"])
        for row in rows
        if (row["method"], row["int8"]) == (method, int8)
    )
    if not points:
        return
    axes.plot(
        *zip(*points, strict=True),
        color=colour,
        marker=marker,
        markersize=8,
        linewidth=2.2,
        linestyle="--" if int8 else "-",
        markerfacecolor="white" if int8 else colour,
        label=name,
    )


def dsformer(found: Comparison, names: Mapping[str, str]) -> str:
    """Score against the bytes of the encoder, one panel a task: every method, and the dense model with the noise of a difference to it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_look(13)):
        figure = Figure(figsize=(16, 12), layout="constrained")
        grid = figure.subplots(2, (len(found.tasks) + 1) // 2, squeeze=False).flat
        for axes, task in zip(grid, found.tasks, strict=False):
            came = found.cell(task, *DENSE)
            drawn = _of_task(found, task) if came.rows else {}
            if drawn:
                _panel(axes, drawn, came.score.value, came.rows[0]["metric"])
                _bytes(axes, [row for row in found.finished if row["labels"]["task"] == task], drawn)
            else:
                _say_not_run(axes)
            axes.set_title(names[task], loc="left", fontweight="bold")
        figure.supxlabel(_POINTS)
        return _svg(figure)


def dsformer_mean(found: Comparison) -> str:
    """The mean over all tasks of the distance to the dense model, against the bytes of the encoder: every method that has all tasks."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_look(13)):
        figure = Figure(figsize=(13, 7.5), layout="constrained")
        axes = figure.add_subplot()
        if drawn := _of_mean(found):
            _panel(axes, drawn, 0.0, f"points against dense, mean of {len(found.tasks)} tasks")
            _bytes(axes, found.finished, drawn)
        else:
            _say_not_run(axes)
        figure.supxlabel(_POINTS)
        return _svg(figure)


_DOUBT = "grey: 95% noise of a difference to dense"
_POINTS = (
    "encoder compression, every index counted (log scale), and below it megabytes of encoder and file\n"
    f"points: mean distance to the dense model of the same seed; {_DOUBT}"
)


class _Point(NamedTuple):
    compression: float
    value: float
    noise: float  # of its difference to the dense model


def _of_task(found: Comparison, task: str) -> dict[str, list[_Point]]:
    """The points of every method that has rows on a task."""
    came = found.cell(task, *DENSE)
    drawn: dict[str, list[_Point]] = {}
    for method in _METHODS:
        cells = [cell for ratio in found.ratios if (cell := found.cell(task, method, ratio)).rows]
        if cells:
            drawn[method] = sorted(
                _Point(cell.mean("layer_compression"), cell.beside(came), cell.mean("difference_noise"))
                for cell in cells
            )
    return drawn


def _of_mean(found: Comparison) -> dict[str, list[_Point]]:
    """The mean points of every method at every ratio that has rows on all tasks."""
    drawn: dict[str, list[_Point]] = {}
    for method in _METHODS:
        for ratio in sorted(found.ratios):
            gap = found.difference((method, ratio), DENSE)
            if gap and gap.tasks == len(found.tasks):
                cells = found.cells(method, ratio)
                compression = sum(cell.mean("layer_compression") for cell in cells) / len(cells)
                drawn.setdefault(method, []).append(_Point(compression, gap.value, gap.half))
    return drawn


def _say_not_run(axes: "Axes") -> None:
    axes.text(0.5, 0.5, "not run yet", transform=axes.transAxes, ha="center", color=GREY)
    axes.set_axis_off()


def _panel(axes: "Axes", drawn: Mapping[str, Sequence[_Point]], dense: float, figure: str) -> None:
    """Every method's points and name beside the dense model; figure: what they are."""
    lines = {name for name in drawn if _METHODS[name][3]}
    near = [point.value for name in lines if not name.endswith(_PLAIN) for point in drawn[name]]
    floor = _floor([dense, *near])
    every = [point for points in drawn.values() for point in points]
    heights = [max(point.value, floor) for point in every] + [dense]
    gap = (max(heights) - min(heights) or 1.0) / 16
    axes.set_ylim(min(heights) - 1.5 * gap, max(heights) + 2 * gap)
    noise = median(point.noise for point in every if point.value >= floor)
    axes.axhspan(dense - noise, dense + noise, color="0.9", linewidth=0)
    ends = [point.compression for point in every]
    start, end = min(ends) / 1.03, max(ends) * 1.03
    axes.hlines(dense, start, end, color="0.2", linewidth=1.5)
    named = f"dense {dense:.1f}" if dense else "dense"
    left = [_Label(f"{named} ± {noise:.1f}", "0.2", (start, dense))]
    right: list[_Label] = []
    for method, points in drawn.items():
        name, colour, marker, line = _METHODS[method]
        width, size = (3.0, 9) if method == "STF" else (1.8, 7)
        shown = [(point.compression, max(point.value, floor)) for point in points]
        axes.plot(
            *zip(*shown, strict=True),
            color=colour,
            marker=marker,
            linestyle=line,
            linewidth=width,
            markersize=size,
        )
        low = [f"{point.value:.1f}" for point in points if point.value < floor]
        below = f" {', '.join(low)} ↓" if low else ""
        (right if method in lines else left).append(_Label(name + below, colour, shown[-1]))
    _write(axes, left, start / 1.03, gap, "right")
    _write(axes, right, end * 1.03, gap, "left")
    beside = (end / start) ** 0.8  # room for labels
    axes.set_xlim(start / beside, end * beside)
    axes.set_ylabel(figure)


def _bytes(axes: "Axes", rows: Sequence[Row], drawn: Mapping[str, Sequence[_Point]]) -> None:
    """Ticks at the ratios of these rows, as far as points are drawn, each with the megabytes of encoder and file."""
    end = 1.01 * max(point.compression for points in drawn.values() for point in points)
    some = next(row for row in rows if row["layer_compression"])
    encoder, file = some["layer_bytes"] * some["layer_compression"], some["size_bytes"] * some["compression"]
    named = {
        ratio: f"{ratio:g}x\n{encoder / ratio / 1e6:.0f}\n{(file - encoder + encoder / ratio) / 1e6:.0f}"
        for ratio in sorted({row["labels"]["ratio"] for row in rows if row["labels"]["method"] != DENSE[0]})
        if ratio <= end
    }
    room = axes.get_xlim()
    _logarithmic(axes, named)
    axes.set_xlim(room)


def low_bit(found: Comparison, names: Mapping[str, str]) -> str:
    """Score against bits a weight, one panel a task that has rows: a line a method, the dense model and the noise of a difference to it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    tasks = [task for task in found.tasks if len(_few_bits(found, task)) > 1]
    with rc_context(_look(13)):
        figure = Figure(figsize=(8 * max(len(tasks), 1), 6.4), layout="constrained")
        for axes, task in zip(
            figure.subplots(1, max(len(tasks), 1), squeeze=False).flat, tasks, strict=False
        ):
            _bits_panel(axes, found, task)
            axes.set_title(names[task], loc="left", fontweight="bold")
        figure.supxlabel(f"bits a weight, every byte counted (log scale); {_DOUBT}")
        return _svg(figure)


def _few_bits(found: Comparison, task: str) -> dict[tuple[str, ...], list[tuple[float, float]]]:
    """Bits and score along every line that has points, from many bits to few: at each budget the best of its methods."""
    drawn: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for methods in _FEW_BITS:
        for budget in sorted(found.ratios, reverse=True):
            cells = [cell for method in methods if (cell := found.cell(task, method, budget)).rows]
            if cells:
                best = max(cells, key=lambda cell: cell.score.value)
                point = (32 / best.mean("layer_compression"), best.score.value)
                drawn.setdefault(methods, []).append(point)
    return drawn


def _bits_panel(axes: "Axes", found: Comparison, task: str) -> None:
    drawn = _few_bits(found, task)
    dense = found.cell(task, *DENSE)
    if not dense.rows:
        _say_not_run(axes)
        return
    value = dense.score.value
    scores = [score for methods, points in drawn.items() if methods != _FAR_BELOW for _, score in points]
    floor = _floor([value, *scores])
    shown = {
        methods: [(bits, max(score, floor)) for bits, score in points] for methods, points in drawn.items()
    }
    heights = [score for points in shown.values() for _, score in points] + [value]
    gap = (max(heights) - min(heights) or 1.0) / 16
    budgets = sorted(found.ratios)
    noise = median(
        row["difference_noise"]
        for row in found.finished
        if row["labels"]["task"] == task and row["labels"]["method"] != DENSE[0] and row["score"] >= floor
    )
    axes.axhspan(value - noise, value + noise, color="0.9", linewidth=0)
    axes.axhline(value, color="0.2", linewidth=1.5)
    labels: list[_Label] = []
    for methods, points in shown.items():
        name, colour, marker, line = _FEW_BITS[methods]
        axes.plot(
            *zip(*points, strict=True), color=colour, marker=marker, linestyle=line, linewidth=2, markersize=8
        )
        last = drawn[methods][-1][1]
        below = f" {last:.0f} ↓" if last < floor else ""
        labels.append(_Label(name + below, colour, points[-1]))
    axes.text(budgets[-1], value, f"dense {value:.1f} ± {noise:.1f}", va="bottom", fontsize=12)
    _write(axes, labels, budgets[0] / 1.08, gap, "left")
    axes.set_ylim(min(heights) - 1.5 * gap, max(heights) + 2 * gap)
    _logarithmic(axes, {bits: f"{bits:g}" for bits in budgets})
    axes.set_xlim(budgets[-1] * 1.06, budgets[0] / 1.5)
    axes.set_ylabel(dense.rows[0]["metric"])


def _look(size: int) -> Any:
    """Settings of matplotlib: letters of this size, no frame, and the same names inside whenever a figure is drawn."""
    return {
        "svg.hashsalt": "stackcomp",
        "font.size": size,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }


def _logarithmic(axes: "Axes", ticks: Mapping[float, str]) -> None:
    """A logarithmic axis of compression with these ticks alone, and a grid of scores behind what is drawn."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([*ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticklabels([*ticks.values()], fontsize=11)
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)


def _svg(figure: "Figure") -> str:
    """The figure as text, the same whenever it is drawn."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


class _Label(NamedTuple):
    words: str
    colour: str
    point: tuple[float, float]  # what it names


def _floor(scores: Sequence[float]) -> float:
    """Where the panel ends below, so that what falls far below all lines does not flatten them; it is drawn there, with its score."""
    return min(scores) - 0.6 * (max(scores) - min(scores)) if len(scores) > 1 else -inf


def _write(axes: "Axes", labels: Sequence[_Label], place: float, gap: float, align: str) -> None:
    """Labels in a column at `place`, at least `gap` apart for each of their lines, each tied to the point it names."""
    order = sorted(labels, key=lambda label: label.point[1])
    rooms = [gap * (1 + label.words.count("\n")) for label in order]
    heights = _apart([label.point[1] for label in order], rooms)
    axes.set_ylim(bottom=min(axes.get_ylim()[0], heights[0] - gap if heights else inf))
    for label, height in zip(order, heights, strict=True):
        axes.annotate(
            label.words,
            label.point,
            (place, height),
            color=label.colour,
            ha=align,
            va="center",
            fontsize=12,
            fontweight="bold" if label.words == _METHODS["STF"][0] else "normal",
            linespacing=0.95,
            arrowprops={
                "arrowstyle": "-",
                "color": label.colour,
                "linewidth": 0.6,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 4,
            },
        )


def _apart(heights: Sequence[float], rooms: Sequence[float]) -> list[float]:
    """Rising `heights`, moved as little as it takes for neighbours to have their room."""
    found = list(heights)
    needed = [(one + other) / 2 for one, other in pairwise(rooms)]
    for _ in range(300):
        for place, room in enumerate(needed):
            lack = (room - (found[place + 1] - found[place])) / 2
            if lack > 0:
                found[place], found[place + 1] = found[place] - lack, found[place + 1] + lack
    return found


def terminal(ledger: Ledger, command: str) -> str:
    """A ledger's table under the command that prints it."""
    from rich.console import Console
    from rich.text import Text

    lines = str(ledger).splitlines()
    console = Console(
        record=True, file=io.StringIO(), width=max(map(len, lines)) + 2, color_system="truecolor"
    )
    console.print(Text(f"$ {command}", style="bold green"))
    console.print()
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    drawn = console.export_svg(title="stackcomp", unique_id="ledger")
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)  # a picture must not fetch a font
    return drawn.replace("Fira Code, monospace", "Fira Code, DejaVu Sans Mono, Menlo, Consolas, monospace")
