"""`PassManager`: checks a pipeline, claims its folder, and runs it.

    judge the whole pipeline on facts -> what it needs is there -> the folder is ours -> run

Nothing is computed and no weight is read before all of that is settled.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackcomp import nn
from stackcomp.core import contract, headers
from stackcomp.core.context import Progress
from stackcomp.core.contract import Need
from stackcomp.core.errors import MissingNeed, OutputInUse, SelectionEmpty, SettingError, UnsupportedModel
from stackcomp.core.files import locked, remove_partial, write_atomic
from stackcomp.core.passes import Pass
from stackcomp.core.pipeline import Pipeline
from stackcomp.core.plan import Plan
from stackcomp.core.selection import all_match
from stackcomp.core.settings import whole
from stackcomp.loading import check_fits, check_task, hush, load_model, outline
from stackcomp.run import Measuring, Result, Run, plan_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stackcomp.data.tasks import Task

FORMAT = 1
RUN_FILE = "run.json"


def check(
    pipeline: Pipeline | Pass,
    model: "PreTrainedModel | Plan | str | Path | None" = None,
    task: "Task | None" = None,
) -> list[Plan]:
    """Judge a whole pipeline without reading a weight; returns the plans before the first pass and after
    each.

    `model` is a module, a folder or a hub name (config and headers are read), the plan that another pipeline left, or
    None for a plain dense model of the first family on which every glob matches. task: where a glob matches nothing in the headers,
    the model is judged with the head of this task. Raises PipelineRefused, SelectionEmpty, NothingToCompress or UnsupportedModel.
    """
    _check_pipeline(pipeline)
    if model is None:
        for kind in headers.PLAIN_KINDS:
            try:
                return contract.predict(pipeline.flat(), headers.plain(kind))
            except SelectionEmpty:
                continue
        return contract.predict(pipeline.flat(), headers.plain(headers.PLAIN_KINDS[0]))
    if isinstance(model, str | Path):
        try:
            return contract.predict(pipeline.flat(), headers.plan_of(model))
        except SelectionEmpty:
            if task is None:
                raise
            return contract.predict(pipeline.flat(), plan_of(outline(model, task)))
    if isinstance(model, Plan):
        return contract.predict(pipeline.flat(), model)
    return contract.predict(pipeline.flat(), plan_of(model))


@dataclass(frozen=True, kw_only=True)
class PassManager:
    """Runs pipelines into the folder `out`.

    task: gives training data, calibration text and the score; without one, passes that need none still run,
    unscored. tokenizer: of the model, or where to load it from. seed: of every random choice. device: "cpu"
    or a torch device. progress: draws bars; `stackcomp.core.context.quiet` draws none. calibration: texts to
    use in place of the task's training split, each cut to as many tokens as the task reads, or to 128 without
    a task. cache: a folder that several runs and processes share, so that each step they have in common is
    made once; without one, steps are kept in `out`.
    """

    out: str | Path
    task: "Task | None" = None
    tokenizer: "PreTrainedTokenizerBase | str | Path | None" = None
    seed: int = 0
    device: str = "cpu"
    measuring: Measuring = field(default_factory=Measuring)
    calibration: Sequence[Any] | None = None
    progress: Progress | None = None
    cache: str | Path | None = None

    def run(
        self, model: "PreTrainedModel | str | Path", pipeline: Pipeline | Pass, *, resume: bool = False
    ) -> Result:
        """Check, then run `pipeline` on `model` (never changed) and leave checkpoint, recipe and ledger in
        `out`.

        With `resume`, passes that `out` holds finished for the same input, settings and versions are not run
        again. Raises PipelineRefused, MissingNeed or BadWeights before any compute, OutputInUse when `out`
        holds something else.
        """
        hush()
        self._check_types(pipeline)
        source = self._module(model)
        plans = contract.predict(pipeline.flat(), plan_of(source))
        _check_names(pipeline, source)
        tokenizer = self._tokenizer()
        self._check_needs(pipeline, tokenizer)
        if self.task is not None:
            check_fits(source, self.task)
        nn.check_finite(source)
        out = Path(self.out)
        self._claim(out, resume)
        with locked(out):
            remove_partial(out)
            if self.cache is None:
                (out / "steps").mkdir(exist_ok=True)
                remove_partial(out / "steps")
            return Run(
                out=out,
                source=source,
                passes=pipeline.flat(),
                plans=plans,
                tokenizer=tokenizer,
                task=self.task,
                seed=self.seed,
                device=self.device,
                measuring=self.measuring,
                calibration=self.calibration,
                progress=self.progress,
                cache=None if self.cache is None else Path(self.cache),
            ).go()

    def _check_types(self, pipeline: Any) -> None:
        """Refuse what a typo gives: a task by name, a pass class, a path where none belongs."""
        from transformers import PreTrainedTokenizerBase

        _check_pipeline(pipeline)
        check_task(self.task)
        if self.tokenizer is not None and not isinstance(
            self.tokenizer, PreTrainedTokenizerBase | str | Path
        ):
            raise SettingError(
                f"tokenizer={self.tokenizer!r} is no tokenizer: give one of transformers, or where to load it from"
            )
        if not isinstance(self.out, str | Path) or not str(self.out):
            raise SettingError(f"out={self.out!r} is no folder: give a path")
        _check_texts(self.calibration)
        if not isinstance(self.measuring, Measuring):
            raise SettingError(
                f"measuring={self.measuring!r}: build it, as in stackcomp.Measuring(latency=False)"
            )
        whole("seed", self.seed, 0, 2**32 - 1)  # what numpy takes
        _check_device(self.device)

    def _module(self, model: "PreTrainedModel | str | Path") -> "PreTrainedModel":
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


def _check_pipeline(pipeline: Any) -> None:
    if not isinstance(pipeline, Pipeline | Pass):
        raise SettingError(f"pipeline={pipeline!r} is no pipeline: build it, as in Pipeline(Int8Weights())")


def _check_texts(texts: Any) -> None:
    """Refuse calibration that is no sequence of texts, or of pairs of them."""
    if texts is None:
        return
    if isinstance(texts, str) or not (hasattr(texts, "__getitem__") and hasattr(texts, "__len__")):
        raise SettingError(f"calibration={texts!r} is no list of texts: give one, as in list(...)")
    if not len(texts):
        raise SettingError(f"calibration={texts!r} holds no text: give at least one")
    for place, text in enumerate(texts):
        pair = isinstance(text, list | tuple) and len(text) == 2
        if not all(isinstance(part, str) for part in (text if pair else [text])):
            raise SettingError(f"calibration[{place}]={text!r} is no text: give strings, or pairs of them")


def _check_names(pipeline: Pipeline | Pass, model: "PreTrainedModel") -> None:
    """Refuse a glob on parameters that matches none of the model's, nor a part that some pass makes of one of its layers."""
    names = [
        nn.relative(model, name) for name, _ in chain(model.named_modules(), model.named_parameters()) if name
    ]
    parts = {part for step in pipeline.flat() for form in step.contract.becomes or () for part in form}
    names += [f"{name}.{part}" for name in names for part in parts]
    for step in pipeline.flat():
        all_match(names, **step.parameter_globs)


def _check_device(device: Any) -> None:
    """Refuse a device that torch does not know, or that this machine does not have."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        raise SettingError(
            f"device={device!r} cannot be used ({said}): give 'cpu' or one that is there"
        ) from error


__all__ = ["Measuring", "PassManager", "Result", "check", "plan_of"]
