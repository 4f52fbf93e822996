"""What is said of the stacks that searches found."""

import runpy
from dataclasses import replace

import pytest

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
    size_bytes=5_000_000,
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
        "versions": {"stackcomp": "1", "torch": "2", "transformers": "5"},
        "date": "2026-11-22",
    }


SEARCHED = [
    {"key": "tuned", "labels": {}},
    row(1, "a", 80.0, 4e6),
    row(1, "b", 70.0, 3e6),
    row(2, "a", 89.5, 4e6),
    {**row(2, "c", 0.0, 1e6), "error": {}},
]


FOUND = [*SEARCHED, row("chosen", "a", 89.0, 4e6)]


def single(technique, split, difference, size):
    found = row("chosen", "a", 90.0 + difference, size)
    return {**found, "key": f"{technique}/{split}", "labels": {"technique": technique}, "split": split}


@pytest.fixture
def searches(monkeypatch):
    """Put other searches in the place of those of the project."""

    def put(*asked):
        given = dict(enumerate(asked))
        monkeypatch.setattr(smallest, "SEARCHES", tuple(given))
        monkeypatch.setattr(smallest, "search", lambda file: given[file])

    put(SEARCH)
    return put


def test_the_chosen_stack_stands_beside_the_dense_model(searches):
    text = smallest.headline(FOUND)
    assert "| dense | 80.00 MB | 1.0x | 90.00 ± 2.00 | +0.00 ± 0.00 |" in text
    assert "| **a** | 4.00 MB | 20.0x | 89.00 ± 2.00 | -1.00 ± 1.00 |" in text
    assert "20.0x: chosen from 2 pipelines on 3000 examples carved" in text
    assert "-0.50 ± 1.00 against dense; scored once on the 872 of the validation split." in text
    assert "Pipeline(Int8Weights())" in text


def test_the_best_single_technique_is_the_smallest_that_kept_the_score_where_it_was_selected(searches):
    singles = [
        *(single("large", split, 0.0, 20e6) for split in ("selection", "test")),
        *(single("good", split, -0.5, 8e6) for split in ("test", "selection")),
        single("lossy", "selection", -1.5, 2e6),
        single("lossy", "test", 0.0, 2e6),
    ]
    assert smallest.single(singles)["key"] == "good/test"
    assert smallest.single(singles, 2.0)["key"] == "lossy/test"
    assert smallest.single(singles, 0.0)["key"] == "large/test"
    assert smallest.single([]) is None
    assert smallest.single([*singles, single("not yet tested", "selection", 0.0, 1e6)]) is None
    best = "one technique, good (the smallest of 3 within 1 point)"
    assert f"| {best} | 8.00 MB | 10.0x |" in smallest.headline(FOUND, singles)


def test_several_goals_share_the_rows(searches):
    searches(SEARCH, replace(SEARCH, size_bytes=3_500_000))
    assert smallest.headline(FOUND).count("| **") == 1, "what was found for one goal does not reach the other"
    text = smallest.headline([*FOUND, row(2, "b", 65.0, 3e6), row("chosen", "b", 66.0, 3e6)])
    assert text.index("| **a** | 4.00 MB |") < text.index("| **b** | 3.00 MB |")


def test_only_rows_that_the_search_of_today_would_make_count(searches):
    text = smallest.headline(FOUND)
    longer = replace(
        SEARCH, rungs=(sc.Rung(), sc.Rung(), sc.Rung()), passes={**PASSES, "b": sc.Distill(steps=99)}
    )
    old = [
        row(3, "a", 99.0, 1e6, longer),
        row(2, "b", 99.0, 1e6, longer),
        row("chosen", "b", 99.0, 1e6, longer),
    ]
    assert smallest.headline([*FOUND, *old]) == text
    larger = [row(2, "c", 99.0, 9e6), row("chosen", "c", 99.0, 9e6)]  # of a search with another goal
    assert "| **a** |" in smallest.headline([*FOUND, *larger])


def test_searches_under_way_name_their_commands(searches):
    told = (
        "Nothing reaches a goal yet: `stackcomp search pipelines/studies/sst2_24x.py` and "
        "`stackcomp search pipelines/studies/sst2_40x.py` make the rows."
    )
    assert smallest.headline(SEARCHED) == smallest.headline([]) == told


def test_the_pipeline_that_is_shipped_is_the_one_that_was_found():
    rows = Rows(name=smallest.NAME, folder=ROOT / "docs" / "results").read()
    search = smallest.search(smallest.SEARCHES[0])
    found = smallest.stack(rows, search)
    shipped = runpy.run_path(str(ROOT / "pipelines" / f"{smallest.NAME}.py"))
    assert found is not None
    assert repr(shipped["pipeline"]) == found.chosen["declaration"]
    (tuned,) = [row for row in rows if row["key"] == "tuned"]
    assert 24 <= tuned["size_bytes"] / search.size_bytes < 24.001


def test_single_techniques_count_as_they_are_declared_today():
    rows = Rows(name=smallest.SINGLE, folder=ROOT / "docs" / "results").read()
    renamed = [{**row, "key": f"gone/{row['split']}"} for row in rows]
    changed = [{**row, "declaration": "Pipeline(EntropyCode())"} for row in rows]
    assert smallest.singles(rows)
    assert smallest.singles(renamed) == []
    assert {row["labels"]["technique"] for row in smallest.singles(changed)} == {"coding"}
