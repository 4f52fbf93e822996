"""Killed anywhere and started again, a run ends with the bytes of one that was left alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stackcomp.core.errors import StackcompError
from tests.training.toy import SETTINGS, classifier, run

ROOT = Path(__file__).parents[2]


class Killed(Exception):
    """Stands for a kill inside the process."""


def stop_at(step: int):
    """A progress bar that ends the run when so many steps are done."""

    def progress(items, /, label, total=None):
        for number, item in enumerate(items):
            if label == "training" and number == step:
                raise Killed
            yield item

    return progress


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    model = classifier()
    report = run(model, tokenizer, tmp_path_factory.mktemp("whole"))
    assert report.steps == 18
    assert report.resumed_step == 0
    return model.state_dict()


def same(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(part, weights[name]) for name, part in model.state_dict().items())


@pytest.mark.parametrize("steps", [[1], [6], [7, 3], [5, 8, 1]])
def test_resumed_run_equals_a_whole_one(tokenizer, tmp_path: Path, whole, steps: list[int]) -> None:
    for step in steps:
        with pytest.raises(Killed):
            run(classifier(), tokenizer, tmp_path, progress=stop_at(step))
    model = classifier()
    report = run(model, tokenizer, tmp_path)
    reached = 0
    for step in steps:
        reached += step - step % 2 if reached % 2 == 0 else step
    assert report.resumed_step == reached
    assert same(model, whole)


def test_finished_run_is_not_repeated(tokenizer, tmp_path: Path, whole) -> None:
    first = run(classifier(), tokenizer, tmp_path)
    model = classifier()
    report = run(model, tokenizer, tmp_path)
    assert report.resumed_step == report.steps == 18
    assert report.final_loss == first.final_loss
    assert same(model, whole)


@pytest.mark.parametrize("damage", ["no marker", "cut short", "extra folder", "marker cut"])
def test_half_written_checkpoints_do_not_count(tokenizer, tmp_path: Path, whole, damage: str) -> None:
    with pytest.raises(Killed):
        run(classifier(), tokenizer, tmp_path, progress=stop_at(9))
    (folder,) = tmp_path.glob("checkpoint-*")
    marker = folder / "complete.json"
    if damage == "no marker":
        marker.unlink()
    elif damage == "cut short":
        os.truncate(folder / "optimizer.pt", 100)
    elif damage == "marker cut":
        marker.write_text(marker.read_text()[:50])
    else:
        (tmp_path / "checkpoint-10").mkdir()
    model = classifier()
    report = run(model, tokenizer, tmp_path)
    assert report.resumed_step == (8 if damage == "extra folder" else 0)
    assert same(model, whole)


def test_scratch_of_another_run_is_not_used(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(classifier(), tokenizer, tmp_path, progress=stop_at(9))
    kept = tmp_path.parent / "kept"
    shutil.copytree(tmp_path, kept)
    assert run(classifier(), tokenizer, tmp_path, seed=6).resumed_step == 0
    with pytest.raises(StackcompError, match="another model"):
        run(classifier(num_hidden_layers=1), tokenizer, kept)


def test_only_the_last_checkpoint_is_kept_and_none_is_pickled_code(tokenizer, tmp_path: Path) -> None:
    run(classifier(), tokenizer, tmp_path, trainable=lambda name: "classifier" in name)
    (folder,) = tmp_path.glob("*")
    assert folder.name == "checkpoint-18"
    files = json.loads((folder / "complete.json").read_text())["files"]
    assert set(files) == {
        "weights.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    }
    torch.load(folder / "optimizer.pt", weights_only=True)
    assert files["weights.safetensors"] < 1500  # the head and the buffers, not the frozen rest


def test_killed_process_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL at random moments: within a step, while a checkpoint is written, between epochs."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

    def start(scratch: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "tests.training.toy",
            str(tmp_path / scratch),
            str(tmp_path / f"{scratch}.out"),
        ]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    whole = start("whole")
    assert whole.wait(120) == 0
    chance = random.Random(0)
    for _ in range(2):
        process = start("killed")
        assert process.stdout is not None
        for _ in range(chance.randint(2, 9)):
            process.stdout.readline()
        time.sleep(chance.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "killed.out").exists()
    last = start("killed")
    assert last.wait(120) == 0
    assert (tmp_path / "killed.out").read_bytes() == (tmp_path / "whole.out").read_bytes()
    assert SETTINGS.dropout
