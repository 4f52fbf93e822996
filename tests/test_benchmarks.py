"""The commands behind the numbers: rows, options, and a small run of each study."""

import argparse
import json
import subprocess
import sys

import pytest
import torch

import stackcomp as sc
from benchmarks import (
    combined,
    command,
    factorizing,
    kill,
    kill_study,
    pictures,
    quickstart,
    reload,
    reloaded,
    speed,
    step_cost,
    stsb,
    tables,
)
from stackcomp.core import headers
from stackcomp.core.contract import legal
from stackcomp.core.errors import OutputInUse, ResultsDamaged
from stackcomp.core.ledger import Ledger
from stackcomp.studies.rows import Rows, stamp
from tests import toys


@pytest.fixture
def rows(tmp_path):
    return Rows(name="mine", folder=tmp_path / "results", by=())  # as `command.study` gives them


@pytest.fixture
def model(tmp_path):
    """A toy classifier with its tokenizer, as a folder."""
    toys.bert_classifier().save_pretrained(tmp_path / "model")
    toys.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def pairs():
    """Pairs of toy sentences with a number."""
    texts = [row["text"] for row in toys.sentences(24)]
    rows = [
        {"sentence1": first, "sentence2": second, "label": float(index % 5)}
        for index, (first, second) in enumerate(zip(texts, reversed(texts), strict=True))
    ]
    return sc.tasks.similarity({"train": rows, "test": rows}, max_length=16)


# rows


def test_a_row_is_added_once_a_key_and_read_back_in_order(rows):
    assert rows.read() == []
    for value, key in enumerate(["b", "a", "b"]):
        rows.add({"key": key, "value": value})
    assert rows.read() == [{"key": "b", "value": 2}, {"key": "a", "value": 1}]
    assert {path.name for path in rows.folder.iterdir()} == {".lock", "mine.jsonl"}


def test_of_two_rows_of_a_key_the_last_one_counts(rows):
    rows.folder.mkdir()
    rows.path.write_text('{"key": "a", "value": 1}\n{"key": "b"}\n{"key": "a", "value": 2}\n')
    assert rows.read() == [{"key": "a", "value": 2}, {"key": "b"}]
    rows.add({"key": "a", "value": 3})
    assert rows.path.read_text() == '{"key": "a", "value": 3}\n{"key": "b"}\n'


def test_has_compares_what_would_run_again(rows):
    rows.add({"key": "a", "seed": 0})
    assert rows.has("a")
    assert rows.has("a", seed=0)
    assert not rows.has("a", seed=1)
    assert not rows.has("b")


@pytest.mark.parametrize("line", ["{", "[]", '{"value": 1}', "3"])
def test_a_damaged_line_is_named(rows, line):
    rows.add({"key": "a"})
    rows.path.write_text(rows.path.read_text() + line + "\n")
    with pytest.raises(ResultsDamaged, match="line 2"):
        rows.read()


def test_a_failed_write_leaves_the_old_rows(rows, monkeypatch):
    rows.add({"key": "a"})
    with pytest.raises(TypeError):
        rows.add({"key": "b", "value": object()})
    assert rows.read() == [{"key": "a"}]


def test_a_stamp_says_what_was_run_on_what():
    found = stamp(sc.Pipeline(sc.Int8Weights()), 3)
    assert found["declaration"] == "Pipeline(Int8Weights())"
    assert found["seed"] == 3
    assert {"python", "stackcomp", "torch", "transformers"} <= found["versions"].keys()
    assert found["machine"]["threads"] >= 1
    assert json.loads(json.dumps(found)) == found


# commands


@pytest.mark.parametrize(
    "name",
    ["stsb", "quickstart", "reload", "kill", "kill_study", "factorizing", "step_cost", "speed", "report"],
)
def test_help(name):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--help"],
        cwd=command.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"python -m benchmarks.{name}" in done.stdout


def test_combined_counts_rows_of_today_and_says_what_is_missing():
    rows = Rows(name=combined.NAME, folder=command.ROOT / command.FOLDER).read()
    failed = {**rows[0], "error": {"type": "BadWeights", "message": "NaN"}}
    text = combined.headline([failed, *rows[1:]])
    assert "is undefined: dense-sparse: failed with BadWeights: NaN." in text
    assert "than the best single technique (without a finished row: dense-sparse), int4 embeddings" in text
    assert "35 of 36 pipelines" in text
    stale = [{**row, "declaration": "Pipeline(Old())", "size_bytes": 1} for row in rows[:1]]
    assert combined.headline([*stale, *rows[1:]]).count("35 of 36 pipelines") == 1
    assert combined.headline(stale) == tables.not_run(combined.NAME)


def test_working_folder_and_results_in_one_place_are_refused(tmp_path):
    options = argparse.Namespace(out=tmp_path, results=tmp_path / "." / "")
    with pytest.raises(OutputInUse, match="give two folders"), command.study("mine", options):
        pass


def test_two_runs_of_one_study_do_not_mix(tmp_path):
    options = argparse.Namespace(out=tmp_path / "out", results=tmp_path)
    with command.study("mine", options), pytest.raises(OutputInUse), command.study("mine", options):
        pass


# studies


def test_stsb_on_a_toy_resumes_from_its_rows(rows, model, tmp_path, capsys):
    def run(**settings):
        stsb.run(
            toys.make("bert"),
            pairs(),
            toys.tokenizer(),
            rows,
            out=tmp_path / "run",
            ratios=[1.5],
            **settings,
        )

    run()
    found = {(row["method"], row["int8"]): row for row in rows.read()}
    assert (
        len(found) == len(rows.read()) == 8
    )  # dense, int8 alone, and two rows for each of three factorizations
    assert found["DenseSparse", True]["layer_bytes"] < found["DenseSparse", False]["layer_bytes"]
    for row in rows.read():
        assert row["size_bytes"] == sum(row["components"].values())
    before = rows.path.read_text()
    capsys.readouterr()
    run()
    assert rows.path.read_text() == before
    assert capsys.readouterr().out.count("there already") == 4
    assert "Int8 alone" in tables.stsb(rows.read())
    assert "1.5x | dense-sparse" in tables.stsb(rows.read())
    assert "</svg>" in pictures.stsb(rows.read())


PASSES = (sc.MagnitudePrune(only="encoder.layer.*"), sc.Int8Weights(only=("encoder.layer.*", "pooler.dense")))


def test_only_legal_orders_are_run_and_the_declared_one_is_among_them(model):
    found = quickstart.pipelines(PASSES, model)
    assert [role for role, _ in found].count("declared") == 1
    assert [role for role, _ in found].count("alone") == 2
    assert [role for role, _ in found].count("other order") == 0
    assert found[-1] == ("yardstick", sc.Pipeline(sc.LowBitWeights(bits=4, only=PASSES[-1].only)))
    three = quickstart.pipelines((*PASSES, sc.Distill(steps=1)), model)
    assert [role for role, _ in three].count("other order") == 2
    for _, pipeline in three:
        sc.check(pipeline, str(model))


def test_quickstart_on_a_toy(rows, model, tmp_path):
    from stackcomp.manager import Measuring

    def run():
        quickstart.run(
            model,
            PASSES,
            toys.classification_task(),
            rows,
            out=tmp_path / "run",
            measuring=Measuring(latency_repeats=1, latency_batch=1, latency_length=4),
        )

    run()
    assert [row["role"] for row in rows.read()] == ["alone", "declared", "alone", "yardstick"]
    plan = headers.plan_of(model)
    for row in rows.read():
        ledger = Ledger.from_json(row["ledger"])
        touched = {
            id_
            for step in sc.parse(row["declaration"])
            for id_ in plan.select(only=step.only, skip=step.skip)
        }
        expected = sum(4 * plan[id_].rows * plan[id_].cols for id_ in touched)
        assert ledger.rows[0].layer_bytes == expected, row["key"]
    (_, declared), *_ = tables.ledgers(rows.read(), "declared")
    assert "**MagnitudePrune → Int8Weights**" in tables.quickstart(rows.read())
    assert "MagnitudePrune" in tables.brought(declared)
    drawn = pictures.terminal(declared, "make demo")
    assert "url(" not in drawn.replace("url(#", "")
    before = rows.path.read_text()
    run()
    assert rows.path.read_text() == before


def test_speed_times_every_form_and_tells_the_file(rows, model, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "REPEATS", 1)
    monkeypatch.setattr(
        speed, "pipelines", lambda: [("dense", sc.Pipeline()), ("int8", sc.Pipeline(sc.Int8Weights()))]
    )
    speed.run(model, rows, out=tmp_path / "out")
    dense, int8 = rows.read()
    for place, (batch, length) in enumerate(speed.BATCHES):
        plain, rounded = (row["timings"][place] for row in (dense, int8))
        assert (rounded["batch"], rounded["length"]) == (batch, length)
        assert set(plain["ratios"]) == {f"stored, {dtype}" for dtype in speed.DTYPES}
        assert set(rounded["ratios"]) == {
            f"{form}, {dtype}" for form in speed.FORMS for dtype in speed.DTYPES
        }
    assert int8["size_bytes"] < dense["size_bytes"]
    text = tables.speed(rows.read())
    assert text.count("| int8 |") == 2
    assert text.index("8 texts of 128 tokens (") < text.index("1 text of 16 tokens (")
    made = int8["date"]
    speed.run(model, rows, out=tmp_path / "out")
    assert rows.read()[1]["date"] == made
    assert tables.speed([]).startswith("Not run yet")
    assert [name for name, _ in speed.pipelines()] == ["dense", "int8"]


def test_reload_tells_same_bits_from_others(rows, model, tmp_path, monkeypatch):
    monkeypatch.setattr(reload.small, "TEXTS", toys.SENTENCES[:2])
    here = lambda arguments, **_: reloaded.main(*arguments[-3:])  # noqa: E731 - a new process takes seconds to import
    monkeypatch.setattr(reload.subprocess, "run", here)
    row = reload.judge(
        "Int8Weights", sc.Pipeline(*PASSES), model, toys.classification_task(), tmp_path / "judged", seed=0
    )
    assert reload.fine(row)
    assert not reload.fine({**row, "auto_identical": False})
    assert not reload.fine({**row, "file_bytes": row["file_bytes"] + 1})
    rows.add(row)
    assert "| `Int8Weights` | yes | yes |" in tables.reload(rows.read())


def test_reload_compares_what_a_decoder_writes(rows, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(reload.small, "TEXTS", toys.SENTENCES[:2])
    monkeypatch.setattr(reload, "TOKENS", 4)
    here = lambda arguments, **_: reloaded.main(*arguments[-3:])  # noqa: E731
    monkeypatch.setattr(reload.subprocess, "run", here)
    decoder = tmp_path / "decoder"
    toys.language_model("llama").save_pretrained(decoder)
    tokenizer.save_pretrained(decoder)
    row = reload.judge(
        "a decoder", sc.Pipeline(sc.Int8Weights()), decoder, toys.language_task(), tmp_path / "judged", seed=0
    )
    assert reload.fine(row)
    rows.add(row)
    said = tables.reload(rows.read())
    assert "4 tokens that it wrote after each of 2 texts were compared" in said
    assert "and `python -m benchmarks.reload --decoder` on" in said
    monkeypatch.setattr(
        reloaded, "answers_of", lambda *given: [*reload.answers_of(*given)[:1], torch.zeros(1)]
    )
    assert not reload.fine(
        reload.judge(
            "another", sc.Pipeline(sc.Int8Weights()), decoder, toys.language_task(), tmp_path / "b", seed=0
        )
    )


def test_reload_covers_every_registered_pass_and_the_stack():
    from stackcomp.passes import registered

    found = dict(reload.pipelines())
    assert found.keys() == {*registered(), "quickstart"}
    for pipeline in found.values():
        assert legal(pipeline.flat(), headers.plain("bert"))
        assert all(step.steps == 3 for step in pipeline if step.contract.trains)


WORK = """
import sys, time
from pathlib import Path
out = Path(sys.argv[2])
(out / "steps" / "00-dense").mkdir(parents=True, exist_ok=True)
again = (out / "run.json").exists()
(out / "run.json").touch()
time.sleep(0.3)
(out / "model.safetensors").write_text("weights" if not again or {same} else "other weights")
"""


@pytest.mark.parametrize("same", [True, False])
def test_kill_tells_same_bytes_from_others(same, rows, tmp_path, monkeypatch, capsys):
    """A process that only pretends to compress: the study must see when resuming changes what comes out."""
    monkeypatch.setattr(kill, "WORK", WORK.format(same=same))
    assert kill.run(tmp_path, rows, out=tmp_path, points=2) == (0 if same else 2)
    whole, *points = rows.read()
    assert (whole["key"], len(points)) == ("whole", 2)
    for row in points:
        assert (row["killed"], row["last_step"], row["resumed_status"]) == (True, "00-dense", 0)
        assert row["identical"] is same
    capsys.readouterr()
    kill.run(tmp_path, rows, out=tmp_path, points=2)
    assert capsys.readouterr().out.count("there already") == 2


STUDY = """
import json, sys, time
from pathlib import Path
out = Path(sys.argv[2])
rows = out / "killed.jsonl"
(out / "begun").touch()
for number in range(len(rows.read_text().splitlines()) if rows.exists() else 0, 4):
    time.sleep(0.2)
    twice = {twice} and number and out.name == "killed"
    with rows.open("a") as file:
        file.write(json.dumps({{"key": str(0 if twice else number), "file_sha256": "same"}}) + "\\n")
"""


@pytest.mark.parametrize("twice", [False, True])
def test_a_killed_study_is_compared_row_by_row(twice, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(kill_study, "WORK", STUDY.format(twice=twice))
    model = toys.make("bert")
    model.save_pretrained(tmp_path / "model")
    assert kill_study.run(tmp_path / "model", rows, out=tmp_path, kills=3) is not twice
    (row,) = rows.read()
    assert (len(row["moments"]), row["entries"], row["identical"]) == (3, 4, not twice)


def test_kill_says_why_the_uninterrupted_run_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(kill, "WORK", "raise SystemExit('no luck')")
    with pytest.raises(RuntimeError, match="no luck"):
        kill.whole(tmp_path, tmp_path / "whole", 0)


def test_factorizing_at_a_tiny_size_resumes_from_its_rows(rows, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(factorizing, "PAPER", {"blocks": 4, "atoms": 6, "nonzeros": 2})
    monkeypatch.setattr(factorizing, "ONE_BLOCK", {"blocks": 1, "atoms": 8, "nonzeros": 3})
    monkeypatch.setattr(factorizing, "WIDTH", 8)
    generator = torch.Generator().manual_seed(0)
    sizes = {"square": (16, 16), "tall": (64, 16), "wide": (16, 64)}
    parts = {kind: [torch.randn(size, generator=generator) for _ in range(5)] for kind, size in sizes.items()}
    factorizing.run(parts, rows, layers=1)
    found = {row["key"]: row for row in rows.read()}
    assert [row["kind"] for row in found.values()].count("scikit-learn") == 5
    for row in found.values():
        if row["kind"] == "all weights":
            assert (row["weights"], row["parameters"]) == (6, 4 * 32 * 32 + 2 * 128 * 32)
        if row["kind"] == "memory":
            assert row["weight_bytes"] == 4 * 128 * 32
    assert [point["columns"] for point in found["growth"]["points"]] == [16, 32, 64, 128]
    text = tables.factorizing(rows.read())
    assert "32x128" in text
    assert "automatic at 2.8x" in text
    capsys.readouterr()
    factorizing.run(parts, rows, layers=1)
    assert capsys.readouterr().out.count("there already") == len(found)


def test_what_is_compared_is_the_same_blocks_at_no_larger_error():
    import torch

    weight = torch.randn(60, 16, generator=torch.Generator().manual_seed(1))
    found = factorizing.beside(weight, {"blocks": 4, "atoms": 6, "nonzeros": 2}, 1, 0)
    assert found["timed_blocks"] == factorizing.TIMED
    assert (
        found["ours"]["error"] <= found["theirs"]["error"]
        or found["ours"]["sweeps"] == factorizing.MORE_SWEEPS[-1]
    )


def test_step_cost_on_a_toy(rows, monkeypatch, capsys):
    monkeypatch.setattr(
        step_cost.factorizing, "automatic", lambda *_: {"blocks": 1, "atoms": 6, "nonzeros": 2}
    )
    model = toys.bert_classifier()
    for _ in range(2):
        step_cost.run(model, rows, steps=1, rounds=2, batch=2, length=5)
    (row,) = rows.read()
    assert row["weights"] > 0
    assert [found["every"] for found in row["ratios"]] == list(step_cost.EVERY)
    ratios = [found["ratio"] for found in row["ratios"]]
    assert ratios == sorted(ratios, reverse=True)
    assert "(default)" in tables.step_cost(rows.read())
    assert "there already" in capsys.readouterr().out


def test_tables_say_so_where_nothing_has_run():
    every = (tables.stsb, tables.quickstart, tables.reload, tables.kill, tables.kill_in_words)
    for make in (*every, tables.kill_study, tables.factorizing, tables.step_cost):
        assert make([]).startswith("Not run yet: `python -m benchmarks.")


def test_tables_do_not_hide_a_difference():
    common = {
        "machine": {"threads": 1, "processor": "p"},
        "versions": {"stackcomp": "1", "torch": "2", "transformers": "5"},
    }
    common |= {"date": "2026-01-01", "seed": 0}
    point = {"after_seconds": 1.0, "killed": True, "last_step": "00-dense", **common}
    rows = [
        {"key": "whole", "seconds": 9.0, **common},
        {"key": "point 1", "identical": True, **point},
        {"key": "point 2", "identical": False, **point},
    ]
    moments = [{"after_seconds": 1.0, "rows": 3}]
    study = {"key": "study", "seconds": 9.0, "entries": 4, "moments": moments, "ended": 1, "identical": False}
    assert "**not the same** rows" in tables.kill_study([study | common])
    assert tables.kill_study([study | common | {"moments": []}]) == tables.not_run("kill_study")
    assert "1 of 2 weights files" in tables.kill(rows)
    assert "**no**" in tables.kill(rows)
