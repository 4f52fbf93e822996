"""What the studies of combinations say: their own reports, and the few lines of the page of results on the post-training one."""

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

NAME = "encoder_stack_sts"  # the one without training
TRAINED = "encoder_stack"
NAMES = {
    NAME: "Combinations",
    TRAINED: "Combinations, trained",
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
    asked = study(name)
    ours = asked.own(rows)
    return files(asked, ours) if ours else {}


def headline(rows: Sequence[Row]) -> str:
    """The extra compression of the best stack, and what each technique gave of it."""
    asked = study(NAME)
    ours = asked.own(rows)
    if not ours:
        return not_run(NAME)
    cells = Cells.of(ours, asked.skipped, asked.pipelines)
    whole = extra(cells, cells.came.score - LOSS)
    best = whole.stack or whole.nearest[1]
    parts = [attribution(cells, cells.choice(best), measure) for measure in ("file", "encoder", "score")]
    row = cells.cells[0].rows[0]
    return "\n\n".join(
        [
            _attributed(cells, parts),
            extras(NAME, rows),
            f"{len(cells.ran)} of {len(cells.planned)} pipelines, chosen and scored on the same {row['examples']} pairs. "
            f"Made by `stackcomp study {file(NAME)}` on {row['date']}: {row['machine']['processor']}, "
            f"{row['machine']['threads']} thread, torch {row['versions']['torch']}.",
        ]
    )


def extras(name: str, rows: Sequence[Row]) -> str:
    """What the best stack of a study compresses beyond the best single technique, in words; nothing before there are rows."""
    asked = study(name)
    ours = asked.own(rows)
    if not any(row["labels"].get("passes") and "error" not in row for row in ours):
        return ""
    cells = Cells.of(ours, asked.skipped, asked.pipelines)
    floor = cells.came.score - LOSS
    whole, encoder = extra(cells, floor), extra(cells, floor, "encoder")
    return f"{_sentence(cells, whole, 'The whole file')} {_sentence(cells, encoder, 'The encoder')}"


def _attributed(cells: Cells, parts: Sequence[Attribution]) -> str:
    """What each technique gave, or why that is not known."""
    for part in parts:
        if part.total is None:
            return f"What each technique gave of it is undefined: {part.undefined}."
    lines = [[name, *(_said(part, part.shares[name].value) for part in parts)] for name in cells.passes]
    total = ["all of them", *(_said(part, part.total.value) for part in parts if part.total)]
    return table(["technique", "file", "encoder", "points"], [*lines, total])


def _said(part: Attribution, value: float) -> str:
    return f"{value:+.2f}" if part.measure == "score" else f"{exp(value):.2f}x"


def _sentence(cells: Cells, found: Extra, subject: str) -> str:
    awaited = f" (without a finished row: {', '.join(cells.awaited)})" if cells.awaited else ""
    if found.value is None or found.single is None or found.stack is None:
        return f"{subject}: no stack, or no single technique{awaited}, scores at least {found.floor:.2f}."
    return (
        f"{subject}, at a loss of at most {LOSS:g} point: {found.stack.name} compresses **{found.value:.0%} more** ({found.sure}) "
        f"than the best single technique{awaited}, {found.single.name}."
    )
