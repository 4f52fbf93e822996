"""Killed anywhere and started again, a run ends with the bytes of one that was left alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stackcomp.core.errors import StackcompError
from tests.training.toy import classifier, run

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
        reached = (reached + step - 1) // 2 * 2  # stopped before the checkpoint of its last step
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


def test_killed_processes_resume_to_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL at random moments: within a step, while a checkpoint is written, between epochs."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "tests.training.toy", str(tmp_path), "3", "0"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    assert "checkpoint-" in done.stdout  # at least one was killed after its first checkpoint
