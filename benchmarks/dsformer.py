"""What a reader sees of the study pipelines/dsformer/table.py, as Markdown: a page of the docs, and its share of the page of results."""

import html
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from math import exp

from benchmarks.command import ROOT
from benchmarks.comparison import DENSE, Cell, Comparison, Equal, Estimate, at_equal_mean, at_equal_score
from benchmarks.tables import command, not_run, plus_minus, table
from stackcomp.core.pipeline_file import read_file
from stackcomp.studies import Study
from stackcomp.studies.rows import Row

RATIO = 2.8  # the one at which all methods are run
STF = "STF"
AGAINST = tuple((f"STF{start}", f"conventional{start}") for start in ("", ", gradients", ", plain start"))
LOW_RANK = ("data-aware SVD", "SVD", "FWSVD")  # the first is run at every ratio
GRADIENTS = ("STF, gradients", "data-aware SVD, gradients")
EQUAL_SCORES = ((STF, LOW_RANK[0]), GRADIENTS, (GRADIENTS[0], LOW_RANK[0]))
TASKS = {"stsb": "STS-B", "reviews": "Rotten Tomatoes", "mrpc": "MRPC", "sst2": "SST-2"}

METHOD = """\
DSFormer ([arXiv:2312.13211](https://arxiv.org/abs/2312.13211)) replaces a weight by a sparse matrix times a small dense one,
`W ~ S D`: each row of W becomes a mix of a few directions that many rows share. W has n rows and m columns and is cut into k
blocks of m / k columns. A block has a basis D of b atoms, and each row of its S keeps s of b coefficients. Low rank is the case
s = b, where every row needs every direction.

- **Conventional practice** factorizes once, freezes the support (which s of b each row keeps) and fine-tunes S and D.
- **STF**, the Straight-Through Factorizer, keeps training W instead. The model runs on the factorized W, the gradient goes straight
  through to W, and W is factorized anew every few steps: supports are learned for the task, in all layers together.

*Plain* starts are factorized for the least error of the weights themselves, as in the paper. The others are *data-aware*, our own: in
the metric of the layers' inputs. Both methods are run from both, so that what the start gives and what learned supports give can be told
apart. With *gradients*, errors are weighed by the gradients at the layers' outputs, too, which is the default of the passes; layers that
matter little may then become much smaller than the others. What starts so near is trained at lower rates, a tenth for low rank and for
frozen supports, half for STF, which factorizes anew less often, and is compared up to 10x: before that little is lost.

The paper reports, for BERT-base, a loss of about 1 point at 2.8x and up to 40% better compression than low rank. Here the model is a
smaller one, and every method gets the same steps, batches, teacher and losses. Embeddings, half of the file, are left alone."""

READING = """\
*Encoder* is the compression of the encoder's linear weights with every index counted; *file* that of the whole file. A score is
the mean over seeds, with their number behind it. All intervals are of 95%, and add in squares a t-interval over seeds, where there are
some, and the bootstrap noise of the test examples, which all seeds share. *vs dense* is the mean over tasks of the score minus that of
the dense model of the same seed. Its interval is that of the mean over these tasks, and not of what a further task would give: each
pair of task and seed is taken around the mean of its task, and the bootstrap is paired. Of the difference of two methods, the noise of
both beside the dense model counts, which is rather too much.

*Output error* is how far the outputs are from those of the dense model: their squared error as a share of how much the dense model's
outputs vary over examples, in the geometric mean over tasks and seeds. It tells methods apart where scores are all within the noise of
dense. A dash: the rows of the first version, which do not say it."""


@cache
def study() -> Study:
    """The entries that are to be run."""
    return read_file(ROOT / "pipelines" / "dsformer" / "table.py")["study"]


def page(found: Comparison, picture: str) -> str:
    """The page of the docs: method, picture, figures in words, all tables, all declarations."""
    parts = ["# DSFormer", METHOD, progress(found)]
    if found.finished:
        parts += [
            picture,
            "## What came out",
            "\n".join(f"- {line}" for line in [*_against_dense(found), *_against_conventional(found)]),
            *_against_low_rank(found),
            "## Tables",
            READING,
        ]
        for ratio in sorted(found.ratios, key=lambda ratio: (ratio != RATIO, ratio)):
            parts += [f"### Encoder at {ratio:g}x", _scores(found, ratio)]
        parts += [
            "## Seconds",
            "Of all passes of a method, training included and measuring not, at 2.8x: mean over seeds. A pass that methods "
            "share counts in each of them; the dense model's own training is in its line alone.",
            _seconds(found),
            "## Declarations",
            "What was run, exactly. Scores, bytes, versions and machine of every row are in `docs/results/dsformer.jsonl`.",
            *filter(None, (_declarations(found, task) for task in found.tasks)),
        ]
    return "\n\n".join([*parts, *_missing(found)])


def headline(found: Comparison) -> str:
    """In short, for the page of results: one line a method at 2.8x that has a row."""
    if not found.finished:
        return progress(found)
    cells = []
    for method, ratio in [DENSE, *((method, RATIO) for method in found.methods(RATIO))]:
        some = found.cells(method, ratio)
        if not some:
            continue
        planned = [found.cell(task, method, ratio).planned for task in found.tasks]
        scores = [cell.score.value for cell in some]
        cells.append(
            [
                _spoken(method),
                f"{sum(scores) / len(scores):.2f}" if len(scores) == len(found.tasks) else "-",
                _versus_dense(found, method, ratio),
                *_compressions(some),
                f"{sum(len(cell.rows) for cell in some)} of {sum(planned)}",
            ]
        )
    titles = ["method", f"mean of {len(found.tasks)} tasks", "vs dense", "encoder", "file", "rows"]
    words = [*_against_dense(found), *_against_conventional(found, ratios=(RATIO,))]
    return "\n\n".join([table(titles, cells), *words, progress(found)])


def progress(found: Comparison) -> str:
    """How many entries are done, and the command that goes on."""
    if not found.finished and not found.failed:
        return not_run(found.study.name)
    done, total = len(found.finished), len(found.study.entries)
    run = command(found.study.name)
    if done == total:
        return f"All {total} entries are done (`{run}`). {_made(found)}"
    failed = f" ({len(found.failed)} of them failed)" if found.failed else ""
    made = f" {_made(found)}" if found.finished else ""
    return (
        f"**Partial: {done} of {total} entries are done**, {total - done} are not{failed}; "
        f"`{run}` goes on.{made}"
    )


# figures in words


def _against_dense(found: Comparison) -> list[str]:
    return [
        sentence(
            f"{_spoken(ours)} minus dense at {RATIO:g}x",
            found.difference((ours, RATIO), DENSE),
            len(found.tasks),
        )
        for ours in (STF, GRADIENTS[0])
    ]


def _against_conventional(found: Comparison, ratios: Sequence[float] | None = None) -> list[str]:
    return [
        sentence(
            f"{_spoken(ours)} minus {_spoken(theirs)} at {ratio:g}x",
            found.difference((ours, ratio), (theirs, ratio)),
            len(found.tasks),
        )
        for ours, theirs in AGAINST
        for ratio in ratios or sorted(found.ratios)
        if {ours, theirs} <= set(found.methods(ratio))
    ]


def sentence(what: str, gap: Estimate | None, tasks: int) -> str:
    """A difference, what it rests on, and whether it is more than noise."""
    if gap is None:
        return f"{what}: not run yet."
    rests = f"{gap.tasks} of {tasks} tasks, {gap.count} pair{'s' if gap.count > 1 else ''} of task and seed"
    beyond = "better" if gap.value > 0 else "worse"
    verdict = "within the noise" if gap.within_noise else f"**{beyond}**, beyond the noise"
    return f"{what}: {plus_minus(gap.value, gap.half, signed=True)} points ({rests}): {verdict}."


def _against_low_rank(found: Comparison) -> list[str]:
    """The compression of STF over that of low rank at equal score, a line a task, and that at equal mean score: in each metric, and of
    our better one over the low rank in the other."""
    lines = [line for ours, rival in EQUAL_SCORES for line in _at_equal_scores(found, ours, rival)]
    return [*lines, *_better_low_rank(found, LOW_RANK[0])]


def _at_equal_scores(found: Comparison, ours: str, rival: str) -> list[str]:
    """What two methods are compared by, and the lines."""
    ratios = {task: at_equal_score(found.curve(task, ours), found.curve(task, rival)) for task in found.tasks}
    lines = [
        f"- {TASKS[task]}: {f'{ratio.value:.2f} (at a score of {ratio.score:.2f})' if ratio.value else ratio.why}."
        for task, ratio in ratios.items()
    ]
    lines.append(f"- Mean score of the tasks: {_equal(at_equal_mean(found, ours, rival))}")
    lowest = _equal(at_equal_mean(found, ours, rival, lowest=True))
    lines.append(f"- The same at the lowest score that both reach: {lowest}")
    near = at_equal_mean(found, ours, rival, figure="nearness")
    lines.append(f"- At equal error of the outputs, which needs no loss of score: {_equal(near, _as_error)}")
    return [
        f"Encoder compression of {_spoken(ours)} over that of {_spoken(rival)} at equal score, along the falling curves nearest to "
        "the scores at their ratios (linear in the logarithm of compression), in the middle of the scores that both reach; above 1, "
        f"{_spoken(ours)} is the smaller:",
        "\n".join(lines),
    ]


def _as_score(value: float) -> str:
    return f"a score of {value:.2f}"


def _as_error(nearness: float) -> str:
    return f"an error of {exp(-nearness):.3f}"


def _equal(found: Equal, said: Callable[[float], str] = _as_score) -> str:
    """A compression at equal mean score, or another figure that `said` names, what it rests on, and whether it is more than noise."""
    if found.ratio.value is None or found.ratio.score is None:
        return f"{found.ratio.why}."
    figure = (
        f"**{found.ratio.value:.2f}** (at {said(found.ratio.score)}, {found.count} pairs of task and seed)"
    )
    if found.count < 2:
        return f"{figure}: how much of it is noise is not known."
    noise = found.low <= 1 <= found.high
    verdict = "more" if found.ratio.value > 1 else "**less**"
    verdict = "within the noise" if noise else f"{verdict} compression than low rank, beyond the noise"
    return f"{figure}, {found.low:.2f} to {found.high:.2f} in 95% of the {found.drawn:.0%} of draws of pairs with a figure: {verdict}."


def _better_low_rank(found: Comparison, rival: str) -> list[str]:
    """Says so where a low rank that has no curve did better than the one that has."""
    gaps = {
        method: found.difference((method, RATIO), (rival, RATIO)) for method in LOW_RANK if method != rival
    }
    return [
        f"{_spoken(method)}, which was run at {RATIO:g}x only, scored {plus_minus(gap.value, gap.half, signed=True)} "
        f"against {_spoken(rival)} there: the better low rank."
        for method, gap in gaps.items()
        if gap and gap.value > 0
    ]


# tables


def _scores(found: Comparison, ratio: float) -> str:
    """One line a method: its score on each task, the difference to dense, the error of its outputs, compression."""
    cells = []
    for method, asked in [DENSE, *((method, ratio) for method in found.methods(ratio))]:
        line = [_score(found.cell(task, method, asked)) for task in found.tasks]
        compressions = _compressions(found.cells(method, asked))
        error = found.error(method, asked)
        near = "-" if error is None else f"{error:.3f}"
        cells.append([_spoken(method), *line, _versus_dense(found, method, asked), near, *compressions])
    names = [f"{TASKS[task]}{_metric(found, task)}" for task in found.tasks]
    return table(["method", *names, "vs dense", "output error", "encoder", "file"], cells)


def _score(cell: Cell) -> str:
    if not cell.rows:
        return "failed" if cell.failed else "not run yet"
    seeds = f"{len(cell.rows)}" if len(cell.rows) == cell.planned else f"{len(cell.rows)} of {cell.planned}"
    return f"{plus_minus(cell.score.value, cell.score.half)} ({seeds})"


def _metric(found: Comparison, task: str) -> str:
    names = {row["metric"] for row in found.finished if row["labels"]["task"] == task}
    return f", {', '.join(sorted(names))}" if names else ""


def _versus_dense(found: Comparison, method: str, ratio: float) -> str:
    gap = None if method == DENSE[0] else found.difference((method, ratio), DENSE)
    if gap is None:
        return "-"
    few = "" if gap.tasks == len(found.tasks) else f" ({gap.tasks} of {len(found.tasks)} tasks)"
    return f"{plus_minus(gap.value, gap.half, signed=True)}{few}"


def _compressions(cells: Sequence[Cell]) -> list[str]:
    """Encoder and whole file, with both ends where tasks differ."""
    found = []
    for name in ("layer_compression", "compression"):
        ends = [
            row[name] or 1.0 for cell in cells for row in cell.rows
        ]  # a dense model has no layers to count
        low, high = (f"{end:.2f}" for end in (min(ends), max(ends))) if ends else ("", "")
        found.append("-" if not ends else f"{low}x" if low == high else f"{low} to {high}x")
    return found


def _seconds(found: Comparison) -> str:
    """One line a method: seconds on each task."""
    cells = []
    for method, ratio in [DENSE, *((method, RATIO) for method in found.methods(RATIO))]:
        line = [found.cell(task, method, ratio) for task in found.tasks]
        cells.append(
            [
                _spoken(method),
                *(f"{cell.mean('seconds'):,.0f}" if cell.rows else "not run yet" for cell in line),
            ]
        )
    return table(["method", *(TASKS[task] for task in found.tasks)], cells)


def _declarations(found: Comparison, task: str) -> str:
    """Every declaration that was run on a task, folded, under the keys of its rows."""
    keys: dict[str, list[str]] = {}
    for row in found.finished:
        if row["labels"]["task"] == task:
            keys.setdefault(row["declaration"], []).append(row["key"])
    if not keys:
        return ""
    lines = [f"# {', '.join(names)}\n{declaration}" for declaration, names in keys.items()]
    return _folded(f"{TASKS[task]}: {sum(map(len, keys.values()))} rows", "\n".join(lines))


def _missing(found: Comparison) -> list[str]:
    """What failed, and why; what has not run, folded."""
    parts = [
        f"`{row['key']}` failed: {row['error']['type']}: {row['error']['message']}" for row in found.failed
    ]
    if found.finished and found.missing:
        keys = "\n".join(entry.key for entry in found.missing)
        parts.append(_folded(f"{len(found.missing)} entries are not done", keys))
    return parts


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>"


# words


def _spoken(method: str) -> str:
    names = {
        STF: "DSFormer (STF)",
        GRADIENTS[0]: "DSFormer (STF), gradients",
        "STF, plain start": "DSFormer (STF), plain start",
        "conventional": "conventional practice",
        "conventional, gradients": "conventional practice, gradients",
        "conventional, plain start": "conventional practice, plain start",
    }
    return names.get(method, method)


def _made(found: Comparison) -> str:
    """The dates and machines behind all rows; scores of one seed differ between instructions, too."""
    rows = found.finished
    dates = sorted({row["date"] for row in rows})
    machines = sorted({_machine(row) for row in rows})
    torches = sorted({row["versions"]["torch"] for row in rows})
    ours = Counter(row["versions"]["stackcomp"] for row in rows)
    made = ", ".join(f"{version} ({count} rows)" for version, count in sorted(ours.items()))
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"Made {days} on {', '.join(machines)}; torch {', '.join(torches)}; stackcomp {made}."


def _machine(row: Row) -> str:
    machine = row["machine"]
    instructions = f"{machine['instructions']}, " if "instructions" in machine else ""
    return f"{machine['processor']} ({instructions}threads: {machine['threads']})"
