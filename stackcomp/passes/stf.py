"""The Straight-Through Factorizer: the support and both factors of dense-sparse weights learned for the task."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from stackcomp import nn, ops, training
from stackcomp.core.contract import Contract, Need
from stackcomp.core.errors import NothingToCompress, SettingError
from stackcomp.core.facts import Fact, facts
from stackcomp.core.passes import Findings
from stackcomp.core.plan import PlannedWeight
from stackcomp.core.settings import one_of, whole, within
from stackcomp.layerwise import error_metrics
from stackcomp.training.training_pass import LearnedForm

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context
    from stackcomp.training.straight_through import Latent, Start


@dataclass(frozen=True, kw_only=True, repr=False)
class STF(LearnedForm):
    """Learn the support of dense-sparse weights, and their factors, for the task; jointly over all layers.

    Put it after DenseSparse, whose factors it starts from. A dense W is trained behind every S D: the model runs on the
    projection of W, and the gradient goes straight through to W. At the end the model holds plain S and D again, in the
    same bytes as before.

    every: steps between projections, each starting from the one before; between them the model runs on the last
    projection plus what W has moved since. The rate falls to 0 (schedule), so that the last projection takes nothing
    away.
    data_aware: project in the metric of the layers' inputs on `samples` calibration texts, with `damping`; without it,
    in the plain one. sensitivity: and of the gradients at their outputs; give both what DenseSparse was given.
    value_bits: bits that a value will take in the end, where a later pass rounds it: give what DenseSparse was given, so that projections,
    too, are made to be rounded.
    latent: what W starts as. "dense", the weight as it came, as in the paper: supports move from the first projection
    on; give it where the factors were made of that very weight, as what a pass in between has trained is forgotten.
    "product", S D: safe everywhere, but an atom outside a support must outgrow one inside by gradient steps alone, so
    supports stay nearly as they are, and values and basis are what is learned.

    only, skip: the weights whose support is learned; everything but `frozen` is trained. distill: follow the model as it
    came, with this temperature and weight of the hidden states, as Distill does; without it, learn the labels of the
    task. The other settings are those of every training pass (see TrainSettings):
    epochs, steps, learning_rate, batch_size, warmup, schedule, weight_decay, gradient_clip, bf16, dropout, limit, save_every.

    Where we differ from the paper: the start and the projections are data-aware.
    """

    every: int = 16
    latent: Literal["product", "dense"] = "product"
    data_aware: bool = True
    sensitivity: bool = True
    samples: int = 1024
    damping: float = 1e-3
    value_bits: float | None = None

    paper: ClassVar[str] = "Chand et al., DSFormer, arXiv:2312.13211"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("every", self.every, 1)
        one_of("latent", self.latent, ("product", "dense"))
        whole("samples", self.samples, 1)
        within("damping", self.damping, 0.0, 1.0, above=True)
        if self.value_bits is not None:
            within("value_bits", self.value_bits, 1.0, 32.0)

    @property
    def contract(self) -> Contract:
        wanted = facts(Fact.FLOAT, Fact.FACTOR, Fact.SPARSE)
        if self.epochs == 0:
            return Contract(finds=wanted, may_leave=True)
        more = {Need.CALIBRATION} if self.data_aware else set[Need]()
        more |= {Need.TEACHER} if self.latent == "dense" else set[Need]()
        return Contract(finds=wanted, may_leave=True, trains=True, needs=self._needs | more)

    def examine(self, weights: Sequence[PlannedWeight]) -> None:
        for weight in weights if self.latent == "dense" and self.epochs else ():
            now = weight.rows, weight.cols
            if weight.came != now and any(map(self.contract.found_in, weight.forms)):
                raise SettingError(
                    f"latent='dense': {weight.id} came as {weight.came[0]} x {weight.came[1]}, and is {now[0]} x {now[1]} by then: give "
                    "latent='product'"
                )

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        if self.epochs == 0:
            return {}
        handles = {id_: nn.weights(model)[id_] for id_ in context.targets}
        chosen = [id_ for id_, handle in handles.items() if training.projects(handle)]
        if not chosen:
            raise NothingToCompress(
                f"STF: none of the {len(handles)} selected weights is dense-sparse (all were left low rank or dense): "
                "ask DenseSparse for a higher ratio or more sweeps, or use Distill"
            )
        changed: list[float] = []
        starts = self._starts(model, context, {id_: handles[id_] for id_ in chosen})
        with training.straightened(model, starts) as latents:

            def project(step: int) -> None:
                if step and step % self.every == 0:
                    changed.append(_project(latents))

            report = self._train(model, context, self._loss(context), project)
            changed.append(_project(latents, last=True))
        return {
            **report,
            "weights": len(chosen),
            "changed": [round(share, 5) for share in changed],
        }

    def _dense(self, context: "Context", handles: "dict[str, nn.WeightHandle]") -> "dict[str, torch.Tensor]":
        """What each W starts as, where that is not S D."""
        if self.latent == "product":
            return {}
        assert context.teacher is not None
        came = nn.weights(context.teacher())
        found: dict[str, torch.Tensor] = {}
        for id_, handle in handles.items():
            origin = came.get(context.origins.get(id_, id_))
            if origin is None or (origin.spec.rows, origin.spec.cols) != (handle.spec.rows, handle.spec.cols):
                raise SettingError(
                    f"latent='dense': the model as it came has no {handle.spec.rows} x {handle.spec.cols} weight behind {id_}; "
                    "give latent='product'"
                )
            found[id_] = origin.dense().float()
        return found

    def _starts(
        self, model: "PreTrainedModel", context: "Context", handles: "dict[str, nn.WeightHandle]"
    ) -> "dict[str, Start]":
        """Where every weight starts."""
        dense = self._dense(context, handles)
        noise = ops.rounding_noise(self.value_bits)
        return {
            id_: training.Start(**vars(metric), dense=dense.get(id_), noise=noise)
            for id_, metric in error_metrics(self, model, handles, context).items()
        }


def _project(latents: "dict[str, Latent]", *, last: bool = False) -> float:
    """Project every weight; the mean share of the supports that changed."""
    return sum(latent.project(last=last) for latent in latents.values()) / len(latents)
