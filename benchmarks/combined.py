"""What the studies of combinations say: their own reports, and the few lines of the README on the post-training one."""

from collections.abc import Sequence
from math import exp
from pathlib import Path

from benchmarks.command import ROOT
from benchmarks.tables import not_run, table
from stackcomp.core.pipeline_file import read_file
from stackcomp.studies import Study
from stackcomp.studies.analysis import Attribution, Cells, Extra, attribution, extra
from stackcomp.studies.report import files
from stackcomp.studies.rows import Row

NAME = "encoder_stack_sts"  # the one of the README
NAMES = {
    NAME: "Combinations",
    "encoder_stack": "Combinations, trained",
}  # all of them, and the titles of their pages
LOSS = 1.0  # points below the model as it came that a stack may score


def file(name: str) -> Path:
    """Where a study is declared."""
    return Path("pipelines", "studies", f"{name}.py")


def study(name: str) -> Study:
    """The pipelines that are to be run."""
    return read_file(ROOT / file(name))["study"]


def report(name: str, rows: Sequence[Row]) -> dict[str, str]:
    """The whole report as an HTML and a Markdown file, by name; nothing before there are rows."""
    return files(study(name), rows) if rows else {}


def headline(rows: Sequence[Row]) -> str:
    """The extra compression of the best stack, and what each technique gave of it."""
    if not rows:
        return not_run(NAME)
    cells = Cells.of(rows, study(NAME).skipped)
    floor = cells.came.score - LOSS
    whole, encoder = extra(cells, floor), extra(cells, floor, "encoder")
    best = whole.stack or whole.nearest[1]
    parts = [attribution(cells, cells.choice(best), measure) for measure in ("file", "encoder", "score")]
    lines = [
        [name, *(_said(part, part.shares[name].value) for part in parts)]
        for name in cells.passes
        if parts[0].shares
    ]
    total = ["all of them", *(_said(part, part.total.value) for part in parts if part.total)]
    return "\n\n".join(
        [
            table(["technique", "file", "encoder", "points"], [*lines, total]),
            f"{_sentence(whole, 'The whole file')} {_sentence(encoder, 'The encoder')}",
            f"{len(rows)} pipelines, chosen and scored on the same {rows[0]['examples']} pairs, one seed. "
            f"Made by `stackcomp study {file(NAME)}` on {rows[0]['date']}: {rows[0]['machine']['processor']}, "
            f"{rows[0]['machine']['threads']} thread, torch {rows[0]['versions']['torch']}.",
        ]
    )


def _said(part: Attribution, value: float) -> str:
    return f"{value:+.2f}" if part.measure == "score" else f"{exp(value):.2f}x"


def _sentence(found: Extra, subject: str) -> str:
    if found.value is None or found.single is None or found.stack is None or found.interval is None:
        return f"{subject}: no stack, or no single technique, scores at least {found.floor:.2f}."
    low, high = found.interval
    sure = f"95% interval {low:+.0%} to {high:+.0%}"
    return (
        f"{subject}, at a loss of at most {LOSS:g} point: {found.stack.name} compresses **{found.value:.0%} more** ({sure}) "
        f"than the best single technique, {found.single.name}."
    )
