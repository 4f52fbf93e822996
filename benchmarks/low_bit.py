"""What a reader sees of the study pipelines/dsformer/low_bit.py, as Markdown: a section of a page, and its share of the page of results."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import takewhile

from benchmarks.command import ROOT
from benchmarks.comparison import DENSE, Asked, Comparison, Estimate
from benchmarks.dsformer import TASKS, progress, sentence
from benchmarks.tables import plus_minus, table
from stackcomp.core.pipeline_file import read_file
from stackcomp.studies import Study
from stackcomp.studies.rows import Row

BITS = "bits"  # the label of a budget
FAMILIES = {  # how the names of their methods begin
    "dense-sparse": ("dense-sparse", "STF"),
    "rounding": ("rounded", "ternary", "binary"),
    "low rank": ("low rank",),
    "pruning": ("pruned",),
}
OURS, *RIVALS = FAMILIES

READING = """\
The encoder in so many bits a weight, all bytes counted: values, scales and indices. Every method but plain rounding gets the same
steps of recovery, with rounding in their loop. A cell is the mean score over seeds, their number where there are several, and in brackets
the bits that the rows really came to; the best of a column is bold, and a dash is what has not run, or what the method cannot have."""


@cache
def study() -> Study:
    """The entries that are to be run."""
    return read_file(ROOT / "pipelines" / "dsformer" / "low_bit.py")["study"]


def comparison(rows: Sequence[Row]) -> Comparison:
    """What the rows say together."""
    return Comparison(study=study(), rows=rows, by=BITS)


def section(found: Comparison, picture: str) -> str:
    """The section of the docs: the picture, from where on dense-sparse stacks pay, and a table a task."""
    if not found.finished:
        return progress(found)
    parts = [READING, picture, _pays(found), "\n".join(f"- {line}" for line in _verdicts(found))]
    parts += [part for task in found.tasks for part in _task(found, task)]
    return "\n\n".join([*parts, progress(found)])


def headline(found: Comparison) -> str:
    """In short, for the page of results: a line a budget, with the best of every family there."""
    if not found.finished:
        return progress(found)
    budgets = [bits for bits in sorted(found.ratios, reverse=True) if _best(found, OURS, bits)]
    cells = [[f"{bits:g}", *(_best_in_words(found, family, bits) for family in FAMILIES)] for bits in budgets]
    titles = ["bits a weight", *(f"best of {family}" for family in FAMILIES)]
    return "\n\n".join([table(titles, cells), _pays(found), progress(found)])


def _task(found: Comparison, task: str) -> list[str]:
    """A title, and a table with a line a method and a column a budget."""
    dense = found.cell(task, *DENSE)
    budgets = sorted(found.ratios, reverse=True)
    cells = {
        (method, bits): cell
        for bits in budgets
        for method in found.methods(bits)
        if (cell := found.cell(task, method, bits)).rows
    }
    if not cells:
        return []
    best = {
        bits: max(cell.score.value for (_, asked), cell in cells.items() if asked == bits)
        for _, bits in cells
    }

    def said(method: str, bits: float) -> str:
        cell = cells.get((method, bits))
        if cell is None:
            return "-"
        score = cell.score
        value = plus_minus(score.value, score.half) if score.count > 1 else f"{score.value:.2f}"
        seeds = f", {score.count} seeds" if score.count > 1 else ""
        words = f"{value} ({32 / cell.mean('layer_compression'):.2f}{seeds})"
        return f"**{words}**" if score.value == best[bits] else words

    methods = dict.fromkeys(method for method, _ in cells)
    lines = [[method, *(said(method, bits) for bits in budgets)] for method in methods]
    beside = f", dense {dense.score.value:.2f}" if dense.rows else ""
    return [
        f"### {TASKS[task]}{beside}",
        table(["method", *(f"{bits:g} bits" for bits in budgets)], lines),
    ]


def _verdicts(found: Comparison) -> list[str]:
    """The best dense-sparse stack beside the best of every other family, budget after budget."""
    return [
        sentence(f"{bits:g} bits, {ours} minus {theirs}", gap, len(found.tasks))
        for bits in sorted(found.ratios, reverse=True)
        for rival in RIVALS
        for ours, theirs, gap in _gap(found, rival, bits)
    ]


def _pays(found: Comparison) -> str:
    """In a sentence a rival, from how many bits down to the fewest that were run dense-sparse stacks beat it by more than noise."""
    sentences: list[str] = []
    for rival in RIVALS:
        gaps = {bits: gap for bits in sorted(found.ratios) for *_, gap in _gap(found, rival, bits)}
        if not gaps:
            continue
        won = [bits for bits, _ in takewhile(lambda one: one[1].value > one[1].half, gaps.items())]
        told = ", ".join(f"{gaps[bits].value:+.2f} at {bits:g}" for bits in reversed(gaps))
        where = "at no budget beyond the noise"
        if won:
            where = f"from {won[-1]:g} bits down to {won[0]:g}" if len(won) > 1 else f"at {won[0]:g} bits"
        sentences.append(f"Against {rival}, dense-sparse stacks pay {where} (points: {told}).")
    return "\n".join(sentences)


def _gap(found: Comparison, rival: str, bits: float) -> Iterator[tuple[str, str, Estimate]]:
    """The best dense-sparse stack, the best of a rival family and their difference at a budget, where both have run."""
    ours, theirs = _best(found, OURS, bits), _best(found, rival, bits)
    gap = found.difference(ours, theirs) if ours and theirs else None
    if ours and theirs and gap:
        yield ours[0], theirs[0], gap


def _best(found: Comparison, family: str, bits: float) -> Asked | None:
    """The method of a family that loses least against dense at a budget; None where none has run."""
    asked = [(method, bits) for method in found.methods(bits) if method.startswith(FAMILIES[family])]
    losses = {one: gap.value for one in asked if (gap := found.difference(one, DENSE))}
    return max(losses, key=lambda one: losses[one]) if losses else None


def _best_in_words(found: Comparison, family: str, bits: float) -> str:
    best = _best(found, family, bits)
    gap = found.difference(best, DENSE) if best else None
    return f"{best[0]}: {gap.value:+.2f}" if best and gap else "-"
