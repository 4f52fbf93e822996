"""What DSFormer brings on top of other techniques: the arithmetic and words of the table, and the study that makes its rows."""

import runpy
import sys
from pathlib import Path

import pytest

import stackcomp as sc
from benchmarks import stacked
from stackcomp.passes import registered

PIPELINES = Path(__file__).resolve().parent.parent / "pipelines" / "dsformer"


def row(method, ratio, score, layers, *, task="stsb"):
    """A finished row; embeddings and what else a file has take 50 bytes."""
    return {
        "key": f"{task}/{method}/{ratio:g}/0",
        "labels": {"task": task, "method": method, "ratio": ratio},
        "score": score,
        "difference": score - 88.0,
        "difference_noise": 0.5,
        "noise": 0.5,
        "layer_bytes": layers,
        "size_bytes": layers + 50,
        "machine": {"processor": "any", "threads": 1},
        "versions": {"stackcomp": "1", "torch": "2", "transformers": "5"},
        "date": "2026-11-22",
        "seed": 0,
    }


ROWS = [
    row("dense", 1.0, 88.0, 200),
    row("distilled student", 1.0, 85.0, 100),
    row("distilled student + DSFormer", 2.0, 84.0, 50),
    row("distilled student + DSFormer", 1.6, 84.8, 60),
    row("distilled student + DSFormer", 2.8, 83.9, 36),
    row("int8", 1.0, 88.0, 50),
    row("int8 + DSFormer", 2.0, 80.0, 25),
    row("shared layers + DSFormer", 2.0, 85.0, 50),  # its base has not run
]


def test_extras_are_ratios_of_bytes_less_one():
    (found, *_) = [stack for stack in stacked.stacks(ROWS) if stack.stacked["labels"]["ratio"] == 2.0]
    assert (found.layers, found.ceiling) == (1.0, 2.0)
    assert found.file == pytest.approx(0.5)
    assert found.counts  # exactly 1 point below
    assert found.change == -1.0


def test_the_largest_extra_that_keeps_the_score_is_named_and_partial_rows_say_so():
    text = stacked.section(ROWS)
    assert f"Partial: {len(ROWS)} of {stacked.ROWS} rows so far." in text
    assert (
        "- stsb, distilled student: +100% on the encoder and +50% on the file (ceiling +200%), score -1.00."
        in text
    )
    assert "- stsb, int8: no stack within 1 point; the nearest is at -8.00." in text
    assert "shared layers" not in text
    short = stacked.headline(ROWS)
    assert "- stsb, int8: no stack within 1 point" in short
    assert "Partial:" in short
    assert "| stsb" not in short
    assert stacked.headline([]).startswith("Not run yet")
    assert "**2x**" in text
    assert "**2.8x**" not in text
    lines = [line for line in text.splitlines() if "distilled student" in line and line.startswith("|")]
    assert [line.split("|")[2].strip(" *") for line in lines] == ["1.6x", "2x", "2.8x"]


def test_failed_rows_count_for_nothing_and_without_rows_the_command_is_named():
    failed = {"key": "stsb/int8/1/0", "labels": {"task": "stsb", "method": "int8", "ratio": 1.0}, "error": {}}
    assert "int8:" not in stacked.section([*ROWS[:3], failed, ROWS[6]])
    for rows in ([], ROWS[:1], [failed]):
        assert stacked.section(rows) == (
            "Not run yet: `stackcomp study pipelines/dsformer/stacked.py` makes the rows."
        )


@pytest.fixture
def study(monkeypatch, tmp_path):
    """The study of a file of pipelines/dsformer on a model that need not be there: nothing is read when it is declared."""
    monkeypatch.setenv("STACKCOMP_MODEL", str(tmp_path / "model"))
    monkeypatch.syspath_prepend(str(PIPELINES))
    monkeypatch.delitem(sys.modules, "recipes", raising=False)
    yield lambda name: runpy.run_path(str(PIPELINES / f"{name}.py"))["study"]
    sys.modules.pop("recipes", None)


def steps(entry):
    """Training steps of a pipeline in all."""
    return sum(item.steps for item in entry.passes if item.contract.trains)


def test_the_study_has_the_rows_that_are_counted_and_both_sides_train_as_long(study):
    entries = {entry.key: entry for entry in study("stacked").entries}
    assert len(entries) == stacked.ROWS
    for key, entry in entries.items():
        base, on_top, _ = key.partition(stacked.ON_TOP)
        if on_top:
            task, _, name = base.partition("/")
            assert name in stacked.BASES
            alone = entries[f"{task}/{name}/1/0"]
            assert steps(entry) == steps(alone) or name == "int8"
            assert sc.parse(repr(entry.pipeline)) == entry.pipeline
            assert sc.check(entry.pipeline)
            last = entry.passes[-1].name
            assert last == ("Int8Weights" if name == "int8" else "STF")


def test_the_decoders_two_methods_share_everything_but_their_form(study):
    entries = study("decoder").entries
    assert len(entries) == 6
    for first, second in zip(entries[::2], entries[1::2], strict=True):
        (one,), (other,) = first.passes, second.passes
        names = ("ratio", "only", "samples", "data_aware", "sensitivity", "damping", "spread")
        assert [getattr(one, name) for name in names] == [getattr(other, name) for name in names]
        assert first.limit == second.limit
        assert first.labels["ratio"] == one.ratio
    assert {entry.passes[0].name for entry in entries} == {"DenseSparse", "LowRank"} <= registered().keys()
