"""What is said of the smallest file that a search found."""

import runpy
from dataclasses import replace

import stackcomp as sc
from benchmarks import smallest
from benchmarks.command import ROOT
from stackcomp.studies import Rows
from stackcomp.studies.combinations import techniques
from tests import toys

PASSES = {"a": sc.Int8Weights(), "b": sc.Distill(steps=10), "c": sc.EntropyCode()}
SEARCH = sc.Search(
    name="toy",
    model="toy",
    task=toys.classification_task(),
    passes=PASSES,
    loss=1.0,
    rungs=(sc.Rung(steps=0.1), sc.Rung()),
)


def row(rung, name, score, size, search=SEARCH):
    choice = tuple(one for one in techniques(search.passes) if one.name in name)
    entry = search.final(choice) if rung == "chosen" else search.entry(choice, rung)
    return {
        "key": entry.key,
        "labels": dict(entry.labels),
        **entry.asked,
        **entry.data,
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
    row(1, "a", 80.0, 4e6),
    row(1, "b", 70.0, 3e6),
    row(2, "a", 89.5, 4e6),
    {**row(2, "c", 0.0, 1e6), "error": {}},
]


def test_the_chosen_stack_stands_beside_the_dense_model():
    text = smallest.headline([*SEARCHED, row("chosen", "a", 89.0, 4e6)], SEARCH)
    assert "| dense | 80.00 MB | 1.0x | 90.00 ± 2.00 | +0.00 ± 0.00 |" in text
    assert "| **a** | 4.00 MB | 20.0x | 89.00 ± 2.00 | -1.00 ± 1.00 |" in text
    assert "Chosen from 2 pipelines on 3000 examples" in text
    assert "-0.50 ± 1.00 against dense; scored once on the 872" in text
    assert "Pipeline(Int8Weights())" in text


def test_a_target_that_was_missed_is_said():
    missed = smallest.headline([*SEARCHED, row("chosen", "a", 89.0, 4e6)], replace(SEARCH, loss=0.4))
    assert "-0.50 ± 1.00 against dense, and **misses the target** of a loss of at most 0.4; scored" in missed


def test_only_rows_that_the_search_of_today_would_make_count():
    rows = [*SEARCHED, row("chosen", "a", 89.0, 4e6)]
    text = smallest.headline(rows, SEARCH)
    longer = replace(
        SEARCH, rungs=(sc.Rung(), sc.Rung(), sc.Rung()), passes={**PASSES, "b": sc.Distill(steps=99)}
    )
    old = [
        row(3, "a", 99.0, 1e6, longer),
        row(2, "b", 99.0, 1e6, longer),
        row("chosen", "b", 99.0, 1e6, longer),
    ]
    assert smallest.headline([*rows, *old], SEARCH) == text
    larger = [row(2, "c", 90.0, 9e6), row("chosen", "c", 90.0, 9e6)]  # of a search with another goal
    assert "| **a** |" in smallest.headline([*rows, *larger], SEARCH)


def test_a_search_under_way_names_its_command():
    said = "Not run to its end yet: `stackcomp search pipelines/studies/smallest_sst2.py` makes the rows."
    assert smallest.headline(SEARCHED, SEARCH) == smallest.headline([], SEARCH) == said


def test_the_pipeline_that_is_shipped_is_the_one_that_was_found():
    rows = {
        row["key"].partition("/")[0]: row
        for row in Rows(name=smallest.NAME, folder=ROOT / "docs" / "results").read()
    }
    shipped = runpy.run_path(str(ROOT / "pipelines" / f"{smallest.NAME}.py"))
    assert repr(shipped["pipeline"]) == rows["chosen"]["declaration"]
