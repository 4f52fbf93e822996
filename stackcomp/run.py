"""One run under way: the walk over its steps.

    for each pass: load the checkpoint before it, apply, compare facts with the contract, save, reload, measure

Every pass starts from the files of the one before it, and every figure is measured on files: what the ledger says is what a user
loads, and a resumed run cannot differ from one that was never stopped.

Where steps are kept: in the run's own folder, or in a cache that runs of several processes share. A place in the cache is named
by the step's fingerprint and holds its checkpoint (`step`), its measurements, what training resumes from (`scratch`), and the
lock under which one process makes it while others wait.
"""

import copy
import gc
import json
import shutil
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackcomp import card, checkpoint, data, metrics, nn
from stackcomp.core import contract, fingerprint
from stackcomp.core import ledger as ledgers
from stackcomp.core.context import Context, Progress
from stackcomp.core.errors import CheckpointError, NothingToCompress, OutputInUse
from stackcomp.core.families import head_features
from stackcomp.core.files import locked, remove_partial, write_atomic
from stackcomp.core.ledger import Ledger, Measured, Row
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.pipeline import Pipeline
from stackcomp.core.plan import Plan
from stackcomp.core.settings import one_of, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stackcomp.data.tasks import Task
    from stackcomp.metrics.quality import Score


CHAIN = "chain.json"  # in the folder of a run with a cache: the names of its places there
UNTOLD = ("_name_or_path", "transformers_version")  # of a config: where it came from, not what it is


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run gives: the compressed model as it reloads, the tokenizer it reads from, its ledger, and the folder that holds them."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
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

    def __post_init__(self) -> None:
        from stackcomp.data.task import ROLES

        one_of("split", self.split, ROLES)
        if self.limit is not None:
            whole("limit", self.limit, 1)
        for name in ("batch_size", "latency_batch", "latency_length", "latency_repeats"):
            whole(name, getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run under way: fixed inputs, and the walk over its steps."""

    out: Path
    source: "PreTrainedModel"
    passes: tuple[Pass, ...]
    plans: list[Plan]
    tokenizer: "PreTrainedTokenizerBase | None"
    task: "Task | None"
    seed: int
    device: str
    measuring: Measuring
    calibration: Sequence[Any] | None
    progress: Progress | None
    cache: Path | None = None

    def go(self) -> Result:
        if self.cache is None:
            self._refuse_other()
            self._forget()
        else:
            write_atomic(self.out / CHAIN, json.dumps(self._chain))
        ledger = Ledger()
        for step in range(len(self.passes) + 1):
            ledger = ledger.with_row(self._stepped(step))
            write_atomic(self.out / ledgers.RUNNING, json.dumps(ledger.to_json(), indent=1))
        self._publish(ledger)
        last = len(self.passes)
        return Result(
            model=self._load(last), tokenizer=self._tokenizer(last), ledger=ledger, directory=self.out
        )

    # fingerprints and what is finished

    @cached_property
    def _chain(self) -> list[str]:
        """Fingerprints of the model as it came and after every pass."""
        config = self.source.config.to_dict()
        chain = [
            fingerprint.digest(
                {
                    "weights": nn.weights_digest(self.source),
                    "config": {name: value for name, value in config.items() if name not in UNTOLD},
                    "tokenizer": None if self.tokenizer is None else data.identity(self.tokenizer),
                }
            )
        ]
        machine = self._machine
        for item in self.passes:
            read = self._data_digest if item.contract.needs else "none"
            chain.append(fingerprint.link(chain[-1], item, seed=self.seed, data=read, machine=machine))
        return chain

    @cached_property
    def _data_digest(self) -> str:
        """Digest of everything the passes may read beside the model."""
        task = self.task.digest() if self.task is not None else None
        return fingerprint.digest(
            {"task": task, "calibration": None if self.calibration is None else list(self.calibration)}
        )

    @cached_property
    def _machine(self) -> dict[str, Any]:
        """What byte-identity depends on beside the settings."""
        import torch

        return {
            "threads": torch.get_num_threads(),
            "dtype": str(self.source.dtype).removeprefix("torch."),
            "device": self.device,
            "instructions": metrics.instructions(),
        }

    def _whole(self, step: int) -> bool:
        """Whether `step` is on disk, unaltered and with this run's fingerprint."""
        try:
            checkpoint.verify(self._folder(step))
            return self._row(step).fingerprint == self._chain[step]
        except CheckpointError:
            return False

    def _refuse_other(self) -> None:
        """Raise OutputInUse where the run's own folder holds steps from another model."""
        try:
            other = self._row(0).fingerprint != self._chain[0]
        except (CheckpointError, OSError):
            return
        if other:
            raise OutputInUse(
                f"{self.out} holds a run of another model or tokenizer, or of a head drawn with another seed: give another folder"
            )

    def _forget(self) -> None:
        """Remove the steps of another pipeline from the run's own folder."""
        ours = {self._folder(step) for step in range(len(self.passes) + 1)}
        for folder in sorted((self.out / "steps").iterdir()):
            if folder.is_dir() and folder not in ours:
                self._say(f"{folder} is no step of this pipeline: removed")
                shutil.rmtree(folder)

    @contextmanager
    def _held(self, step: int) -> Generator[None]:
        """Hold the place of `step` in the cache: another process that wants the same step waits, then finds
        it made."""
        if self.cache is None:  # the whole folder is ours
            yield
            return
        place = self.cache / self._chain[step]
        with locked(place, wait=True):
            remove_partial(place)
            yield

    # one step

    def _stepped(self, step: int) -> Row:
        """The row of `step`, which is made where it is not there, as are steps before it that were removed meanwhile."""
        while True:
            try:
                with self._held(step):
                    if not self._whole(step):
                        shutil.rmtree(self._folder(step), ignore_errors=True)
                        self._make(step)
                    return replace(self._row(step), measured=self._measured(step))
            except Exception:
                gone = [place for place in range(step) if not checkpoint.is_ours(self._folder(place))]
                if not gone:
                    raise
            for place in gone:
                self._stepped(place)

    def _make(self, step: int) -> None:
        """Run the pass of `step` on the files before it and save; step 0 saves the model as it came."""
        if step:
            self._say(f"[{step}/{len(self.passes)}] {self.passes[step - 1]}")
        start = time.perf_counter()
        findings: Findings = {}
        with metrics.PeakMemory() as memory:
            if step == 0:
                model = copy.deepcopy(self.source)  # saving writes to its config
                tokenizer = self.tokenizer
            else:
                model, tokenizer = self._load(step - 1), self._tokenizer(step - 1)
                findings = self._apply(step, model, tokenizer)
                contract.verify(self.passes[step - 1], self.plans[step], plan_of(model))
        row = Row(
            step=step,
            name="dense" if step == 0 else self.passes[step - 1].name,
            declaration="" if step == 0 else repr(self.passes[step - 1]),
            fingerprint=self._chain[step],
            seed=self.seed,
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
            tokenizer=tokenizer,
            recipe={
                "pipeline": repr(Pipeline(*self.passes[:step])),
                "seed": self.seed,
                "linear_bytes": {
                    id_: handle.spec.total_bytes
                    for id_, handle in nn.weights(model).items()
                    if handle.spec.kind == "linear"
                },
            },
            ledger=lambda sizes: Ledger((replace(row, components=sizes),)).to_json(),
        )
        shutil.rmtree(self._scratch(step), ignore_errors=True)

    def _apply(
        self, step: int, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None"
    ) -> Findings:
        import torch

        item, mark = self.passes[step - 1], self._chain[step]
        scratch = self._scratch(step)
        if not (scratch / "fingerprint").is_file() or (scratch / "fingerprint").read_text("utf8") != mark:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            write_atomic(scratch / "fingerprint", mark)
        chosen = self.plans[step - 1]
        targets = (
            tuple(weight.id for weight in chosen.weights)
            if not item.contract.selects
            else item.selected(chosen)
        )
        torch.manual_seed(self.seed)
        context = Context(
            targets=targets,
            seed=self.seed,
            scratch=scratch,
            device=self.device,
            task=self.task,
            tokenizer=tokenizer,
            teacher=lambda: self._teacher(tokenizer),
            calibration=self._calibration,
            origins={weight.id: weight.origin for weight in self._bound(step - 1).weights},
            progress=self._progress,
        )
        return item.apply(model, context)

    def _bound(self, step: int) -> Plan:
        """The plan after `step`, with what the passes until then have chosen."""
        done = [item.bound(self._row(place).findings) for place, item in enumerate(self.passes[:step], 1)]
        return contract.predict(done, self.plans[0])[-1]

    def _measured(self, step: int) -> Measured:
        """What was measured of `step` in this way, now or before."""
        path = self._notes(step) / f"{self._way}.json"
        noted = _noted(path)
        if noted is None:
            start = time.perf_counter()
            found = self._measure(step)
            noted = asdict(replace(found, seconds=time.perf_counter() - start))
            _note(path, noted)
        return Measured(**noted)

    def _measure(self, step: int) -> Measured:
        """Score and latency of the files of `step`, beside those of the model as it came."""
        how = self.measuring
        model = self._dense if step == 0 else self._load(step)
        found = Measured()
        if self.task is not None:
            tokenizer = self._tokenizer(step)
            score = self._dense_score if step == 0 else self._score(model, tokenizer)
            found = replace(
                found, metric=score.metric, score=score.value, noise=score.noise, examples=score.n
            )
            if self.task.kind != "language_modelling" or self._kept(tokenizer) is None:
                difference = metrics.paired_difference(self._dense_score, score)
                found = replace(
                    found,
                    difference=difference.value,
                    difference_noise=difference.noise,
                    output_error=metrics.output_error(self._dense_score, score),
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
        """Score of the model as it came, from the outcomes and outputs that an earlier run noted where there are any."""
        import numpy as np

        assert self.task is not None
        path = self._notes(0) / f"told-{self._way}.json"
        noted = _noted(path)
        if noted is None:
            score = self._score(self._dense, self._tokenizer(0))
            outputs = None if score.outputs is None else score.outputs.tolist()
            _note(path, {"outcomes": score.outcomes.tolist(), "outputs": outputs})
            return score
        outputs = None if noted["outputs"] is None else np.array(noted["outputs"])
        statistic = metrics.statistic_of(self.task)
        return metrics.score_of(np.array(noted["outcomes"]), self.task.metric, statistic, outputs)

    @cached_property
    def _way(self) -> str:
        """Digest of what a measurement depends on beside the model."""
        figures = [figure.name for figure in fields(Measured)]
        return fingerprint.digest([asdict(self.measuring), self._data_digest, self._machine, figures])

    def _score(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None") -> "Score":
        how = self.measuring
        assert self.task is not None
        assert tokenizer is not None
        return metrics.evaluate(
            model,
            tokenizer,
            self.task,
            split=how.split,
            limit=how.limit,
            batch_size=how.batch_size,
            device=self.device,
            progress=self._progress,
        )

    # small parts

    def _load(self, step: int) -> "PreTrainedModel":
        model: Any = checkpoint.load(self._folder(step))
        return model.to(self.device)

    def _tokenizer(self, step: int) -> "PreTrainedTokenizerBase | None":
        """The tokenizer that the model of `step` reads from, as it reloads."""
        return None if self.tokenizer is None else type(self.tokenizer).from_pretrained(self._folder(step))

    def _teacher(self, tokenizer: "PreTrainedTokenizerBase | None") -> "PreTrainedModel":
        """The model as it came, with the vocabulary of `tokenizer`."""
        model, kept = self._load(0), self._kept(tokenizer)
        if kept is not None:
            nn.keep_words(model, kept)
        return model

    def _kept(self, tokenizer: "PreTrainedTokenizerBase | None") -> list[int] | None:
        """The ids that the words of `tokenizer` had in the model as it came; None where these are all it had."""
        whole = self.tokenizer
        if whole is None or tokenizer is None or tokenizer.get_vocab() == whole.get_vocab():
            return None
        return data.places(tokenizer, whole)

    def _folder(self, step: int) -> Path:
        if self.cache is not None:
            return self.cache / self._chain[step] / "step"
        name = "dense" if step == 0 else self.passes[step - 1].slug
        return self.out / "steps" / f"{step:02d}-{name}"

    def _scratch(self, step: int) -> Path:
        if self.cache is not None:
            return self.cache / self._chain[step] / "scratch"
        return self.out / "scratch" / f"{step:02d}"

    def _notes(self, step: int) -> Path:
        """The folder of what was measured of `step`."""
        return (self.out / "measured" if self.cache is None else self.cache) / self._chain[step]

    def _row(self, step: int) -> Row:
        """The row that `_make` wrote, with the bytes of the layers that some pass of *this* pipeline changes."""
        row = ledgers.read((self._folder(step) / "ledger.json").read_text("utf8")).rows[0]
        stored = json.loads((self._folder(step) / "recipe.json").read_text("utf8"))["linear_bytes"]
        ids = [weight.id for weight in self.plans[step].weights if weight.origin in self._touched]
        return replace(row, layer_bytes=sum(stored.get(id_, 0) for id_ in ids))

    @cached_property
    def _touched(self) -> set[str]:
        """The weights that some pass of the pipeline changes, by the ids they had in the model as it came."""
        return {
            plan[id_].origin
            for item, plan in zip(self.passes, self.plans, strict=False)
            if item.contract.selects
            for id_ in item.selected(plan)
        }

    @property
    def _progress(self) -> Progress:
        return self.progress or bars

    def _say(self, text: str) -> None:
        """Tell a person what is under way, unless another progress was given."""
        if self.progress is None:
            print(text, file=sys.stderr, flush=True)

    def _calibration(self, count: int) -> Sequence[Any]:
        """The first `count` calibration texts."""
        given = self.calibration
        if given is not None:
            return given[:count]
        assert self.task is not None
        return self.task.texts("train", count)

    def _publish(self, ledger: Ledger) -> None:
        """Put the last step's files into `out` itself, and the model card beside them."""
        checkpoint.publish(self._folder(len(self.passes)), self.out, ledger=ledger.to_json())
        card.write(self.out, self.source, Pipeline(*self.passes), ledger, self.task)
        (self.out / ledgers.RUNNING).unlink()
        shutil.rmtree(self.out / "scratch", ignore_errors=True)


def plan_of(model: "PreTrainedModel") -> Plan:
    """The plan of a model in memory. Raises NothingToCompress when it has no linear layer."""
    plan = Plan.of(
        (handle.spec for handle in nn.weights(model).values()),
        head_features=head_features(model.config.to_dict()),
    )
    if not any(weight.kind == "linear" for weight in plan.weights):
        raise NothingToCompress(
            f"{type(model).__name__} has no linear layer: stackcomp compresses nn.Linear and Conv1D layers"
        )
    return plan


def bars(items: Any, /, label: str, total: int | None = None) -> Any:
    """Progress bars on standard error; none where it is no terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=label, total=total, leave=False, disable=None)


def _noted(path: Path) -> Any:
    """The JSON value that `_note` left at `path`; None where there is none, or it was altered."""
    try:
        noted = json.loads(path.read_text("utf8"))
        return noted["value"] if noted["digest"] == fingerprint.digest(noted["value"]) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _note(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"digest": fingerprint.digest(value), "value": value}))
