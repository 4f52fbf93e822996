"""What is said of the smallest file that a search found."""

import runpy

from benchmarks import smallest
from benchmarks.command import ROOT
from stackcomp.studies import Rows


def row(rung, name, score, size, declaration="Pipeline(A())"):
    return {
        "key": f"{rung}/{name}",
        "labels": {"rung": rung},
        "declaration": declaration,
        "score": score,
        "noise": 2.0,
        "metric": "accuracy",
        "difference": score - 90.0,
        "difference_noise": 1.0,
        "size_bytes": size,
        "compression": 80e6 / size,
        "examples": 872 if rung == "chosen" else 3000,
        "steps": [
            {
                **{"score": 90.0, "noise": 2.0, "difference": 0.0, "difference_noise": 0.0},
                **{"size_bytes": 80_000_000, "compression": 1.0},
            }
        ],
        "machine": {"processor": "any", "threads": 1},
        "versions": {"torch": "2"},
        "date": "2026-11-22",
    }


SEARCHED = [
    {"key": "tuned", "labels": {}},
    row(1, "a", 80.0, 4e6, "Pipeline(A(steps=1))"),
    row(1, "b", 70.0, 3e6, "Pipeline(B(steps=1))"),
    row(2, "a", 89.5, 4e6),
    {"key": "2/c", "labels": {"rung": 2}, "error": {}},
]


def test_the_chosen_stack_stands_beside_the_dense_model():
    text = smallest.headline([*SEARCHED, row("chosen", "a", 89.0, 4e6)])
    assert "| dense | 80.00 MB | 1.0x | 90.00 ± 2.00 | +0.00 ± 0.00 |" in text
    assert "| **a** | 4.00 MB | 20.0x | 89.00 ± 2.00 | -1.00 ± 1.00 |" in text
    assert "Chosen from 2 pipelines on 3000 examples" in text
    assert "-0.50 ± 1.00 against dense; scored once on the 872" in text
    assert "Pipeline(A())" in text


def test_a_search_under_way_names_its_command():
    said = "Not run to its end yet: `stackcomp search pipelines/studies/smallest_sst2.py` makes the rows."
    assert smallest.headline(SEARCHED) == smallest.headline([]) == said


def test_the_pipeline_that_is_shipped_is_the_one_that_was_found():
    rows = {
        row["key"].partition("/")[0]: row
        for row in Rows(name=smallest.NAME, folder=ROOT / "docs" / "results").read()
    }
    shipped = runpy.run_path(str(ROOT / "pipelines" / f"{smallest.NAME}.py"))
    assert repr(shipped["pipeline"]) == rows["chosen"]["declaration"]
