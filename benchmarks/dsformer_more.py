"""The smaller studies of DSFormer as Markdown: its options (options.py), the metrics of errors (metrics.py), and on a decoder (decoder.py).

Each is a grid of scores: a line a method or option, a column a budget or task. Only finished rows count.
"""

from collections.abc import Callable, Sequence

from benchmarks.dsformer import TASKS
from benchmarks.tables import made_by, not_run, plus_minus, table
from stackcomp.studies.rows import Row

AS_IN_TABLE = "as in the table"

OPTIONS = """\
One option of STF changed at a time around the recipe of the table with gradients, at an encoder compression of 3.57x; one seed. In
brackets: the score less that of the recipe."""

METRICS = """\
A factorization keeps small the errors of the weight itself, of the layer's outputs (*inputs*), or of what the model says (*inputs and
gradients*, no label read; this is what `DenseSparse` and `LowRank` do unless told otherwise, while the tables above have *inputs*, as
published methods do, but for the lines that say *gradients*). STS-B, one seed. Nothing is trained."""

DECODER = """\
SmolLM2-135M after factorizing alone: no gradient step, the same calibration text and the same bytes for both. Figures are perplexities
on WikiText-2, so lower is better. The model comes as a file of 4 bits, from which it was read; all of it is relative to that."""


def options(rows: Sequence[Row]) -> str:
    """A line an option: its score on each task, and how far it is behind the recipe of the table."""
    done = [row for row in _finished(rows) if row["labels"]["method"] != "dense"]
    if not done:
        return not_run("options")
    recipe = {row["labels"]["task"]: row["score"] for row in done if row["labels"]["method"] == AS_IN_TABLE}

    def cell(row: Row) -> str:
        task = row["labels"]["task"]
        said = plus_minus(row["score"], row["noise"])
        compared = task in recipe and row["labels"]["method"] != AS_IN_TABLE
        return f"{said} ({row['score'] - recipe[task]:+.2f})" if compared else said

    tasks = _labels(done, "task")
    grid = _grid(done, "method", "task", cell, [TASKS[task] for task in tasks], tasks)
    return "\n\n".join([OPTIONS, grid, made_by("options", done)])


def metrics(rows: Sequence[Row]) -> str:
    """A line a method and metric: its score at each ratio, and how far it is from the dense model."""
    done = _finished(rows)
    dense = [row for row in done if row["labels"]["method"] == "dense"]
    compressed = [row for row in done if row not in dense]
    if not dense or not compressed:
        return not_run("metrics")

    def cell(row: Row) -> str:
        return (
            f"{plus_minus(row['score'], row['noise'])} "
            f"({plus_minus(row['difference'], row['difference_noise'], signed=True)})"
        )

    ratios = sorted(_labels(compressed, "ratio"))
    grid = _grid(compressed, "method", "ratio", cell, [f"encoder {ratio:g}x" for ratio in ratios], ratios)
    words = f"The dense model: {plus_minus(dense[0]['score'], dense[0]['noise'])}; in brackets the difference to it."
    return "\n\n".join([METRICS, grid, words, made_by("metrics", done)])


def decoder(rows: Sequence[Row]) -> str:
    """A line a method: its perplexity at each ratio."""
    done = _finished(rows)
    if not done:
        return not_run("decoder")
    ratios = sorted(_labels(done, "ratio"))
    dense = done[0]["steps"][0]
    grid = _grid(
        done,
        "method",
        "ratio",
        lambda row: plus_minus(row["score"], row["noise"]),
        [f"layers {ratio:g}x" for ratio in ratios],
        ratios,
    )
    files = ", ".join(
        f"{row['compression']:.2f}x at {row['labels']['ratio']:g}x"
        for row in sorted(done, key=lambda row: row["labels"]["ratio"])
        if row["labels"]["method"] == "dense-sparse"
    )
    words = f"The dense model: {plus_minus(dense['score'], dense['noise'])}. The whole file becomes {files}."
    return "\n\n".join([DECODER, grid, words, made_by("decoder", done)])


def _finished(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "error" not in row]


def _labels(rows: Sequence[Row], name: str) -> list:
    """The values of a label, in the order in which they come."""
    return list(dict.fromkeys(row["labels"][name] for row in rows))


def _grid(
    rows: Sequence[Row],
    line: str,
    column: str,
    cell: Callable[[Row], str],
    titles: Sequence[str],
    columns: Sequence[object],
) -> str:
    """A line for each value of one label, a column for each of another; a dash where there is no row."""
    found = {(row["labels"][line], row["labels"][column]): cell(row) for row in rows}
    cells = [[name, *(found.get((name, value), "-") for value in columns)] for name in _labels(rows, line)]
    return table([line, *titles], cells)
