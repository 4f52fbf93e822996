"""The one training loop: `transformers.Trainer`, our batches and losses, and checkpoints that resume exactly.

A run killed anywhere and started again with the same arguments ends with the same bytes as one that was
left alone (same machine type, threads and versions): the order of batches depends on seed and epoch, the
random state is in every checkpoint, and a checkpoint counts only with its completion marker.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stackcomp.core.context import Progress, quiet
from stackcomp.core.errors import SettingError
from stackcomp.data.batches import Collator, LengthBatches, lengths_of
from stackcomp.nn import RoundedMatrix
from stackcomp.training.losses import Batch, Loss, Preparation
from stackcomp.training.settings import TrainSettings

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from stackcomp.data.task import Task


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a run did.

    seconds counts this process only; resumed_step is where it took up, 0 from the start.
    trained_parameters and frozen_parameters count elements, a tied parameter once. final_loss: mean over
    the last 20 steps. bf16: whether it ran under bfloat16 autocast.
    """

    steps: int
    seconds: float
    trained_parameters: int
    frozen_parameters: int
    final_loss: float
    resumed_step: int
    bf16: bool


def train(
    model: nn.Module,
    *,
    task: "Task",
    tokenizer: "PreTrainedTokenizerBase",
    loss: Loss,
    settings: TrainSettings,
    seed: int,
    scratch: Path,
    trainable: Callable[[str], bool] | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = quiet,
    on_step: Callable[[int], None] | None = None,
) -> TrainReport:
    """Train `model` in place on the training split of `task`, and resume by itself from what `scratch` holds.

    trainable: which parameters learn, by name; without it, those that require a gradient now. scratch: a
    private folder, the only place written to; what it holds of another run (other settings, seed, task or
    loss) is removed. on_step: called before every optimizer step with the number of steps done. The model
    gets its modes and its requires_grad back, and the caller its random state. Raises `SettingError` where
    nothing is left to train, `DataError` for data that cannot be used, and `TrainingDiverged` naming the
    step where the loss is not finite.
    """
    from stackcomp.training.trainer import LossTrainer, Run

    started = time.perf_counter()
    encoded = task.encode(tokenizer, "train", settings.limit, labelled=loss.labelled)
    rows = _Rows(encoded)
    batches = LengthBatches(rows.lengths, batch_size=settings.batch_size, seed=seed)
    steps = _steps(len(rows), settings)
    run = Run(
        settings=settings,
        steps=steps,
        seed=seed,
        scratch=Path(scratch),
        key=repr((settings, seed, task, loss, len(rows))),
        device=torch.device(device),
        progress=progress,
    )
    with _lent(model, trainable) as (trained, frozen), _widened(model):
        model.to(run.device)
        trainer = LossTrainer(
            model,
            loss=loss,
            rows=rows,
            batches=batches,
            collate=Collator(tokenizer, model),
            run=run,
            on_step=on_step,
        )
        loss.prepare(
            Preparation(
                task=task,
                visits=_visits(batches, steps),
                lengths=rows.lengths,
                batch_size=settings.batch_size,
                collate=lambda indices: _moved(trainer.collate([rows[i] for i in indices]), run.device),
                precision=run.precision,
                progress=progress,
            )
        )
        try:
            outcome = trainer.run_all()
        finally:
            loss.release()
    return TrainReport(
        steps=steps,
        seconds=time.perf_counter() - started,
        trained_parameters=trained,
        frozen_parameters=frozen,
        final_loss=outcome.final_loss,
        resumed_step=outcome.resumed_step,
        bf16=run.bf16,
    )


def planned_steps(
    task: "Task", tokenizer: "PreTrainedTokenizerBase", settings: TrainSettings, *, labelled: bool
) -> int:
    """How many steps `train` will take: what a schedule of its own must know beforehand."""
    return _steps(task.encode(tokenizer, "train", settings.limit, labelled=labelled).num_rows, settings)


def _steps(examples: int, settings: TrainSettings) -> int:
    steps = math.ceil(math.ceil(examples / settings.batch_size) * settings.epochs)
    return steps if settings.steps is None else min(steps, settings.steps)


class _Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Encoded examples as plain lists, each with its number."""

    def __init__(self, encoded: "Dataset") -> None:
        self._columns = encoded[:]
        self.lengths = lengths_of(self._columns)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, **{key: column[index] for key, column in self._columns.items()}}


def _visits(batches: LengthBatches, steps: int) -> list[int]:
    order: list[list[int]] = []
    epoch = 0
    while len(order) < steps:
        order += batches.of_epoch(epoch)
        epoch += 1
    return [index for batch in order[:steps] for index in batch]


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {key: part.to(device) for key, part in batch.items()}


@contextmanager
def _widened(model: nn.Module) -> Iterator[None]:
    """Parameters of 16 bits in float32 while they learn: most steps are smaller than what their own dtype can tell apart. What is trained
    with its rounding stays so, as it is stored by its codes."""
    own = {
        parameter: parameter.dtype
        for parameter in model.parameters()
        if parameter.dtype in (torch.bfloat16, torch.float16)
    }
    kept = {
        parameter
        for module in model.modules()
        if isinstance(module, RoundedMatrix)
        for parameter in module.parameters()
    }
    try:
        for parameter in own:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in own.items():
            if parameter not in kept:
                parameter.data = parameter.data.to(dtype)


@contextmanager
def _lent(model: nn.Module, trainable: Callable[[str], bool] | None) -> Iterator[tuple[int, int]]:
    """Set what learns; give back modes, requires_grad and gradients as they were."""
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    # A tied parameter has several names and learns where any of them is chosen.
    learning = dict.fromkeys(flags, False)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        chosen = flags[parameter] if trainable is None else trainable(name)
        learning[parameter] |= chosen and parameter.is_floating_point()
    if not any(learning.values()):
        raise SettingError("nothing to train: no parameter is chosen by trainable= and can have a gradient")
    try:
        for parameter, learns in learning.items():
            parameter.requires_grad_(learns)
        trained = sum(parameter.numel() for parameter, learns in learning.items() if learns)
        yield trained, sum(parameter.numel() for parameter in learning) - trained
    finally:
        for parameter, flag in flags.items():
            parameter.grad = None
            parameter.requires_grad_(flag)
        for module, training in modes.items():
            module.training = training
