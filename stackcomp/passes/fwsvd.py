"""Low rank weighted by Fisher information, after fine-tuning."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from stackcomp import data, nn, ops, training
from stackcomp.core.contract import Contract, Need
from stackcomp.core.errors import UnreachableRatio
from stackcomp.core.facts import Fact, facts
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.plan import PlannedWeight
from stackcomp.core.settings import whole, within

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context

FACTOR = facts(Fact.FLOAT, Fact.TRAINABLE, Fact.FACTOR, Fact.DENSE)
FLOOR = 1e-6  # of the mean importance: what a row that no example moved counts, so that it can be divided by


@dataclass(frozen=True, kw_only=True, repr=False)
class FWSVD(Pass):
    """Replace each selected weight W (n x m) by A B of rank r, with rows weighted by how much the task's loss
    depends on them.

    A B minimises || diag(sqrt(I)) (W - A B) ||, I_i = sum_j E[(dL/dW_ij)^2] over labelled training examples:
    the truncated SVD of diag(sqrt(I)) W. Every layer has the same ratio, r = nm / (ratio (n + m)) rounded
    down; nothing is shared out over layers. A layer for which that is no whole rank is left dense. Meant for a
    model that is fine-tuned already, and to be fine-tuned again.

    ratio: dense bytes / stored bytes of each layer, at least 1, where 1 does nothing; samples: labelled
    training examples, a fixed random subset; batch_size: examples whose gradients are averaged before they are
    squared: 1 is the paper's formula, more is faster and blurs it.
    """

    ratio: float = 2.0
    samples: int = 2048
    batch_size: int = 1

    paper: ClassVar[str] = "Hsu et al., FWSVD, arXiv:2207.00112"
    idle: ClassVar[dict[str, Any]] = {"ratio": 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        within("ratio", self.ratio, 1.0, 10_000.0)
        whole("samples", self.samples, 1)
        whole("batch_size", self.batch_size, 1)

    @property
    def contract(self) -> Contract:
        return Contract(
            requires=facts(Fact.FLOAT, Fact.DENSE),
            forbids=facts(Fact.FACTOR),
            becomes=({"basis": FACTOR, "coefficients": FACTOR},),
            may_leave=True,
            needs=frozenset({Need.LABELS}) if self.ratio > 1 else frozenset(),
        )

    def examine(self, weights: Sequence[PlannedWeight]) -> None:
        largest = max(weight.rows * weight.cols / (weight.rows + weight.cols) for weight in weights)
        if self.ratio > 1 and self.ratio > largest:
            raise UnreachableRatio(
                f"FWSVD: ratio={self.ratio:g} leaves no rank to any of these {len(weights)} weights: the largest is {largest:.2f}"
            )

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        if self.ratio == 1.0:
            return {}
        handles = {id_: nn.weights(model)[id_] for id_ in context.targets}
        ranks = {id_: self._rank(handle.spec.rows, handle.spec.cols) for id_, handle in handles.items()}
        chosen = {id_: handle for id_, handle in handles.items() if ranks[id_]}
        importance = self._importance(model, chosen, context)
        for id_, handle in context.progress(chosen.items(), label="factorizing", total=len(chosen)):
            rows = importance[id_]
            left, right = ops.low_rank(
                handle.dense().float(),
                rank=ranks[id_],
                outputs=ops.whitener((rows / rows.mean().clamp_min(1e-30)).diag(), damping=FLOOR),
            )
            nn.factorize(model, id_, basis=right, values=left)
        return {
            "layers": {
                id_: f"rank {rank}" if rank else "left dense: too small to gain"
                for id_, rank in ranks.items()
            }
        }

    def _rank(self, rows: int, cols: int) -> int:
        """The rank that keeps the ratio; 0 where there is none."""
        return int(rows * cols / (self.ratio * (rows + cols)))

    def _importance(
        self, model: "PreTrainedModel", handles: "dict[str, nn.WeightHandle]", context: "Context"
    ) -> "dict[str, torch.Tensor]":
        """I of every weight."""
        assert context.task is not None
        batches = data.labelled_batches(context, self.samples, batch_size=self.batch_size, label="Fisher")
        return data.row_importance(model, handles, batches, training.TaskLoss(task=context.task))
