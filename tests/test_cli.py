"""The command line as a user meets it: exit status, messages, and what it does not import."""

import json
import subprocess
import sys
import time

import pytest
import torch

import stackcomp as sc
from stackcomp.cli import main
from tests import toys

LEGAL = "import stackcomp as sc\npipeline = sc.Pipeline(sc.MagnitudePrune(only='encoder.layer.*'), sc.Int8Weights())\n"
ILLEGAL = "import stackcomp as sc\npipeline = sc.Pipeline(sc.Int8Weights(), sc.MagnitudePrune())\n"


def file(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return str(path)


def test_check_prints_what_each_step_reaches(tmp_path, capsys):
    assert main(["check", file(tmp_path, LEGAL)]) == 0
    out = capsys.readouterr().out
    assert "a plain dense model" in out
    assert "MagnitudePrune(only='encoder.layer.*'): 72 weights" in out


def test_an_illegal_order_is_refused_on_standard_error(tmp_path, capsys):
    assert main(["check", file(tmp_path, ILLEGAL)]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert "PipelineRefused: step 2, MagnitudePrune()" in found.err
    assert "a legal order: MagnitudePrune() -> Int8Weights()" in found.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\n", "defines no `pipeline`"),
        ("x = 1\nraise KeyError('k')\n", "line 2: KeyError"),
        ("def f(:\n", "line 1: SyntaxError"),
        ("import sys\nsys.exit(3)\n", "line 2: SystemExit"),
        ("pipeline = 3\n", "is no Pipeline"),
        ("import stackcomp as sc\npipeline = sc.Pipeline()\n", "holds no pass"),
        ("import stackcomp as sc\npipeline = sc.Int8Weights(onyl='x')\n", "did you mean only"),
        ("import stackcomp as sc\npipeline = sc.Int8Weights(only='nowhere.*')\n", "nearest paths are"),
        ("import stackcomp as sc\npipeline = sc.Int8Weights()\nmodel = 'no/such/folder'\n", "no/such/folder"),
    ],
)
def test_bad_files_exit_with_2_and_say_why(tmp_path, capsys, text, said):
    assert main(["check", file(tmp_path, text)]) == 2
    assert said in capsys.readouterr().err


def test_a_missing_file_and_a_run_without_a_task(tmp_path, capsys):
    assert main(["check", str(tmp_path / "none.py")]) == 2
    assert "is no file" in capsys.readouterr().err
    assert main(["run", file(tmp_path, LEGAL), "--out", str(tmp_path / "out")]) == 2
    assert "defines no `model`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_show_refuses_what_is_no_run(tmp_path, capsys):
    assert main(["show", str(tmp_path)]) == 2
    assert "no ledger.json" in capsys.readouterr().err
    for damaged in (b"{", b"[]", b"null", b"\xff"):
        (tmp_path / "ledger.json").write_bytes(damaged)
        assert main(["show", str(tmp_path), "--json"]) == 2
        assert "ledger.json" in capsys.readouterr().err
    (tmp_path / "ledger.json").write_text('{"format": 1, "rows": []}')
    assert main(["show", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"format": 1, "rows": []}


def test_passes_lists_every_registered_pass(capsys):
    from stackcomp.passes import registered

    assert main(["passes"]) == 0
    out = capsys.readouterr().out
    for name, cls in registered().items():
        assert f"{name}\n" in out
        assert cls.paper in out
    assert "an ordinary, shallower model of the same family, however its layers are stored." in out
    assert "contract: asks nothing and keeps every fact" in out
    assert "steps between the points" not in out


def test_passes_explains_the_settings_of_those_that_are_named(capsys):
    assert main(["passes", "STF", "DenseSparse"]) == 0
    out = capsys.readouterr().out
    assert "every: " in out
    assert "steps between the points from which a killed run resumes" in out
    assert "how far the ratio of one layer may be from that of all" in out
    assert main(["passes", "DenseSpars"]) == 2
    assert "no pass is named 'DenseSpars': the nearest are DenseSparse" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["passes"], ["check", "FILE"]])
def test_light_commands_import_neither_torch_nor_transformers_and_are_quick(tmp_path, arguments):
    given = [file(tmp_path, LEGAL) if item == "FILE" else item for item in arguments]
    code = (
        "import sys\nfrom stackcomp.cli import main\n"
        f"try:\n    status = main({given!r})\nexcept SystemExit as end:\n    status = end.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'scipy', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else status)\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 5


RUN = """
import stackcomp as sc
from tests import toys
task = toys.classification_task()
tokenizer = toys.tokenizer()
pipeline = sc.Pipeline(sc.MagnitudePrune(), sc.Int8Weights())


def model():
    return toys.bert_classifier()
"""


def test_run_leaves_a_model_that_show_explains_and_resume_continues(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["run", file(tmp_path, RUN), "--out", str(out), "--seed", "7"]) == 0
    printed = capsys.readouterr().out
    assert "2 Int8Weights" in printed
    assert f"stackcomp.load({str(out)!r})" in printed
    assert main(["run", file(tmp_path, RUN), "--out", str(out)]) == 2
    assert "--resume" in capsys.readouterr().err
    weights = (out / "model.safetensors").read_bytes()
    assert main(["run", file(tmp_path, RUN), "--out", str(out), "--seed", "7", "--resume"]) == 0
    assert (out / "model.safetensors").read_bytes() == weights
    capsys.readouterr()
    assert main(["show", str(out), "--json"]) == 0
    ledger = json.loads(capsys.readouterr().out)
    assert [row["seed"] for row in ledger["rows"]] == [7, 7, 7]
    assert ledger["rows"][-1]["size_bytes"] == len(weights)


def test_a_run_that_fails_on_top_of_a_finished_one_leaves_it_whole_and_is_shown(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["run", file(tmp_path, RUN), "--out", str(out)]) == 0
    longer = RUN.replace("Int8Weights())", "Int8Weights(), sc.Distill(steps=4, learning_rate=1e30))")
    assert longer != RUN
    assert main(["run", file(tmp_path, longer), "--out", str(out), "--resume"]) == 2
    assert "BadWeights" in capsys.readouterr().err
    sc.load(out)
    assert main(["show", str(out), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 3
    assert main(["run", file(tmp_path, RUN), "--out", str(out), "--resume"]) == 0
    assert not (out / "running.json").exists()


def test_what_the_system_left_among_the_steps_is_passed_over(tmp_path):
    out = tmp_path / "out"
    assert main(["run", file(tmp_path, RUN), "--out", str(out)]) == 0
    (out / "steps" / ".DS_Store").write_text("")
    assert main(["run", file(tmp_path, RUN), "--out", str(out), "--resume"]) == 0


def test_unpack_writes_what_transformers_reads_alone(tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    out, plain = tmp_path / "out", tmp_path / "plain"
    assert main(["run", file(tmp_path, RUN), "--out", str(out)]) == 0
    assert main(["unpack", str(out), "--out", str(plain)]) == 0
    assert "MB, from" in capsys.readouterr().out
    config = json.loads((plain / "config.json").read_text())
    assert "quantization_config" not in config
    batch = toys.batch(AutoTokenizer.from_pretrained(plain))
    found, wanted = (
        AutoModelForSequenceClassification.from_pretrained(folder)(**batch).logits for folder in (plain, out)
    )
    torch.testing.assert_close(found, wanted)
    assert main(["unpack", str(out), "--out", str(plain)]) == 2
    assert "is in use" in capsys.readouterr().err
    assert main(["unpack", str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_with_the_way_out(tmp_path, capsys, monkeypatch, error):
    def full(*arguments):
        raise error

    monkeypatch.setattr("os.fsync", full)
    assert main(["run", file(tmp_path, RUN), "--out", str(tmp_path / "out")]) == 1
    assert "the disk is full" in capsys.readouterr().err
