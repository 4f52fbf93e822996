"""Low-rank factorization by truncated singular values."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from stackcomp import ops
from stackcomp.core.spec import WeightSpec
from stackcomp.layerwise import FactorizingPass, Layer

if TYPE_CHECKING:
    from stackcomp.ops.allocate import Candidate
    from stackcomp.ops.factorize import DenseSparseFactors

RANKS = 48  # ranks a layer is priced at


@dataclass(frozen=True, kw_only=True, repr=False)
class LowRank(FactorizingPass):
    """Replace each selected weight W (n x m) by a product of an n x r and an r x m matrix, r chosen per layer
    under one ratio.

    The settings are those of every factorization: ratio, data_aware, sensitivity, samples, damping, spread,
    value_bits.
    With data_aware the factors are the best of their rank for the layer's outputs, as in DRONE and SVD-LLM.
    Where we differ: ranks are shared out over layers by the predicted error of the model's output, and a
    layer's bias takes up the mean of its error.

    The plain SVD that papers compare with is `LowRank(data_aware=False, spread=1.0)`: the best factors for the
    weight itself, every layer at the same ratio, r = nm / (ratio (n + m)) rounded down.
    """

    paper: ClassVar[str] = "SVD-LLM, arXiv:2403.07378"

    def _smallest(self, rows: int, cols: int) -> float:
        return (rows + cols) * min(self._ranks(rows, cols), default=1)

    def _forms(self, spec: WeightSpec) -> Iterator[WeightSpec]:
        for rank in self._ranks(spec.rows, spec.cols):
            yield spec.as_product(atoms=rank)

    def _priced(self, layer: Layer) -> "list[Candidate]":
        """The layer at every rank that is tried."""
        rows, cols = layer.weight.shape
        errors = ops.rank_errors(layer.weight, inputs=layer.inputs, outputs=layer.outputs)
        return [
            ops.Candidate(
                size_bytes=ops.low_rank_bytes(rows, cols, rank, value_bytes=layer.value_bytes),
                error=float(errors[rank]),
                choice={"rank": rank},
            )
            for rank in self._ranks(rows, cols)
        ]

    def _ranks(self, rows: int, cols: int) -> list[int]:
        """Ranks up to where a weight is no smaller than dense: all of them where every layer is to keep the ratio, else some."""
        highest = rows * cols // (rows + cols)
        steps = highest if self.spread == 1.0 else RANKS
        return sorted(
            {max(1, round(highest * step / steps)) for step in range(1, steps + 1)} if highest else ()
        )

    def _build(self, layer: Layer, choice: Any, seed: int) -> "tuple[DenseSparseFactors, Any]":
        rank = choice["rank"]
        factors = ops.dense_sparse(
            layer.weight, atoms=rank, nonzeros=rank, inputs=layer.inputs, outputs=layer.outputs
        )
        return factors, choice
