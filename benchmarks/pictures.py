"""Pictures of results, as SVG text: the STS benchmark's curves, and the quickstart's table as a terminal shows it.

The colours are two of Okabe and Ito's, told apart with any colour vision; line style and marker say the same again.
"""

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stackcomp.core.ledger import Ledger
from stackcomp.studies.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE = "#0072B2", "#D55E00"
_STYLES = {  # name, colour, marker
    ("DenseSparse", False): ("dense-sparse", BLUE, "o"),
    ("DenseSparse", True): ("dense-sparse, then int8", BLUE, "o"),
    ("LowRank", False): ("low rank", ORANGE, "s"),
    ("LowRank", True): ("low rank, then int8", ORANGE, "s"),
    ("Int8Weights", True): ("int8 alone", "0.2", "D"),
}


def stsb(rows: Sequence[Row]) -> str:
    """Score against encoder compression: each method in floating point and with int8 on top, the dense line and its
    noise."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    (dense,) = (row for row in rows if row["method"] == "dense")
    look = {
        "svg.hashsalt": "stackcomp",
        "font.size": 14,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(look):
        figure = Figure(figsize=(7, 5.4), layout="constrained")
        axes = figure.add_subplot()
        low, high = dense["score"] - dense["noise"], dense["score"] + dense["noise"]
        axes.axhline(dense["score"], color="0.35", linewidth=1.5, label=f"as it came: {dense['score']:.2f}")
        axes.axhspan(low, high, color="0.9", linewidth=0, label="its noise (95%)")
        for method in ("DenseSparse", "LowRank"):
            for int8 in (False, True):
                _curve(axes, rows, method, int8)
        _curve(axes, rows, "Int8Weights", True)
        axes.set_xscale("log")
        reached = max(row["layer_compression"] or 1 for row in rows)
        ticks = [tick for tick in (1.5, 2, 3, 4, 6, 8, 12, 16, 24) if tick <= reached * 1.3]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticklabels([f"{tick:g}x" for tick in ticks])
        axes.set_xlabel("encoder compression, all bytes counted (log scale)")
        axes.set_ylabel("Spearman x 100, STS-B test")
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        figure.legend(loc="outside lower center", ncols=2, fontsize=12, frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


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
