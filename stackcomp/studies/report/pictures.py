"""Pictures as inline SVG and HTML that follow the width of the page: places across are in percent, letters keep their size."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, log, log10
from statistics import median

from stackcomp.studies.analysis import Cell, Cells, Estimate
from stackcomp.studies.report.document import Picture, escape

HEIGHT = 340  # of a plot, in pixels
COMPONENTS = {  # of a file, and their colours
    "values": "first",
    "indices": "fourth",
    "scales": "third",
    "dense": "sixth",
    "embeddings": "second",
    "header": "fifth",
}


@dataclass(frozen=True, kw_only=True)
class Across:
    """What a plot shows across, on a logarithmic axis: the figure of a pipeline, in `unit`s, which the title names."""

    of: Callable[[Cell], float]
    words: str
    title: str
    unit: float = 1.0

    def said(self, cell: Cell) -> str:
        """The figure with its unit."""
        return f"{self.of(cell) / self.unit:.2f} {self.title}"


BYTES = Across(of=lambda cell: cell.size_bytes, words="bytes of the whole file", title="MB", unit=1e6)
LATENCY = Across(
    of=lambda cell: cell.latency,
    words="latency beside that of the dense model in the same process, to the left of 1 faster",
    title="of dense latency",
)


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """The part of a plot that is shown: costs on a logarithmic axis, scores on a linear one, the better ones above.

    sign: -1 where lower scores are better; worst, best: times the sign.
    """

    across: Across
    least: float
    most: float
    worst: float
    best: float
    sign: int

    def x(self, cost: float) -> str:
        """Across, in percent."""
        return f"{100 * log(cost / self.least) / log(self.most / self.least):.2f}%"

    def y(self, score: float) -> float:
        """Down, in pixels; what is not shown is put on the edge."""
        inside = min(max(self.sign * score, self.worst), self.best)
        return round(HEIGHT * (self.best - inside) / (self.best - self.worst), 1)

    def holds(self, score: float) -> bool:
        """Whether the score is not below the lower edge."""
        return self.sign * score >= self.worst


def pareto(cells: Cells, front: Sequence[Cell], lowest: float, across: Across = BYTES) -> Picture:
    """Score against cost: every pipeline, the front numbered, the model as it came with its noise, the floor."""
    everything = [cells.came, *cells.ran]
    came, noise = cells.came.score, median(cell.change.half for cell in cells.cells)
    frame = _frame(cells, everything, lowest, noise, across)
    high, low = sorted((frame.y(came + noise), frame.y(came - noise)))
    parts = [
        f'<rect x="0" width="100%" y="{high}" height="{low - high:.1f}" fill="var(--band)"/>',
        *_axes(frame, cells.metric),
        _line("0", "100%", frame.y(came), frame.y(came), "var(--ink)"),
        _line("0", "100%", frame.y(lowest), frame.y(lowest), "var(--second)", "6 4"),
    ]
    for larger, smaller in pairwise(front):
        left, right, above, below = (
            frame.x(across.of(smaller)),
            frame.x(across.of(larger)),
            frame.y(larger.score),
            frame.y(smaller.score),
        )
        parts.append(_line(left, right, below, below, "var(--first)"))
        parts.append(_line(right, right, above, below, "var(--first)"))
    parts += [_mark(frame, cell, front) for cell in sorted(everything, key=lambda cell: cell in front)]
    caption = (
        f"Score against {across.words} (logarithmic). Square: the dense model; diamond: one technique; circle: a stack. "
        "Filled, joined and numbered as in the table: the Pareto front. Solid line: the model as it came; grey: how far from "
        "it a score may be by chance, the 95% noise of the difference, in the middle of all pipelines. "
        f"Dashed line: the floor, {lowest:.2f}. Triangle on the lower edge: it scores worse than is shown."
    )
    plot = f'<div class="plot"><svg height="{HEIGHT}" role="img">{"".join(parts)}</svg></div>'
    return _figure(plot, caption)


def _frame(cells: Cells, everything: Sequence[Cell], lowest: float, noise: float, across: Across) -> _Frame:
    """All costs, and the scores that are not far below the floor."""
    costs = [across.of(cell) for cell in everything]
    came = cells.sign * cells.came.score
    depth = max(4 * abs(came - cells.sign * lowest), 2 * noise)
    heights = [cells.sign * cell.score for cell in everything]
    shown = [height for height in heights if height >= came - depth]
    least = min(*shown, came - noise, cells.sign * lowest)
    most = max(*shown, came + noise, cells.sign * lowest)
    room = 0.06 * (most - least) or 1.0
    return _Frame(
        across=across,
        least=min(costs) / 1.12,
        most=max(costs) * 1.12,
        worst=least - room,
        best=most + room,
        sign=cells.sign,
    )


def _axes(frame: _Frame, metric: str) -> list[str]:
    """Ticks and titles of both axes."""
    step = _step(frame.best - frame.worst)
    scores = [step * number for number in range(ceil(frame.worst / step), floor(frame.best / step) + 1)]
    parts: list[str] = []
    for score in scores:
        y = frame.y(frame.sign * score)
        parts.append(_line("0", "100%", y, y, "var(--line)"))
        parts.append(_text("0", y + 4, f"{frame.sign * score:g}", "end", "quiet", -8))
    for cost in _ticks(frame.least, frame.most):
        x = frame.x(cost)
        parts.append(_line(x, x, HEIGHT, HEIGHT + 5, "var(--quiet)"))
        parts.append(_text(x, HEIGHT + 20, f"{cost / frame.across.unit:g}", "middle", "quiet"))
    parts.append(_text("100%", HEIGHT + 40, frame.across.title, "end"))
    parts.append(_text("0", -4, metric, "start", "", -40))
    return parts


def _step(span: float) -> float:
    """The distance of about five ticks: 1, 2 or 5 times a power of ten."""
    power = 10 ** floor(log10(span / 5))
    return next(power * many for many in (1, 2, 5, 10) if power * many >= span / 5)


def _ticks(least: float, most: float) -> list[float]:
    """Round numbers between the two, few enough for a narrow page."""
    powers = [10.0**power for power in range(floor(log10(least)), ceil(log10(most)) + 1)]
    for many in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1,)):
        found = [part * power for power in powers for part in many if least <= part * power <= most]
        if len(found) <= 7:
            return found
    return []


def _mark(frame: _Frame, cell: Cell, front: Sequence[Cell]) -> str:
    """The cell's symbol with its name for a pointer that rests on it; on the front, its interval and number."""
    x, y = frame.x(frame.across.of(cell)), frame.y(cell.score)
    on_front = cell in front
    fill = "var(--first)" if on_front else "none"
    stroke = "var(--first)" if on_front else "var(--quiet)"
    shapes = {0: "M-5 -5H5V5H-5Z", 1: "M0 -7L7 0L0 7L-7 0Z"}
    shape = shapes.get(len(cell.passes), "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0 -5 0Z")
    if not frame.holds(cell.score):
        shape = "M-6 -5H6L0 6Z"
    said = escape(f"{cell.name}: {cell.score:.2f}, {frame.across.said(cell)}")
    # a path has no percent: a group at the place, by an inner svg
    symbol = f'<svg x="{x}" y="{y}"><path d="{shape}" fill="{fill}" stroke="{stroke}"><title>{said}</title></path></svg>'
    if not on_front:
        return symbol
    half = cell.change.half
    ends = frame.y(cell.score - half), frame.y(cell.score + half)
    number = _text(x, y - 9, str(front.index(cell) + 1), "end", "", -7)
    return _line(x, x, *ends, "var(--first)") + symbol + number


def _line(x1: str, x2: str, y1: float, y2: float, colour: str, dashes: str = "none") -> str:
    return f'<line x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}" stroke="{colour}" stroke-width="1.2" stroke-dasharray="{dashes}"/>'


def _text(x: str, y: float, words: str, anchor: str, kind: str = "", dx: float = 0) -> str:
    return f'<text x="{x}" y="{y}" dx="{dx}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def bars(items: Sequence[tuple[str, Estimate, str]], sign: int = 1) -> Picture:
    """A bar an item from a common zero, to the right where it is above 0, with its interval; each with its words. sign: -1 where what is
    below 0 is the better."""
    low = min(0.0, *(one.value - one.half for _, one, _ in items))
    high = max(0.0, *(one.value + one.half for _, one, _ in items))
    span = (high - low) or 1.0

    def across(value: float) -> float:
        return 100 * (value - low) / span

    lines: list[str] = []
    for name, one, words in items:
        begin, end = sorted((across(0.0), across(one.value)))
        colour = "var(--first)" if sign * one.value >= 0 else "var(--second)"
        bar = f'<span style="left:{begin:.2f}%;width:{end - begin:.2f}%;background:{colour}"></span>'
        noise = f'<span class="whisker" style="left:{across(one.value - one.half):.2f}%;width:{200 * one.half / span:.2f}%"></span>'
        zero = f'<span class="zero" style="left:{across(0.0):.2f}%"></span>'
        track = f'<div class="track">{bar}{noise if one.half else ""}{zero}</div>'
        lines.append(f"<div>{escape(name)}</div>{track}<div>{escape(words)}</div>")
    return Picture(f'<div class="bars">{"".join(lines)}</div>')


def components(steps: Sequence[tuple[str, Mapping[str, int]]], caption: str) -> Picture:
    """Bytes of the file by component after every step, as parts of the first file's."""
    whole = sum(steps[0][1].values())
    lines: list[str] = []
    for name, sizes in steps:
        at, spans = 0.0, ""
        for part, colour in COMPONENTS.items():
            width = 100 * sizes[part] / whole
            spans += f'<span title="{part}" style="left:{at:.2f}%;width:{width:.2f}%;background:var(--{colour})"></span>'
            at += width
        lines.append(
            f'<div>{escape(name)}</div><div class="track">{spans}</div><div>{sum(sizes.values()) / 1e6:.2f} MB</div>'
        )
    there = [part for part in COMPONENTS if any(sizes[part] for _, sizes in steps)]
    key = "".join(
        f'<span class="key" style="background:var(--{COMPONENTS[part]})"></span>{part}' for part in there
    )
    return _figure(f'<div>{key}</div><div class="bars">{"".join(lines)}</div>', caption)


def _figure(inside: str, caption: str) -> Picture:
    return Picture(f"<figure>{inside}<figcaption>{escape(caption)}</figcaption></figure>")
