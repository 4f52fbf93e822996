"""The walk over a study on a toy model: what it runs, what it shares, what it survives."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

import stackcomp as sc
from stackcomp import checkpoint, metrics
from stackcomp.cli import main
from stackcomp.core.errors import CheckpointError, OutputInUse, PipelineRefused, SelectionEmpty, SettingError
from stackcomp.core.files import locked
from stackcomp.run import CHAIN
from stackcomp.studies import Rows, Runner, runner
from tests import toys
from tests.studies.counted import Broken, Prune, Round, Train, applied, entry, study


@pytest.fixture
def run(tmp_path):
    """Runs a study in `tmp_path`; gives the number of failures, and the rows by key."""

    def go(mine, **settings):
        rows = Rows(name=mine.name, folder=tmp_path / "results")
        failures = Runner(study=mine, rows=rows, out=tmp_path / "out", **settings).go()
        return failures, {row["key"]: row for row in rows.read()}

    return go


def test_every_entry_leaves_a_row_and_none_is_run_twice(run, folder, tmp_path, capsys):
    failures, rows = run(study(folder))
    assert failures == 0
    assert list(rows) == ["tuned", "tuned/pruned", "tuned/rounded"]
    assert applied() == ["Train", "Prune", "Round"]
    said = capsys.readouterr().out
    assert "3 entries, 0 done; 3 pass runs remain, 1 more are saved by shared prefixes; time: unknown" in said
    assert "[3/3] tuned/rounded" in said
    row = rows["tuned/rounded"]
    assert [step["name"] for step in row["steps"]] == ["dense", "Prune", "Round"]
    assert row["seconds"] == sum(step["seconds"] for step in row["steps"])
    assert row["layer_compression"] > row["steps"][1]["layer_compression"] > 1
    assert row["size_bytes"] == sum(row["components"].values())
    assert row["labels"] == {"ratio": 8.0}
    assert sc.parse(row["declaration"].replace("Round", "Int8Weights").replace("Prune", "MagnitudePrune"))
    assert row["model"]["declaration"] == rows["tuned"]["declaration"]
    assert rows["tuned"]["layer_compression"] is None
    before = (tmp_path / "results" / "toy.jsonl").read_text()
    assert run(study(folder))[0] == 0
    assert (tmp_path / "results" / "toy.jsonl").read_text() == before
    assert len(applied()) == 3
    assert list((tmp_path / "out" / "cache").iterdir()) == []
    assert list((tmp_path / "out" / "entries").iterdir()) == []


def test_a_model_that_is_an_entry_is_the_baseline_and_the_teacher(run, folder):
    _, rows = run(study(folder))
    tuned, pruned = rows["tuned"]["steps"][-1], rows["tuned/pruned"]["steps"]
    assert pruned[1]["findings"]["teacher"] == tuned["findings"]["left"]
    assert rows["tuned"]["steps"][1]["findings"]["teacher"] != tuned["findings"]["left"]
    assert pruned[0]["score"] == tuned["score"]
    assert rows["tuned/pruned"]["input_fingerprint"] == pruned[0]["fingerprint"]


def test_a_step_is_measured_once_whichever_entry_has_it(run, folder, monkeypatch):
    real, calls = metrics.evaluate, []
    monkeypatch.setattr(metrics, "evaluate", lambda *given, **how: calls.append(1) or real(*given, **how))
    run(study(folder))
    assert len(calls) == 2 + 2 + 1  # each model as it came, each pass


def test_rows_alone_resume_and_only_what_is_missing_is_made_again(run, folder, tmp_path, capsys):
    _, before = run(study(folder), only=("tuned", "tuned/pruned"))
    shutil.rmtree(tmp_path / "out")
    run(study(folder), only=("tuned", "tuned/pruned"))
    assert applied() == ["Train", "Prune"]
    path = tmp_path / "results" / "toy.jsonl"
    path.write_text(path.read_text().replace(before["tuned"]["fingerprint"], "of another machine"))
    capsys.readouterr()
    failures, rows = run(study(folder))
    assert failures == 0
    assert applied()[2:] == ["Train", "Prune", "Round"]
    said = capsys.readouterr().out
    assert "3 pass runs remain" in said
    assert "tuned was made again and is not the model of its row" in said
    assert rows["tuned"]["fingerprint"] == "of another machine"
    assert rows["tuned/pruned"] == before["tuned/pruned"]


def test_a_poisoned_step_is_noticed_and_made_again(run, folder, tmp_path, capsys):
    _, rows = run(study(folder), only=("tuned", "tuned/pruned"))
    step = tmp_path / "out" / "cache" / rows["tuned/pruned"]["fingerprint"] / "step"
    raw = bytearray((step / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (step / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError):
        checkpoint.verify(step)
    failures, rows = run(study(folder))
    assert failures == 0
    assert applied() == ["Train", "Prune", "Prune", "Round"]
    assert rows["tuned/rounded"]["steps"][1]["findings"] == rows["tuned/pruned"]["steps"][1]["findings"]


@pytest.mark.parametrize("damage", ["another score", "{}", "[1]", "no JSON", "an older form"])
def test_a_poisoned_measurement_is_noticed_and_made_again(run, folder, tmp_path, damage):
    _, rows = run(study(folder), only=("tuned/pruned",))
    cache = tmp_path / "out" / "cache"
    notes = [*cache.glob("*/*.json")]
    assert (
        len(notes) == 3
    )  # of the tuned model and of the pruned one, and what the first one told of each example
    for note in notes:
        told = json.loads(note.read_text())
        forms = {
            "another score": {**told, "value": {**told["value"], "score": 99.0}},
            "an older form": told["value"],
        }
        note.write_text(json.dumps(forms[damage]) if damage in forms else damage)
    path = tmp_path / "results" / "toy.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])  # of the tuned model
    failures, again = run(study(folder), only=("tuned/pruned",))
    assert failures == 0
    assert applied() == ["Train", "Prune"]
    assert again["tuned/pruned"]["score"] == rows["tuned/pruned"]["score"]


def test_what_a_missing_entry_wants_is_kept_and_the_rest_goes(run, folder, tmp_path):
    run(study(folder), only=("tuned", "tuned/pruned"))
    kept = {path.name for path in (tmp_path / "out" / "cache").iterdir()}
    rows = {row["key"]: row for row in Rows(name="toy", folder=tmp_path / "results").read()}
    assert kept == {step["fingerprint"] for step in rows["tuned/pruned"]["steps"]}
    assert [path.name[:6] for path in (tmp_path / "out" / "entries").iterdir()] == ["tuned-"]


def test_a_step_that_another_process_holds_is_kept_until_it_lets_go(run, folder, tmp_path):
    mine = study(folder)
    _, rows = run(mine, only=("tuned", "tuned/pruned"), kept=frozenset({"tuned/pruned"}))
    step = tmp_path / "out" / "cache" / rows["tuned/pruned"]["fingerprint"]
    shorter = sc.Study(name="toy", entries=mine.entries[:2])
    with locked(step):
        run(shorter)
        assert checkpoint.is_ours(step / "step")
    run(shorter)
    assert not step.exists()


def test_a_step_that_an_entry_began_to_use_meanwhile_is_kept(run, folder, tmp_path, monkeypatch):
    late, early = (entry(f"seed {seed}", folder, Round(), seed=seed) for seed in (1, 0))
    mine = sc.Study(name="toy", entries=(late, early))
    _, rows = run(mine, only=("seed 0",), kept=frozenset({"seed 0"}))
    root = rows["seed 0"]["steps"][0]["fingerprint"]
    chain = tmp_path / "out" / "entries" / late.slug / CHAIN

    def slow(place, **how):
        if place.name == root:
            chain.parent.mkdir()
            chain.write_text(json.dumps([root]))
        return locked(place, **how)

    monkeypatch.setattr(runner, "locked", slow)
    run(mine, only=("seed 0",))
    assert [path.name for path in (tmp_path / "out" / "cache").iterdir()] == [root]


def test_a_damaged_list_of_steps_is_written_anew(run, folder, tmp_path):
    mine = sc.Study(name="toy", entries=(entry("a", folder, Round()),))
    chain = tmp_path / "out" / "entries" / mine.entries[0].slug / CHAIN
    chain.parent.mkdir(parents=True)
    chain.write_text('["a')
    (chain.parent / "run.json").write_text(json.dumps({"format": 1}))
    assert run(mine)[0] == 0


def test_a_step_that_vanished_is_made_again(run, folder, tmp_path, monkeypatch):
    def apply(self, model, context, real=Round.apply):
        found = next(step for step in cache.iterdir() if not (step / "scratch").is_dir())
        if len(applied()) == 0:
            shutil.rmtree(found)
        return real(self, model, context)

    cache = tmp_path / "out" / "cache"
    monkeypatch.setattr(Round, "apply", apply)
    failures, _ = run(sc.Study(name="toy", entries=(entry("a", folder, Round()),)))
    assert failures == 0
    assert applied() == ["Round", "Round"]


def test_a_failing_entry_says_so_in_its_row_and_the_rest_goes_on(run, folder):
    broken = entry("broken", folder, Broken())
    mine = sc.Study(
        name="toy",
        entries=(broken, entry("child", broken, Round()), entry("fine", folder, Prune())),
    )
    failures, rows = run(mine)
    assert failures == 2
    assert rows["broken"]["error"] == {"type": "RuntimeError", "message": "no luck"}
    assert "'broken', failed" in rows["child"]["error"]["message"]
    assert rows["fine"]["score"] is not None
    assert run(mine)[0] == 2
    assert applied() == ["Prune"]
    mended = sc.Study(name="toy", entries=(entry("broken", folder, Prune()), mine.entries[2]))
    failures, rows = run(mended)
    assert failures == 0
    assert "error" not in rows["broken"]


def test_a_trial_with_other_settings_takes_no_row_away(run, folder, tmp_path):
    """Nor does its failure; and what was run once is not run again when the settings are back."""

    def made(*passes, **settings):
        return sc.Study(name="toy", entries=(entry("a", folder, *passes, **settings),))

    (whole,) = run(made(Prune()))[1].values()
    run(made(Prune(), limit=2))
    assert run(made(Broken()))[0] == 1
    rows = Rows(name="toy", folder=tmp_path / "results").read()
    assert [(row.get("limit"), "error" in row) for row in rows] == [(8, False), (2, False), (8, True)]
    assert run(made(Prune()))[0] == 0
    assert applied() == ["Prune", "Prune"]
    assert made(Prune()).own(rows) == [whole]


def test_a_failure_stays_until_the_entry_was_tried_again(run, folder, tmp_path):
    mine = sc.Study(name="toy", entries=(entry("a", folder, Broken()),))
    assert run(mine)[0] == 1
    failures, rows = run(mine, minutes=0.0)
    assert (failures, rows["a"]["error"]["message"]) == (0, "no luck")  # it was not tried
    runner = Runner(study=mine, rows=Rows(name="toy", folder=tmp_path / "results"), out=tmp_path / "out")
    assert runner.table() == "failed   a  RuntimeError: no luck"
    failures, rows = run(mine)
    assert failures == 1
    assert "again" not in rows["a"]


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_files_put_together_the_finished_row_counts(run, folder, tmp_path, order):
    mine = study(folder)
    finished = run(mine)[1]["tuned"]
    rows = Rows(name="toy", folder=tmp_path / "results")
    failed = {
        **mine.entries[0].asked,
        **mine.entries[0].data,
        "key": "tuned",
        "error": {"type": "X", "message": "y"},
    }
    rows.path.write_text("".join(f"{json.dumps(row)}\n" for row in (finished, failed)[::order]), "utf8")
    assert rows.read() == [finished]
    rows.add(failed)
    assert rows.read() == [finished]


def test_a_full_disk_stops_the_study_and_is_no_failure_of_the_entry(run, folder, tmp_path, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stackcomp.run.checkpoint.save", full)
    with pytest.raises(OSError, match="No space"):
        run(study(folder))
    monkeypatch.undo()
    assert Rows(name="toy", folder=tmp_path / "results").read() == []


def test_an_illegal_pipeline_is_refused_before_any_run(run, folder, tmp_path):
    mine = sc.Study(
        name="toy", entries=(entry("fine", folder, Prune()), entry("wrong", folder, Round(), Prune()))
    )
    with pytest.raises(PipelineRefused, match="'wrong'"):
        run(mine)
    assert applied() == []
    assert not (tmp_path / "out").exists()


def test_a_folder_is_of_one_study_and_results_can_be_written_before_anything_runs(run, folder, tmp_path):
    run(sc.Study(name="toy", entries=(entry("fine", folder, Prune()),)))
    with pytest.raises(OutputInUse, match="working folder of the study 'toy'"):
        run(sc.Study(name="other", entries=(entry("fine", folder, Prune()),)))
    (tmp_path / "file").write_text("")
    rows = Rows(name="toy", folder=tmp_path / "file")
    with pytest.raises(FileExistsError):
        Runner(study=study(folder), rows=rows, out=tmp_path / "out").go()
    assert applied() == ["Prune"]


def test_no_entry_is_started_after_the_minutes_are_over(run, folder, capsys):
    assert run(study(folder), minutes=0) == (0, {})
    assert "run the same command again" in capsys.readouterr().out
    with pytest.raises(SelectionEmpty, match="the nearest keys are tuned"):
        run(study(folder), only=("tnued",))
    with pytest.raises(SettingError, match="minutes=nan"):
        run(study(folder), minutes=float("nan"))


FILE = """
from tests.studies.counted import study as made
study = made({folder!r})
"""


def test_a_model_of_before_its_row_was_removed_or_its_task_declared_anew_is_not_started_from(
    run, folder, tmp_path
):
    def made(*, max_length):
        task = toys.classification_task()
        tuned = entry(
            "tuned", folder, Train(steps=2, batch_size=4), task=replace(task, max_length=max_length)
        )
        pruned = entry("pruned", tuned, Prune(), task=task)
        rounded = entry("rounded", tuned, Round(), task=task)
        return sc.Study(name="toy", entries=(tuned, pruned, rounded))

    run(made(max_length=16), only=("pruned", "tuned"))
    run(made(max_length=4), only=("rounded",))
    assert applied() == ["Train", "Prune", "Train", "Round"]
    rows = Rows(name="toy", folder=tmp_path / "results")
    (left,) = (line for line in rows.path.read_text("utf8").splitlines() if '"rounded"' in line)
    rows.path.write_text(f"{left}\n", "utf8")
    run(made(max_length=4), only=("pruned",))
    assert {row["key"] for row in rows.read()} == {"tuned", "pruned", "rounded"}
    inputs = {row["key"]: row["input_fingerprint"] for row in rows.read()}
    assert inputs["pruned"] == inputs["rounded"]


def test_a_failure_of_an_older_declaration_is_not_that_of_the_entry(folder, tmp_path):
    mine = study(folder)
    rows = Rows(name="toy", folder=tmp_path / "results")
    failed = {"error": {"type": "BadWeights", "message": "NaN"}}
    for one, more in zip(mine.entries, ({}, {"declaration": "Pipeline(Old())"}), strict=False):
        rows.add({"key": one.key, **one.asked, **more, **failed})
    table = Runner(study=mine, rows=rows, out=tmp_path / "out").table().splitlines()
    assert [line.split()[0] for line in table] == ["failed", "missing", "missing"]


def test_a_key_of_any_length_has_a_folder(run, folder):
    long = entry("x" * 400, folder, Prune())
    assert run(sc.Study(name="toy", entries=(long,)))[0] == 0


@pytest.fixture
def command(folder, tmp_path):
    """The arguments that run the toy study from a file."""
    (tmp_path / "mine.py").write_text(FILE.format(folder=str(folder)))
    places = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    return ["study", str(tmp_path / "mine.py"), *places]


def start(command, stderr=subprocess.STDOUT, **environment):
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "stackcomp.cli", *command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def test_killed_in_the_middle_and_run_again(command, tmp_path):
    process = start(command, SECONDS_MORE="2")
    while "Prune" not in applied() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [row["key"] for row in Rows(name="toy", folder=tmp_path / "results").read()] == ["tuned"]
    assert main(command) == 0
    assert applied() == ["Train", "Prune", "Prune", "Round"]
    assert len(Rows(name="toy", folder=tmp_path / "results").read()) == 3


def test_without_a_reader_the_study_goes_on(command, tmp_path):
    process = start(command, stderr=subprocess.DEVNULL)
    process.stdout.close()
    assert process.wait() == 0
    assert len(Rows(name="toy", folder=tmp_path / "results").read()) == 3


def test_the_command_lists_runs_what_is_asked_for_and_tells_failures(command, tmp_path, capsys):
    assert main([*command, "--list"]) == 0
    assert "missing  tuned/pruned\n" in capsys.readouterr().out
    assert main([*command, "--list", "--only", "tuned", "--only", "tuned/p*"]) == 0
    listed = capsys.readouterr().out
    assert "missing  tuned\n" in listed
    assert "missing  tuned/pruned\n" in listed
    assert main([*command, "--only", "tun?d"]) == 0
    assert applied() == ["Train"]
    (tmp_path / "mine.py").write_text(
        "import stackcomp as sc\nfrom tests.studies.counted import *\n"
        f"made = study({str(tmp_path / 'model')!r}).entries\n"
        "study = sc.Study(name='toy', entries=(*made, entry('broken', made[0], Broken())))\n"
    )
    assert main([*command, "--only", "broken"]) == 1
    capsys.readouterr()
    assert main([*command, "--list"]) == 0
    said = capsys.readouterr().out
    assert "done     tuned  " in said
    assert "failed   broken  RuntimeError: no luck" in said
    (tmp_path / "mine.py").write_text("study = 3\n")
    assert main(command) == 2
    assert "defines no `study`" in capsys.readouterr().err


def test_a_list_is_light(folder, tmp_path):
    (tmp_path / "light.py").write_text(
        "import stackcomp as sc\n"
        "task = sc.tasks.glue('sst2')\n"
        f"entry = sc.Entry(key='a', model={str(folder)!r}, pipeline=sc.Pipeline(sc.Int8Weights()), task=task)\n"
        "study = sc.Study(name='light', entries=(entry,))\n"
    )
    given = [
        "study",
        str(tmp_path / "light.py"),
        "--list",
        "--results",
        str(tmp_path),
        "--out",
        str(tmp_path),
    ]
    code = (
        f"import sys, json\nfrom stackcomp.cli import main\nmain({json.dumps(given)})\n"
        "sys.exit(str({'torch', 'transformers', 'datasets'} & set(sys.modules) or '') or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "missing  a" in done.stdout
