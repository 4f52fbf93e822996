"""Models from a folder or a hub name, with the head that a task needs, and what a task needs of a model."""

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from inspect import unwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackcomp import checkpoint, nn
from stackcomp.core import headers
from stackcomp.core.errors import CheckpointError, SettingError, StackcompError, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stackcomp.data.tasks import Task


def load_model(source: str | Path, task: "Task | None" = None) -> "PreTrainedModel":
    """The model at `source`: a checkpoint of ours, or what `transformers` finds there, with the head of
    `task`. Raises UnsupportedModel where there is none, or of another shape, CheckpointError for one that lacks weights."""
    if checkpoint.is_ours(source):
        return checkpoint.load(source)
    heads = _heads(task)
    try:
        with _looking_at(source):
            model, report = _auto_class(task).from_pretrained(source, output_loading_info=True, **heads)
    except RuntimeError as error:  # of weights, or of a head, of another shape
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise _misshapen(source, task) from error
    # what a checkpoint without the task's head lacks is drawn at random, as it should be: anything else would be, too
    prefix = "" if _is_bare(model) else f"{model.base_model_prefix}."
    lost = sorted(name for name in report["missing_keys"] if name.startswith(prefix) and "pooler" not in name)
    if lost:
        raise CheckpointError(
            f"{source}: {len(lost)} tensors of the model are not in its files ({', '.join(lost[:3])}, ...): its config says more than "
            "was saved; copy or download it again"
        )
    return model


def outline(source: str | Path, task: "Task | None" = None) -> "PreTrainedModel":
    """The same model for its names, shapes and dtypes: on the meta device from its config and the headers of its files, where it is no
    checkpoint of ours. Raises as `load_model` and `check_fits` do."""
    import torch
    from transformers import AutoConfig

    check_task(task)
    if checkpoint.is_ours(source):
        model = checkpoint.load(source)
    else:
        with _looking_at(source):
            config = AutoConfig.from_pretrained(source, **_heads(task))
        with torch.device("meta"):
            model = _auto_class(task).from_config(config, dtype=getattr(torch, headers.coding_of(source)))
        stored = headers.shapes_of(source)
        if any(stored.get(name, tensor.shape) != tensor.shape for name, tensor in model.state_dict().items()):
            raise _misshapen(source, task)
    if task is not None:
        check_fits(model, task)
    return model


def hush() -> None:
    """Keep what torchao says of missing GPU libraries when transformers imports it out of our messages."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _looking_at(source: str | Path) -> Generator[None]:
    """Say as UnsupportedModel that `transformers` finds no model at `source`."""
    try:
        yield
    except StackcompError:
        raise
    except (OSError, ValueError) as error:
        raise UnsupportedModel(
            f"{source}: transformers finds no model there ({_first_line(error)}): give a folder or a hub name"
        ) from error


def check_task(task: Any) -> None:
    """Refuse what is no task, such as the name of one."""
    from stackcomp.data.task import Task

    if task is not None and not isinstance(task, Task):
        raise SettingError(f"task={task!r} is no task: build it, as in stackcomp.tasks.glue('sst2')")


def check_fits(model: "PreTrainedModel", task: "Task") -> None:
    """Refuse a model that cannot be scored on the task: without its head, with too few classes, with too few positions, or where its head
    reads the last token of a text and cannot tell it from padding."""
    kind = type(model).__name__
    if task.kind != "similarity" and _is_bare(model):
        raise UnsupportedModel(
            f"{kind} has no head for task {task.name!r}: load the model as {task.auto_class}"
        )
    outputs, wanted = model.config.num_labels or 0, task.num_labels
    few = outputs < wanted if task.kind == "classification" else outputs != wanted
    if task.kind in ("classification", "regression") and few:
        raise UnsupportedModel(
            f"{kind} has {outputs} outputs, and task {task.name!r} wants {wanted}: fine-tune one with num_labels={wanted} first"
        )
    if task.kind == "classification":
        _check_order(model.config.id2label or {}, task)
    if task.kind in ("classification", "regression") and nn.padding_id(model) is None and _reads_last(model):
        raise UnsupportedModel(
            f"{kind} finds the last token of a text by the padding, and its config has pad_token_id={model.config.pad_token_id}: set "
            "model.config.pad_token_id (pad_token_id in config.json) to a token of its vocabulary that ends no text"
        )
    for name, places in nn.position_tables(model).items():
        if task.max_length > places:
            raise SettingError(
                f"task {task.name!r}: max_length={task.max_length} is more than the {places} positions of {name}: "
                f"give max_length={places} or less"
            )


def _check_order(classes: Mapping[Any, str], task: "Task") -> None:
    """Refuse a model whose config has the task's classes in another order."""
    said = [str(classes[number]).casefold() for number in sorted(classes)]
    wanted = [name.casefold() for name in task.label_names]
    if said != wanted and sorted(said) == sorted(wanted):
        order = tuple(classes[number] for number in sorted(classes))
        raise SettingError(
            f"task {task.name!r}: its classes are {task.label_names}, and the model's are {order} (id2label of its config): give "
            "labels= in the model's order"
        )


def _auto_class(task: "Task | None") -> Any:
    """The class of `transformers` that gives a model the head of a task."""
    import transformers

    return getattr(transformers, task.auto_class if task else "AutoModel")


def _heads(task: "Task | None") -> dict[str, int]:
    """What the config of such a model must say."""
    return {"num_labels": task.num_labels} if task and task.num_labels else {}


def _misshapen(source: str | Path, task: "Task | None") -> UnsupportedModel:
    heads = _heads(task) or "its config"
    return UnsupportedModel(
        f"{source}: its weights are of other shapes than {_auto_class(task).__name__} has with {heads}: give the model that belongs to the "
        "task, or one without a head"
    )


def _is_bare(model: "PreTrainedModel") -> bool:
    """Whether a model has no head, as those that `AutoModel` gives."""
    return model.base_model is model and type(model).__name__.endswith("Model")


def _reads_last(model: "PreTrainedModel") -> bool:
    """Whether the head of a classifier looks for the padding of a text, as those of decoders do to find its last token."""
    return "pad_token_id" in unwrap(type(model).forward).__code__.co_names


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
