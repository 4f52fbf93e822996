"""Magnitude pruning, unstructured and N:M."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stackcomp import nn, ops
from stackcomp.core.passes import Findings
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
    stored with log2 C(m, n) bits a group. Training passes that follow train the kept values only; what is
    dropped stays zero.
    """

    paper: ClassVar[str] = "Han et al., arXiv:1506.02626; N:M: Zhou et al., arXiv:2102.04010"

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        if self.sparsity == 0:
            return {}
        for id_ in context.progress(context.targets, label="pruning"):
            nn.sparsify(model, id_, self._mask, groups=self._groups)
        return {}

    def _mask(self, matrix: "torch.Tensor") -> "torch.Tensor":
        """Which entries of a matrix to keep."""
        return (
            ops.largest_in_groups(matrix, *self._groups) if self._groups else ops.largest(matrix, self._share)
        )
