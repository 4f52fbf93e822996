"""Post-training pruning: how a sparsity is spelt, how what it leaves is stored, and how inputs are looked at.

What a pass adds is which entries stay.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from stackcomp import data, nn
from stackcomp.core.contract import Contract, Need
from stackcomp.core.facts import Fact, facts
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.plan import PlannedWeight
from stackcomp.core.settings import groups_fit, have_inputs, sparsity_groups, whole

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context


@dataclass(frozen=True, kw_only=True, repr=False)
class PruningPass(Pass):
    """A pass that stores only some values of each selected weight, beside a packed support.

    sparsity: share of each matrix that is dropped, in [0, 1), 0 does nothing: stored as the kept values and a
    bitmap (1 bit an entry); or "n:m", which keeps n of every m consecutive inputs of a row, stored with
    log2 C(m, n) bits a group.
    """

    sparsity: float | str = 0.5

    idle: ClassVar[Mapping[str, Any]] = {"sparsity": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._groups

    @property
    def _groups(self) -> tuple[int, int] | None:
        """(n, m) of an "n:m" sparsity."""
        return sparsity_groups(self.sparsity)

    @property
    def _share(self) -> float:
        """The share that is kept, of a sparsity that is a share."""
        return 1 - float(self.sparsity)

    @property
    def contract(self) -> Contract:
        if self.sparsity == 0:
            return Contract(requires=facts(Fact.FLOAT, Fact.DENSE))
        return Contract(
            requires=facts(Fact.FLOAT, Fact.DENSE),
            forbids=facts(Fact.FACTOR) if self._groups else facts(),
            adds=facts(Fact.SPARSE),
            removes=facts(Fact.DENSE),
        )

    def examine(self, weights: Sequence[PlannedWeight]) -> None:
        groups_fit(self.sparsity, weights)


@dataclass(frozen=True, kw_only=True, repr=False)
class CalibratedPruningPass(PruningPass):
    """A pruning pass that looks at what flows into each weight, on unlabelled text.

    Of a low-rank layer both factors are pruned, the second by what the first, pruned, lets through. All layers are calibrated at
    once, on the model as the pass finds it, where the papers calibrate each on the layers compressed before it. samples:
    calibration texts.
    """

    samples: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("samples", self.samples, 1)

    @property
    def contract(self) -> Contract:
        return replace(super().contract, needs=frozenset({Need.CALIBRATION} if self.sparsity else ()))

    def examine(self, weights: Sequence[PlannedWeight]) -> None:
        super().examine(weights)
        have_inputs(weights, "MagnitudePrune")

    @abstractmethod
    def _choose(self, weight: "torch.Tensor", moment: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """New values of a weight (n x m), and which of them to keep, given the second moment of its inputs (m x m)."""

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        if self.sparsity == 0:
            return {}
        moments = data.input_moments(model, context, self.samples)
        for id_ in context.progress(context.targets, label="pruning"):
            nn.prune(model, id_, self._choose, moment=moments[id_], groups=self._groups)
        return {}
