"""Our subclass of `transformers.Trainer`. Imported only when something trains: the Trainer is slow to import.

The model is wrapped together with its loss in a plain module, for three reasons: the Trainer then neither
touches the model's config nor refuses a compressed model, autocast covers the loss, and data-parallel
wrapping sees one forward.
"""

import contextlib
import json
import os
import random
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from stackcomp import metrics
from stackcomp.core.context import Progress
from stackcomp.core.errors import CheckpointError, TrainingDiverged
from stackcomp.data.batches import Collator, LengthBatches
from stackcomp.nn.matrix import StoredMatrix
from stackcomp.training.losses import Loss
from stackcomp.training.precision import precision
from stackcomp.training.settings import TrainSettings

MARKER = "complete.json"
WEIGHTS = "weights.safetensors"
PREFIX = "checkpoint-"
RECENT = 20  # steps that the final loss is a mean of


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run; `key` tells it from another one that may have used the same scratch folder."""

    settings: TrainSettings
    steps: int
    seed: int
    scratch: Path
    key: str
    device: torch.device
    progress: Progress

    @cached_property
    def bf16(self) -> bool:
        """Whether forward passes run in bfloat16."""
        asked = self.settings.bf16
        return metrics.bf16_pays(self.device) if asked is None else asked

    def precision(self) -> contextlib.AbstractContextManager[None]:
        """The context of every forward pass."""
        return precision(self.device, bf16=self.bf16)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the steps themselves leave to report."""

    final_loss: float
    resumed_step: int


class LossModule(nn.Module):
    """The model and its loss as one module: forward gives the loss. A teacher inside the loss is no
    submodule."""

    def __init__(self, model: nn.Module, loss: Loss, run: Run) -> None:
        super().__init__()
        self.model = model
        self._loss = loss
        self._run = run

    def train(self, mode: bool = True) -> "LossModule":
        """Training mode, which leaves dropout off where the settings say so."""
        super().train(mode and self._run.settings.dropout)
        return self

    def forward(self, **batch: Tensor) -> Tensor:
        """The loss of one batch."""
        with self._run.precision():
            return self._loss(self.model, batch)


class LossTrainer(Trainer):
    """Our batches, losses and checkpoints on the Trainer's loop."""

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Loss,
        rows: "torch.utils.data.Dataset[dict[str, Any]]",
        batches: LengthBatches,
        collate: Collator,
        run: Run,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        self.collate = collate
        self._batches = batches
        self._run = run
        self._recent: deque[float] = deque(maxlen=RECENT)
        with _caller_undisturbed():
            super().__init__(
                model=LossModule(model, loss, run),
                args=_arguments(run),
                train_dataset=rows,
                data_collator=collate,
                callbacks=[_Bar(run), *([] if on_step is None else [_BeforeStep(on_step)])],
            )
            self.remove_callback(PrinterCallback)

    def run_all(self) -> Outcome:
        """Train to the last step, from the last complete checkpoint in scratch if there is one."""
        checkpoint = _last_checkpoint(self._run)
        resumed = 0 if checkpoint is None else int(checkpoint.name.removeprefix(PREFIX))
        if checkpoint is not None and resumed >= self._run.steps:  # the Trainer would take one step more
            self._load_from_checkpoint(str(checkpoint))
            return self._outcome(resumed)
        with _caller_undisturbed():
            _seed(self._run.seed)
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return self._outcome(resumed)

    def create_optimizer(self, *arguments: Any, **settings: Any) -> torch.optim.Optimizer:
        """AdamW, in which a scale takes steps that move values about as far as steps of values would: its rate is divided by the size of
        the codes, and nothing draws it to zero."""
        optimizer = super().create_optimizer(*arguments, **settings)
        assert self.model is not None
        coded = [
            matrix
            for matrix in self.model.modules()
            if isinstance(matrix, StoredMatrix) and matrix.scales is not None and matrix.scales.requires_grad
        ]
        scales = {id(matrix.scales) for matrix in coded}
        for group in optimizer.param_groups:
            group["params"] = [one for one in group["params"] if id(one) not in scales]
        for matrix in coded:
            rate = self.args.learning_rate / matrix.code_size()
            optimizer.add_param_group({"params": [matrix.scales], "lr": rate, "weight_decay": 0.0})
        return optimizer

    def _outcome(self, resumed: int) -> Outcome:
        return Outcome(final_loss=sum(self._recent) / len(self._recent), resumed_step=resumed)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        """Batches of similar lengths, in an order of seed and epoch only."""
        loader = torch.utils.data.DataLoader(
            self.train_dataset,  # pyright: ignore[reportArgumentType]
            batch_sampler=self._batches,
            collate_fn=self.collate,
        )
        return self.accelerator.prepare(loader)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The plugged-in loss; refuses to go on with one that is not finite."""
        loss = model(**inputs)
        value = float(loss.detach())
        if not np.isfinite(value):
            raise TrainingDiverged(
                f"the loss is {value} at step {self.state.global_step + 1} of {self._run.steps}: lower "
                "learning_rate "
                f"(now {self._run.settings.learning_rate:g}), raise warmup, or give bf16=False"
            )
        self._recent.append(value)
        return (loss, None) if return_outputs else loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if not self.args.should_save:
            return
        here = self._run.scratch / f"{PREFIX}{self.state.global_step}"
        files = {path.name: path.stat().st_size for path in sorted(here.iterdir())}
        marker = {"key": self._run.key, "files": files, "recent": list(self._recent)}
        partial = here / f"{MARKER}.partial"
        with partial.open("w") as file:
            json.dump(marker, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(here / MARKER)
        for other in self._run.scratch.glob(f"{PREFIX}*"):
            if other != here:
                shutil.rmtree(other)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Only what the steps change: a frozen weight is what it was when the run began.
        folder = Path(output_dir or self._run.scratch)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: part.contiguous().clone() for name, part in self._changing().items()}, folder / WEIGHTS
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = load_file(Path(resume_from_checkpoint, WEIGHTS))
        now = self._changing()
        if saved.keys() != now.keys():
            raise CheckpointError(
                f"{resume_from_checkpoint}: its weights are of another model; remove the folder"
            )
        with torch.no_grad():
            for name, part in now.items():
                there = saved[name].to(part.device)
                if not torch.equal(part, there):  # some constant buffers are expanded and take no copy
                    part.copy_(there)
        marker = json.loads(Path(resume_from_checkpoint, MARKER).read_text())
        self._recent.extend(marker["recent"])

    def _changing(self) -> dict[str, Tensor]:
        """Parameters that learn and every buffer, a shared one once (`named_*` leave repeats out)."""
        model: nn.Module = self._model.model
        learning = {
            f"parameter.{name}": part.data for name, part in model.named_parameters() if part.requires_grad
        }
        return learning | {f"buffer.{name}": part for name, part in model.named_buffers()}

    @property
    def _model(self) -> LossModule:
        return self.accelerator.unwrap_model(self.model)


class _Bar(TrainerCallback):
    """Draws the caller's progress bar, one tick a step."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._ticks: Iterator[int] = iter(())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        left = range(state.global_step, self._run.steps)
        self._ticks = iter(self._run.progress(left, label="training", total=len(left)))
        next(self._ticks, None)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        next(self._ticks, None)


class _BeforeStep(TrainerCallback):
    """Tells the caller how many steps are done, before each."""

    def __init__(self, on_step: Callable[[int], None]) -> None:
        self._on_step = on_step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._on_step(state.global_step)


def _arguments(run: Run) -> TrainingArguments:
    settings = run.settings
    arguments = TrainingArguments(
        output_dir=str(run.scratch),
        max_steps=run.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup,
        lr_scheduler_type=settings.schedule
        if settings.warmup == 0 or settings.schedule != "constant"
        else "constant_with_warmup",
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.gradient_clip,
        seed=run.seed,
        save_strategy="steps",
        save_steps=settings.save_every,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=run.device.type == "cpu",
        dataloader_pin_memory=run.device.type != "cpu",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one training runs on one device, however many there are
    return arguments


def _last_checkpoint(run: Run) -> Path | None:
    """The newest complete checkpoint of this very run; what is half-written or of another run is removed."""
    run.scratch.mkdir(parents=True, exist_ok=True)
    complete = []
    for folder in run.scratch.glob(f"{PREFIX}*"):
        if _is_complete(folder, run.key):
            complete.append(folder)
        else:
            shutil.rmtree(folder)
    return max(complete, key=lambda folder: int(folder.name.removeprefix(PREFIX)), default=None)


def _is_complete(folder: Path, key: str) -> bool:
    try:
        marker = json.loads((folder / MARKER).read_text())
        files = {name: (folder / name).stat().st_size for name in marker["files"]}
    except (OSError, ValueError, KeyError):
        return False
    return marker["key"] == key and files == marker["files"]


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def _caller_undisturbed() -> Iterator[None]:
    """The Trainer seeds every generator and sets the library's verbosity: give both back."""
    verbosity = logging.get_verbosity()
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            logging.set_verbosity(verbosity)
