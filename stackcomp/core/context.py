"""`Context`: what the manager hands to a pass beside the model. Read only."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stackcomp.data.tasks import Task

Item = TypeVar("Item")


class Progress(Protocol):
    """Draws a bar over an iterable; `quiet` draws none."""

    def __call__(self, items: Iterable[Item], /, label: str, total: int | None = None) -> Iterable[Item]: ...


def quiet(items: Iterable[Item], /, label: str, total: int | None = None) -> Iterable[Item]:
    """The progress that draws nothing."""
    return items


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a pass may read while it runs.

    targets: ids of the weights it may change, in model order; origins: by these ids, those that the weights had in the model as it
    came, where they are others; seed: of every random choice; scratch: a
    private folder that lives until the pass has finished, where a training pass keeps what it resumes from;
    tokenizer: what the model reads from; a pass that changes the vocabulary changes it in place, as it does the model; teacher: loads the
    model as it came, when first called, with the vocabulary of `tokenizer`; calibration: unlabelled sentences, so many or all there are.
    """

    targets: tuple[str, ...]
    seed: int
    scratch: Path
    device: str = "cpu"
    task: "Task | None" = None
    tokenizer: "PreTrainedTokenizerBase | None" = None
    teacher: "Callable[[], PreTrainedModel] | None" = None
    calibration: "Callable[[int], Sequence[Any]] | None" = None
    origins: Mapping[str, str] = field(default_factory=dict[str, str])
    progress: Progress = quiet
