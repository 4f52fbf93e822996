"""Magnitude pruning, unstructured and N:M."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from stackcomp import nn, ops
from stackcomp.core.contract import Contract
from stackcomp.core.errors import SettingError
from stackcomp.core.facts import Fact, facts
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.plan import PlannedWeight
from stackcomp.core.settings import within

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context


@dataclass(frozen=True, kw_only=True, repr=False)
class MagnitudePrune(Pass):
    """Keep the largest values of each selected weight and store only these, beside a packed support.

    sparsity: share of each matrix that is dropped, in [0, 1), 0 does nothing: stored as the kept values and a
    bitmap (1 bit an entry); or "n:m", which keeps the n largest of every m consecutive inputs of a row,
    stored with log2 C(m, n) bits a group. Training passes that follow train the kept values only; what is
    dropped stays zero.
    """

    sparsity: float | str = 0.5

    paper: ClassVar[str] = "Han et al., arXiv:1506.02626; N:M: Zhou et al., arXiv:2102.04010"
    idle: ClassVar[Mapping[str, Any]] = {"sparsity": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sparsity, str):
            within("sparsity", self.sparsity, 0.0, 0.999)
        elif self._groups is None:
            raise SettingError(
                f"sparsity={self.sparsity!r} is not known: give 'n:m' with 1 <= n < m <= 64, as '2:4', or a share"
            )

    @property
    def _groups(self) -> tuple[int, int] | None:
        """(n, m) of an "n:m" sparsity."""
        found = re.fullmatch(r"(\d+):(\d+)", str(self.sparsity))
        kept, group = map(int, found.groups()) if found else (0, 0)
        return (kept, group) if 1 <= kept < group <= 64 else None

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

    def examine(self, weights: "Sequence[PlannedWeight]") -> None:
        for weight in weights:
            if self._groups and weight.cols % self._groups[1]:
                raise SettingError(
                    f"sparsity={self.sparsity!r}: {self._groups[1]} does not divide the {weight.cols} inputs of {weight.id}; "
                    f"give another pattern or skip={weight.id!r}"
                )

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        if self.sparsity == 0:
            return {}
        for id_ in context.progress(context.targets, label="pruning"):
            nn.sparsify(model, id_, self._mask, groups=self._groups)
        return {}

    def _mask(self, matrix: "torch.Tensor") -> "torch.Tensor":
        """Which entries of a matrix to keep."""
        return (
            ops.largest_in_groups(matrix, *self._groups)
            if self._groups
            else ops.largest(matrix, 1 - float(self.sparsity))
        )
