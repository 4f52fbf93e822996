"""What all passes that take gradient steps share: their settings and the way from a context into the loop.

Imported by pass files at their top, so torch is imported only where a pass is applied.
"""

import itertools
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from stackcomp import nn
from stackcomp.core.contract import Need
from stackcomp.core.facts import INTEGERS
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.selection import Globs, all_match, chooses
from stackcomp.core.settings import within
from stackcomp.training.settings import TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context
    from stackcomp.training.losses import Loss


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainingPass(TrainSettings, Pass):
    """A pass that trains every floating-point parameter that `only` and `skip` leave it, embeddings and norms
    included.

    What earlier passes fixed stays fixed: a pruned entry stays zero, a support stays itself, an integer stays
    on its grid, and of a weight rounded to integers only the scales are trained, of a clustered one the shared values.
    With epochs=0 it does nothing.
    """

    idle: ClassVar[Mapping[str, Any]] = {"epochs": 0}
    __repr__ = Pass.__repr__

    def __post_init__(self) -> None:
        Pass.__post_init__(self)
        if self.epochs != 0:
            TrainSettings.__post_init__(self)

    @abstractmethod
    def _loss(self, context: "Context") -> "Loss":
        """What to minimise."""

    def _learns(self, name: str) -> bool:
        """Whether the parameter of this name, relative to the base model, is trained."""
        return chooses(name, only=self.only, skip=self.skip)

    @property
    def parameter_globs(self) -> dict[str, Globs]:
        return {"only": self.only, "skip": self.skip}

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        return {} if self.epochs == 0 else self._train(model, context, self._loss(context))

    def _train(
        self,
        model: "PreTrainedModel",
        context: "Context",
        loss: "Loss",
        on_step: Callable[[int], None] | None = None,
    ) -> Findings:
        """The steps themselves."""
        from stackcomp import training

        assert context.task is not None
        assert context.tokenizer is not None
        named = itertools.chain(model.named_modules(), model.named_parameters())
        all_match((nn.relative(model, name) for name, _ in named), **self.parameter_globs)
        report = training.train(
            model,
            task=context.task,
            tokenizer=context.tokenizer,
            loss=loss,
            settings=self,
            seed=context.seed,
            scratch=context.scratch,
            trainable=lambda name: self._learns(nn.relative(model, name)),
            device=context.device,
            progress=context.progress,
            on_step=on_step,
        )
        rounded = [
            id_
            for id_, handle in nn.weights(model).items()
            if any(INTEGERS & words for words in handle.spec.parts().values())
        ]
        note = (
            {
                "rounded_weights": f"{len(rounded)} weights are codes: of these only the scales or shared values were trained"
            }
            if rounded
            else {}
        )
        return {**asdict(report), **note}


@dataclass(frozen=True, kw_only=True, repr=False)
class LearnedForm(TrainingPass):
    """A training pass that also learns the form of the weights it selects: `only` and `skip` say which these are, and everything but
    `frozen` is trained.

    frozen: globs of what is not trained; distill: follow the model as it came, with this temperature and weight of the hidden states,
    as Distill does; without it, learn the labels of the task. The other settings are those of every training pass.
    """

    frozen: Globs = None
    distill: bool = True
    temperature: float = 2.0
    hidden: float = 1.0
    dropout: bool = False

    globs: ClassVar[tuple[str, ...]] = ("only", "skip", "frozen")

    def __post_init__(self) -> None:
        super().__post_init__()
        within("temperature", self.temperature, 0.0, above=True)
        within("hidden", self.hidden, 0.0)

    @property
    def _needs(self) -> frozenset[Need]:
        return frozenset({Need.TEACHER, Need.TEXT} if self.distill else {Need.LABELS})

    def _learns(self, name: str) -> bool:
        return chooses(name, only=None, skip=self.frozen)

    @property
    def parameter_globs(self) -> dict[str, Globs]:
        return {"frozen": self.frozen}

    def _loss(self, context: "Context") -> "Loss":
        from stackcomp import training

        assert context.task is not None
        if not self.distill:
            return training.TaskLoss(task=context.task)
        assert context.teacher is not None
        return training.DistillationLoss(
            teacher=context.teacher(),
            task=context.task,
            temperature=self.temperature,
            hidden=self.hidden,
        )
