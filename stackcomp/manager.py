"""`PassManager`: the only place that loops, times, measures, fingerprints, saves and resumes.

The data flow of a run:

    check the whole pipeline on facts -> for each pass: load the checkpoint before it, apply, compare facts,
    save, reload, measure

Every pass starts from the files of the one before it, and every figure is measured on files: what the ledger
says is what a user loads, and a resumed run cannot differ from one that was never stopped.
"""

import gc
import json
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackcomp.core import contract, fingerprint, headers
from stackcomp.core.context import Context, Progress, quiet
from stackcomp.core.contract import Need
from stackcomp.core.errors import MissingNeed, NothingToCompress, OutputInUse, UnsupportedModel
from stackcomp.core.files import locked, remove_partial, write_atomic
from stackcomp.core.ledger import Ledger, Measured, Row
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.pipeline import Pipeline
from stackcomp.core.plan import Plan

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stackcomp.data.tasks import Task
    from stackcomp.metrics.quality import Score

FORMAT = 1
RUN_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run gives: the compressed model as it reloads, its ledger, and the folder that holds both."""

    model: "PreTrainedModel"
    ledger: Ledger
    directory: Path

    @property
    def farewell(self) -> str:
        """Where the result is, and the two lines that load it."""
        return (
            f"\nThe compressed model is in {self.directory}. Load it with\n\n"
            f"    import stackcomp\n    model = stackcomp.load({str(self.directory)!r})"
        )


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What is measured after each pass.

    split and limit: the examples the score is taken on, all of the task's test split unless said; latency:
    whether to time the model, on `latency_batch` texts of `latency_length` tokens, `latency_repeats` times
    beside the model as it came.
    """

    split: str = "test"
    limit: int | None = None
    batch_size: int = 32
    latency: bool = True
    latency_batch: int = 8
    latency_length: int = 128
    latency_repeats: int = 9


def check(pipeline: Pipeline | Pass, model: "nn.Module | str | Path | None" = None) -> list[Plan]:
    """Judge a whole pipeline without reading a weight; returns the plans before the first pass and after
    each.

    `model` is a module, a folder or a hub name (config and headers are read), or None for a plain dense model
    of the first family on which every glob matches. Raises PipelineRefused, SelectionEmpty, NothingToCompress
    or UnsupportedModel.
    """
    from stackcomp.core.errors import SelectionEmpty

    if model is None:
        for kind in headers.PLAIN_KINDS:
            try:
                return contract.predict(pipeline.flat(), headers.plain(kind))
            except SelectionEmpty:
                continue
        return contract.predict(pipeline.flat(), headers.plain(headers.PLAIN_KINDS[0]))
    if isinstance(model, str | Path):
        return contract.predict(pipeline.flat(), headers.plan_of(model))
    return contract.predict(pipeline.flat(), plan_of(model))


def plan_of(model: "nn.Module") -> Plan:
    """The plan of a model in memory. Raises NothingToCompress when it has no linear layer."""
    from stackcomp import nn

    plan = Plan.of(handle.spec for handle in nn.weights(model).values())
    if not any(weight.kind == "linear" for weight in plan.weights):
        raise NothingToCompress(
            f"{type(model).__name__} has no linear layer: stackcomp compresses nn.Linear and Conv1D layers"
        )
    return plan


@dataclass(frozen=True, kw_only=True)
class PassManager:
    """Runs pipelines into the folder `out`.

    task: gives training data, calibration text and the score; without one, passes that need none still run,
    unscored. tokenizer: of the model, or where to load it from. seed: of every random choice. device: "cpu"
    or a torch device. progress: draws bars; `stackcomp.core.context.quiet` draws none. calibration: texts to
    use in place of the task's training split.
    """

    out: str | Path
    task: "Task | None" = None
    tokenizer: "PreTrainedTokenizerBase | str | Path | None" = None
    seed: int = 0
    device: str = "cpu"
    measuring: Measuring = Measuring()
    calibration: Sequence[Any] | None = None
    progress: Progress | None = None

    def run(
        self, model: "nn.Module | str | Path", pipeline: Pipeline | Pass, *, resume: bool = False
    ) -> Result:
        """Check, then run `pipeline` on `model` (never changed) and leave checkpoint, recipe and ledger in
        `out`.

        With `resume`, passes that `out` holds finished for the same input, settings and versions are not run
        again. Raises PipelineRefused, MissingNeed or BadWeights before any compute, OutputInUse when `out`
        holds something else.
        """
        from stackcomp import nn

        _hush()
        source = self._module(model)
        plans = contract.predict(pipeline.flat(), plan_of(source))
        tokenizer = self._tokenizer()
        self._check_needs(pipeline, tokenizer)
        nn.check_finite(source)
        out = Path(self.out)
        self._claim(out, resume)
        with locked(out):
            remove_partial(out)
            (out / "steps").mkdir(exist_ok=True)
            remove_partial(out / "steps")
            return _Run(
                manager=self, out=out, source=source, tokenizer=tokenizer, passes=pipeline.flat(), plans=plans
            ).go()

    def _module(self, model: "nn.Module | str | Path") -> "PreTrainedModel":
        """The model in memory; a path or hub name is loaded, with the head of the task where there is one."""
        from transformers import PreTrainedModel

        if isinstance(model, PreTrainedModel):
            return model
        if isinstance(model, str | Path):
            import torch

            torch.manual_seed(self.seed)  # a new head is drawn at random
            return load_model(model, self.task)
        raise UnsupportedModel(
            f"model={type(model).__name__} is no transformers model: give a PreTrainedModel, a folder or a hub name"
        )

    def _tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """The tokenizer, loaded where a path or hub name was given."""
        if not isinstance(self.tokenizer, str | Path):
            return self.tokenizer
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.tokenizer)
        except (OSError, ValueError) as error:
            raise MissingNeed(
                f"tokenizer={str(self.tokenizer)!r} holds no tokenizer: give one, or where it is"
            ) from error

    def _check_needs(self, pipeline: Pipeline | Pass, tokenizer: "PreTrainedTokenizerBase | None") -> None:
        """Refuse before any compute what a pass or the score would miss later."""
        for step in pipeline.flat():
            needs = step.contract.needs
            if needs & {Need.LABELS, Need.TEXT} and self.task is None:
                raise MissingNeed(f"{step.name} needs a task to train on: PassManager(task=...)")
            if Need.CALIBRATION in needs and self.task is None and self.calibration is None:
                raise MissingNeed(
                    f"{step.name} needs calibration text: PassManager(task=...) or PassManager(calibration=[...])"
                )
            if needs and tokenizer is None:
                raise MissingNeed(f"{step.name} reads text: PassManager(tokenizer=...)")
            if Need.LABELS in needs and self.task is not None and tokenizer is not None:
                self.task.encode(tokenizer, "train", 1)
        if self.task is not None:
            if tokenizer is None:
                raise MissingNeed(
                    f"task {self.task.name!r} cannot be scored without PassManager(tokenizer=...)"
                )
            self.task.encode(tokenizer, self.measuring.split, 1)

    def _claim(self, out: Path, resume: bool) -> None:
        """Make `out` ours, or raise OutputInUse."""
        if out.is_file():
            raise OutputInUse(f"{out} is a file: give a folder")
        held = out.is_dir() and any(path.name != ".lock" for path in out.iterdir())
        if held and not (out / RUN_FILE).is_file():
            raise OutputInUse(f"{out} holds something else: give an empty or new folder")
        if held and not resume:
            raise OutputInUse(
                f"{out} holds a run: continue it with resume=True (--resume), or give another folder"
            )
        out.mkdir(parents=True, exist_ok=True)
        if not held:
            write_atomic(out / RUN_FILE, json.dumps({"format": FORMAT}))


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run under way: fixed inputs, and the walk over its steps."""

    manager: PassManager
    out: Path
    source: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    passes: tuple[Pass, ...]
    plans: list[Plan]

    def go(self) -> Result:
        chain = self._chain()
        measured = self._measured(chain)
        done = self._finished(chain)
        self._forget_after(done)
        ledger = Ledger()
        for step in range(len(self.passes) + 1):
            if step >= done:
                self._make(step, chain[step])
            row = self._row(step)
            row = replace(
                row,
                measured=measured[row.fingerprint] if row.fingerprint in measured else self._measure(step),
            )
            ledger = ledger.with_row(row)
            write_atomic(self.out / "ledger.json", json.dumps(ledger.to_json(), indent=1))
        self._publish(ledger)
        return Result(model=self._load(len(self.passes)), ledger=ledger, directory=self.out)

    # fingerprints and what is finished

    def _chain(self) -> list[str]:
        """Fingerprints of the model as it came and after every pass."""
        from stackcomp import nn

        manager = self.manager
        tokenizer = self.tokenizer.get_vocab() if self.tokenizer is not None else None
        chain = [
            fingerprint.digest(
                {
                    "weights": nn.weights_digest(self.source),
                    "config": self.source.config.to_dict(),
                    "tokenizer": tokenizer,
                }
            )
        ]
        machine = self._machine
        for item in self.passes:
            data = self._data_digest if item.contract.needs else "none"
            chain.append(fingerprint.link(chain[-1], item, seed=manager.seed, data=data, machine=machine))
        return chain

    @cached_property
    def _data_digest(self) -> str:
        """Digest of everything the passes may read beside the model."""
        manager = self.manager
        task = manager.task.digest() if manager.task is not None else None
        return fingerprint.digest({"task": task, "calibration": manager.calibration})

    @cached_property
    def _machine(self) -> dict[str, Any]:
        """What byte-identity depends on beside the settings."""
        import torch

        return {
            "threads": torch.get_num_threads(),
            "dtype": str(self.source.dtype).removeprefix("torch."),
            "device": self.manager.device,
            "instructions": torch.backends.cpu.get_cpu_capability(),
        }

    def _finished(self, chain: list[str]) -> int:
        """How many leading steps, the model as it came included, are on disk whole and with these
        fingerprints."""
        from stackcomp import checkpoint
        from stackcomp.core.errors import CheckpointError

        for step, wanted in enumerate(chain):
            try:
                if not self._folder(step).is_dir() or self._row(step).fingerprint != wanted:
                    return step
                checkpoint.verify(self._folder(step))
            except CheckpointError:
                return step
        return len(chain)

    def _forget_after(self, done: int) -> None:
        """Remove steps that another pipeline left beyond the shared prefix."""
        for folder in sorted((self.out / "steps").iterdir()):
            if int(folder.name[:2]) >= done:
                shutil.rmtree(folder)

    def _measured(self, chain: list[str]) -> dict[str, Measured]:
        """Measurements already taken, by fingerprint."""
        from stackcomp.core import ledger
        from stackcomp.core.errors import CheckpointError

        path = self.out / "ledger.json"
        if not path.is_file():
            return {}
        try:
            rows = ledger.read(path.read_text("utf8")).rows
        except CheckpointError:
            return {}
        return {row.fingerprint: row.measured for row in rows if row.fingerprint in chain}

    # one step

    def _make(self, step: int, mark: str) -> None:
        """Run the pass of `step` on the files before it and save; step 0 saves the model as it came."""
        from stackcomp import checkpoint, nn
        from stackcomp.metrics.cost import PeakMemory

        if step:
            self._say(f"[{step}/{len(self.passes)}] {self.passes[step - 1]}")
        start = time.perf_counter()
        findings: Findings = {}
        with PeakMemory() as memory:
            if step == 0:
                model = self.source
            else:
                model = self._load(step - 1)
                findings = self._apply(step, model, mark)
                contract.verify(self.passes[step - 1], self.plans[step], plan_of(model))
        row = Row(
            step=step,
            name="dense" if step == 0 else self.passes[step - 1].name,
            declaration="" if step == 0 else repr(self.passes[step - 1]),
            fingerprint=mark,
            seed=self.manager.seed,
            seconds=time.perf_counter() - start,
            peak_memory_bytes=memory.peak_bytes,
            components={},
            layer_bytes=0,
            findings=findings,
            machine=self._machine,
        )
        checkpoint.save(
            model,
            self._folder(step),
            tokenizer=self.tokenizer,
            recipe={
                "pipeline": repr(Pipeline(*self.passes[:step])),
                "seed": self.manager.seed,
                "linear_bytes": {
                    id_: handle.spec.total_bytes
                    for id_, handle in nn.weights(model).items()
                    if handle.spec.kind == "linear"
                },
            },
            ledger=lambda sizes: Ledger((replace(row, components=sizes),)).to_json(),
        )
        shutil.rmtree(self._scratch(step), ignore_errors=True)

    def _apply(self, step: int, model: "PreTrainedModel", mark: str) -> Findings:
        import torch

        item = self.passes[step - 1]
        scratch = self._scratch(step)
        if not (scratch / "fingerprint").is_file() or (scratch / "fingerprint").read_text("utf8") != mark:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            write_atomic(scratch / "fingerprint", mark)
        chosen = self.plans[step - 1]
        targets = (
            tuple(weight.id for weight in chosen.weights)
            if item.contract.trains
            else chosen.select(only=item.only, skip=item.skip)
        )
        torch.manual_seed(self.manager.seed)
        context = Context(
            targets=targets,
            seed=self.manager.seed,
            scratch=scratch,
            device=self.manager.device,
            task=self.manager.task,
            tokenizer=self.tokenizer,
            teacher=lambda: self._load(0),
            calibration=self._calibration,
            progress=self._progress,
        )
        return item.apply(model, context)

    def _measure(self, step: int) -> Measured:
        """Score and latency of the files of `step`, beside those of the model as it came."""
        from stackcomp import metrics

        manager, how = self.manager, self.manager.measuring
        model = self._dense if step == 0 else self._load(step)
        found = Measured()
        if manager.task is not None:
            score = self._dense_score if step == 0 else self._score(model)
            difference = metrics.paired_difference(self._dense_score, score)
            found = replace(
                found,
                metric=score.metric,
                score=score.value,
                noise=score.noise,
                examples=score.n,
                difference=difference.value,
                difference_noise=difference.noise,
            )
        if how.latency:
            inputs = metrics.latency_inputs(model, batch=how.latency_batch, length=how.latency_length)
            took = metrics.latency(model, self._dense, inputs, repeats=how.latency_repeats)
            found = replace(
                found,
                latency_ms=took.ms,
                latency_ratio=took.ratio,
                latency_batch=took.batch,
                latency_length=took.length,
            )
        gc.collect()
        return found

    @cached_property
    def _dense(self) -> "PreTrainedModel":
        """The model as it came, reloaded."""
        return self._load(0)

    @cached_property
    def _dense_score(self) -> "Score":
        return self._score(self._dense)

    def _score(self, model: "PreTrainedModel") -> "Score":
        from stackcomp import metrics

        manager, how = self.manager, self.manager.measuring
        assert manager.task is not None
        assert self.tokenizer is not None
        return metrics.evaluate(
            model,
            self.tokenizer,
            manager.task,
            split=how.split,
            limit=how.limit,
            batch_size=how.batch_size,
            device=manager.device,
            progress=self._progress,
        )

    # small parts

    def _load(self, step: int) -> "PreTrainedModel":
        from stackcomp import checkpoint

        return checkpoint.load(self._folder(step)).to(self.manager.device)

    def _folder(self, step: int) -> Path:
        name = "dense" if step == 0 else self.passes[step - 1].slug
        return self.out / "steps" / f"{step:02d}-{name}"

    def _scratch(self, step: int) -> Path:
        return self.out / "scratch" / f"{step:02d}"

    def _row(self, step: int) -> Row:
        """The row that `_make` wrote, with the bytes of the layers that some pass of *this* pipeline changes."""
        from stackcomp.core import ledger

        row = ledger.read((self._folder(step) / "ledger.json").read_text("utf8")).rows[0]
        stored = json.loads((self._folder(step) / "recipe.json").read_text("utf8"))["linear_bytes"]
        return replace(row, layer_bytes=sum(stored.get(id_, 0) for id_ in self._touched))

    @cached_property
    def _touched(self) -> set[str]:
        """Ids of the weights that some pass of the pipeline changes."""
        return {
            id_
            for item, plan in zip(self.passes, self.plans, strict=False)
            if not item.contract.trains
            for id_ in plan.select(only=item.only, skip=item.skip)
        }

    @property
    def _progress(self) -> Progress:
        return self.manager.progress or bars

    def _say(self, text: str) -> None:
        """Tell a person what is under way, unless another progress was given."""
        if self.manager.progress is None:
            print(text, file=sys.stderr, flush=True)

    def _calibration(self, count: int) -> Sequence[Any]:
        """The first `count` calibration texts."""
        given = self.manager.calibration
        if given is not None:
            return given[:count]
        assert self.manager.task is not None
        return self.manager.task.texts("train", count)

    def _publish(self, ledger: Ledger) -> None:
        """Put the last step's files into `out` itself."""
        from stackcomp import checkpoint

        checkpoint.publish(self._folder(len(self.passes)), self.out, ledger=ledger.to_json())
        shutil.rmtree(self.out / "scratch", ignore_errors=True)


def _hush() -> None:
    """Keep what torchao says of missing GPU libraries when transformers imports it out of a run's messages."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def load_model(source: str | Path, task: "Task | None" = None) -> "PreTrainedModel":
    """The model at `source`: a checkpoint of ours, or what `transformers` finds there, with the head of
    `task`."""
    import transformers

    from stackcomp import checkpoint

    if checkpoint.is_ours(source):
        return checkpoint.load(source)
    if task is None:
        return transformers.AutoModel.from_pretrained(source)
    heads = {"num_labels": task.num_labels} if task.num_labels else {}
    return getattr(transformers, task.auto_class).from_pretrained(source, **heads)


def bars(items: Any, /, label: str, total: int | None = None) -> Any:
    """Progress bars on standard error; none where it is no terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=label, total=total, leave=False, disable=None)


__all__ = ["Measuring", "PassManager", "Result", "bars", "check", "load_model", "plan_of", "quiet"]
