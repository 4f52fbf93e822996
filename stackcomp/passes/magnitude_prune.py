"""Magnitude pruning: unstructured, N:M and by blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stackcomp import nn, ops
from stackcomp.core.errors import SettingError
from stackcomp.core.passes import Findings
from stackcomp.core.plan import PlannedWeight
from stackcomp.core.settings import shape, shape_fits
from stackcomp.pruning import PruningPass

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context


@dataclass(frozen=True, kw_only=True, repr=False)
class MagnitudePrune(PruningPass):
    """Keep the largest values of each selected weight and store only these, beside a packed support.

    sparsity: share of each matrix that is dropped, in [0, 1), 0 does nothing: stored as the kept values and a
    bitmap (1 bit an entry); or "n:m", which keeps the n largest of every m consecutive inputs of a row,
    stored with log2 C(m, n) bits a group. block: (rows, columns) of what is kept or dropped together, by its mean magnitude, with a
    share: its bitmap has a bit a block. It must divide the shape of every selected weight. Training passes that follow train the
    kept values only; what is dropped stays zero.
    """

    block: tuple[int, int] = (1, 1)

    paper: ClassVar[str] = "Han et al., arXiv:1506.02626; N:M: Zhou et al., arXiv:2102.04010"

    def __post_init__(self) -> None:
        super().__post_init__()
        sides = shape("block", self.block)
        object.__setattr__(self, "block", sides)  # a list would make the pass unhashable
        if self._groups and self.block != (1, 1):
            raise SettingError(
                f"block={self.block} does not go with sparsity={self.sparsity!r}: give a share, or leave it out"
            )

    @property
    def _block(self) -> tuple[int, int]:
        return self.block

    def examine(self, weights: Sequence[PlannedWeight]) -> None:
        super().examine(weights)
        shape_fits("block", self.block, weights)

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        if self.sparsity == 0:
            return {}
        for id_ in context.progress(context.targets, label="pruning"):
            nn.sparsify(model, id_, self._mask, groups=self._groups, block=self.block)
        return {}

    def _mask(self, matrix: "torch.Tensor") -> "torch.Tensor":
        """Which entries of a matrix to keep."""
        if self._groups:
            return ops.largest_in_groups(matrix, *self._groups)
        return ops.largest(matrix, self._share, self.block)
