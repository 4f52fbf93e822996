"""The loop: it learns, trains what it is told to, and leaves caller and model as they were."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from stackcomp.core.errors import DataError, SettingError, TrainingDiverged
from stackcomp.data import tasks
from stackcomp.metrics import evaluate
from stackcomp.training import TaskLoss, TrainSettings, planned_steps
from tests.training.toy import TASK, classifier, run


def test_passes_may_name_training_without_importing_torch() -> None:
    code = "import sys; from stackcomp import training; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_it_learns(tokenizer, tmp_path: Path) -> None:
    rows = {"train": [{"text": ("good film", "bad film")[i % 2], "label": i % 2} for i in range(50)]}
    task = tasks.classification(rows, test=10, selection=10)
    model = classifier()
    report = run(
        model,
        tokenizer,
        tmp_path,
        task=task,
        loss=TaskLoss(task=task),
        settings=TrainSettings(epochs=10, learning_rate=3e-2, batch_size=5),
    )
    assert report.steps == 60
    assert report.final_loss < 0.3
    assert evaluate(model, tokenizer, task).value == 100


@pytest.mark.parametrize("pays", [False, True])
def test_bf16_is_used_where_it_pays_unless_said(tokenizer, tmp_path: Path, monkeypatch, pays: bool) -> None:
    monkeypatch.setattr("stackcomp.metrics.bf16_pays", lambda device: pays)
    used = {
        said: run(
            classifier(), tokenizer, tmp_path / str(said), settings=TrainSettings(steps=1, bf16=said)
        ).bf16
        for said in (None, False, True)
    }
    assert used == {None: pays, False: False, True: True}


@pytest.mark.parametrize("bf16", [False, True])
def test_same_seed_same_weights(tokenizer, tmp_path: Path, bf16: bool) -> None:
    settings = TrainSettings(epochs=9, steps=5, bf16=bf16, learning_rate=1e-2)
    models = [classifier() for _ in range(3)]
    for number, model in enumerate(models):
        run(model, tokenizer, tmp_path / str(number), settings=settings, seed=number // 2)
    states = [torch.cat([part.flatten() for part in model.parameters()]) for model in models]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert states[0].dtype == torch.float32


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_16_bits_learns_what_one_of_32_does(tokenizer, tmp_path: Path, dtype, bf16: bool) -> None:
    """Most of these steps are smaller than half of what such a number can tell apart."""
    settings = TrainSettings(epochs=5, learning_rate=1e-4, batch_size=8, bf16=bf16)
    start, moved = classifier().to(dtype).float(), []
    for width in (dtype, torch.float32):
        model = classifier().to(dtype).to(width)
        run(model, tokenizer, tmp_path / str(width), settings=settings)
        assert {part.dtype for part in model.parameters()} == {width}
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        moved.append(torch.cat([(now - before).flatten() for now, before in pairs]).float())
    assert (moved[0] - moved[1]).norm() < 0.3 * moved[1].norm()


def test_only_chosen_parameters_move(tokenizer, tmp_path: Path) -> None:
    model = classifier()
    before = {name: part.clone() for name, part in model.named_parameters()}
    report = run(model, tokenizer, tmp_path, trainable=lambda name: "embeddings" not in name)
    moved = {name for name, part in model.named_parameters() if not torch.equal(part, before[name])}
    assert moved == {name for name in before if "embeddings" not in name}
    assert report.trained_parameters == sum(before[name].numel() for name in moved)
    assert report.trained_parameters + report.frozen_parameters == sum(
        part.numel() for part in before.values()
    )
    with pytest.raises(SettingError, match="nothing to train"):
        run(model, tokenizer, tmp_path, trainable=lambda name: False)


def test_caller_and_model_are_left_as_they_were(
    tokenizer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = classifier().train()
    model.bert.encoder.layer[0].eval()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    config = model.config.to_dict()
    modes = [module.training for module in model.modules()]
    flags = [part.requires_grad for part in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    verbosity = logging.get_verbosity()
    here = set(Path.cwd().iterdir())
    run(model, tokenizer, tmp_path, settings=TrainSettings(steps=3))
    assert [module.training for module in model.modules()] == modes
    assert [part.requires_grad for part in model.parameters()] == flags
    assert all(part.grad is None for part in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert logging.get_verbosity() == verbosity
    assert model.config.to_dict() == config
    assert set(Path.cwd().iterdir()) == here
    assert capfd.readouterr() == ("", "")


def test_progress_ticks_once_a_step(tokenizer, tmp_path: Path) -> None:
    seen = []

    def progress(items, /, label, total=None):
        seen.append((label, total))
        yield from items
        seen.append("closed")

    run(classifier(), tokenizer, tmp_path, settings=TrainSettings(epochs=2, steps=4), progress=progress)
    assert seen == [("training", 4), "closed"]


def test_the_caller_hears_of_every_step_and_knows_their_number_before(tokenizer, tmp_path: Path) -> None:
    seen: list[int] = []
    for settings in (TrainSettings(epochs=1.5, batch_size=8), TrainSettings(epochs=9, steps=4, limit=20)):
        seen.clear()
        report = run(classifier(), tokenizer, tmp_path, settings=settings, on_step=seen.append)
        assert seen == list(range(report.steps))
        assert planned_steps(TASK, tokenizer, settings, labelled=True) == report.steps


def test_diverging_loss_names_the_step(tokenizer, tmp_path: Path) -> None:
    model = classifier()
    calls = []

    def poison(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return output * (torch.nan if len(calls) == 3 else 1)

    model.classifier.register_forward_hook(poison)
    with pytest.raises(TrainingDiverged, match="nan at step 3 of 18: lower learning_rate"):
        run(model, tokenizer, tmp_path)
    assert all(part.requires_grad for part in model.parameters())


def test_labels_are_asked_for_where_needed(tokenizer, tmp_path: Path) -> None:
    task = tasks.classification({"train": [{"text": "the film"}] * 20}, test=2, selection=2)
    with pytest.raises(DataError, match="no column 'label'"):
        run(classifier(), tokenizer, tmp_path, task=task, loss=TaskLoss(task=task))


def test_tied_weights_are_trained_once_and_stay_tied(tokenizer, tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    rows = [{"text": "the film was very good and a bad plot"}] * 20
    task = tasks.language_modelling({"train": rows, "validation": rows, "test": rows}, max_length=8)
    before = evaluate(model, tokenizer, task).value
    settings = TrainSettings(epochs=4, batch_size=4, learning_rate=1e-2, save_every=3)
    report = run(model, tokenizer, tmp_path, task=task, loss=TaskLoss(task=task), settings=settings)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert report.trained_parameters == sum(part.numel() for part in model.parameters())
    assert evaluate(model, tokenizer, task).value < before / 2


class Scaled(nn.Module):
    """Stands for a compressed layer: float values and scales, integer indices, and a buffer that shares
    memory."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(8, 8))
        self.scales = nn.Parameter(torch.ones(8, 1))
        self.register_buffer("indices", torch.arange(8, dtype=torch.uint8))
        self.register_buffer("again", self.indices.view(2, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., self.indices.long()] @ (self.values * self.scales).T


def test_compressed_layers_train_and_resume(tokenizer, tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = classifier()
        torch.manual_seed(1)
        model.bert.encoder.layer[0].attention.self.query = Scaled()
        model.config.quantization_config = {"quant_method": "stackcomp"}
        model.is_quantized = True
        return model

    whole, again = build(), build()
    run(whole, tokenizer, tmp_path / "whole", settings=TrainSettings(epochs=3, steps=6, save_every=3))
    run(build(), tokenizer, tmp_path / "cut", settings=TrainSettings(epochs=3, steps=6, save_every=3))
    assert (
        run(
            again, tokenizer, tmp_path / "cut", settings=TrainSettings(epochs=3, steps=6, save_every=3)
        ).resumed_step
        == 6
    )
    for name, part in whole.state_dict().items():
        assert torch.equal(part, again.state_dict()[name]), name
    assert not torch.equal(whole.bert.encoder.layer[0].attention.self.query.scales, torch.ones(8, 1))


def test_epochs_limit_and_steps_bound_the_run(tokenizer, tmp_path: Path) -> None:
    def steps(**settings: object) -> int:
        chosen = TrainSettings(batch_size=8, **settings)
        return run(classifier(), tokenizer, tmp_path / str(chosen), settings=chosen).steps

    assert len(TASK.dataset("train")) == 48
    assert steps() == 6
    assert steps(epochs=0.5) == 3
    assert steps(epochs=2, steps=7) == 7
    assert steps(limit=10) == 2


WRONG: dict[str, object] = {
    "epochs": 0,
    "steps": 0,
    "learning_rate": -1,
    "batch_size": 0,
    "warmup": 1,
    "weight_decay": -1,
    "gradient_clip": 0,
    "limit": 0,
    "save_every": 0,
    "schedule": "cubic",
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(SettingError, match=f"{name}={WRONG[name]!r}"):
        TrainSettings(**{name: WRONG[name]})
