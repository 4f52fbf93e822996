"""Dense-sparse factorization, after training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stackcomp import ops
from stackcomp.core.contract import Contract, Need
from stackcomp.core.errors import SettingError
from stackcomp.core.facts import Fact, facts
from stackcomp.core.plan import PlannedWeight
from stackcomp.core.settings import one_of, whole
from stackcomp.layerwise import FactorizingPass, Layer

if TYPE_CHECKING:
    import torch

    from stackcomp.core.context import Context
    from stackcomp.ops.allocate import Candidate
    from stackcomp.ops.factorize import DenseSparseFactors

FACTOR = facts(Fact.FLOAT, Fact.TRAINABLE, Fact.FACTOR)
LOWEST_RATIO, HIGHEST_RATIO, STEPS = 1.05, 12.0, 40  # of one layer, whatever the ratio of all
PROBED_RATIOS = (1.3, 1.8, 2.5, 3.5, 5.0)
PROBED_SHARES = (0.17, 0.25, 0.35, 0.5, 0.75)
MARGIN = 1.2  # how far beyond the probed ratios a gain is believed
DENSE, SPARSE = FACTOR | {Fact.DENSE}, FACTOR | {Fact.SPARSE}


@dataclass(frozen=True, kw_only=True, repr=False)
class DenseSparse(FactorizingPass):
    """Replace each selected weight by a small dense basis times a sparse matrix of coefficients: W ~ S D.

    Every row of W becomes a mix of a few of b shared directions. Atoms b and non-zeros s are chosen per layer under one ratio, with low
    rank (every coefficient kept, no index to store) among the choices, so that dense-sparse never loses to it.

    ratio, data_aware, sensitivity, samples, damping: as in every factorization. blocks: blocks of input columns, each with a basis of
    its own; it must divide every selected weight. orientation: which side the sparse rows run along: "rows" those of W, "columns" those
    of its transpose, "auto" the longer one. sweeps: rounds of alternating least squares and support updates.

    Where we differ from the paper: post-training and data-aware (its learned variant is another pass), supports are priced and stored
    at their entropy, and the budget is shared out over layers.
    """

    blocks: int = 1
    orientation: Literal["auto", "rows", "columns"] = "auto"
    sweeps: int = 4

    paper: ClassVar[str] = "Chand et al., DSFormer, arXiv:2312.13211"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("blocks", self.blocks, 1)
        whole("sweeps", self.sweeps, 0)
        one_of("orientation", self.orientation, ("auto", "rows", "columns"))

    @property
    def contract(self) -> Contract:
        return Contract(
            requires=facts(Fact.FLOAT, Fact.DENSE),
            forbids=facts(Fact.FACTOR),
            becomes=({"basis": DENSE, "coefficients": SPARSE}, {"basis": DENSE, "coefficients": DENSE}),
            may_leave=True,
            needs=frozenset({Need.CALIBRATION}) if self.data_aware and self.ratio > 1 else frozenset(),
        )

    def examine(self, weights: Sequence[PlannedWeight]) -> None:
        for weight in weights:
            columns = weight.rows if self._turns(weight.rows, weight.cols) else weight.cols
            if columns % self.blocks:
                raise SettingError(
                    f"DenseSparse: blocks={self.blocks} does not divide the {columns} columns of {weight.id}: give a divisor, or skip it"
                )
        super().examine(weights)

    def _smallest(self, rows: int, cols: int) -> float:
        n, m = (cols, rows) if self._turns(rows, cols) else (rows, cols)
        return min(rows + cols, m + n * self.blocks)

    def _turns(self, rows: int, cols: int) -> bool:
        """Whether the transpose is factorized: the sparse rows run along the longer side."""
        return rows < cols if self.orientation == "auto" else self.orientation == "columns"

    def _price(self, layers: Mapping[str, Layer], context: "Context") -> "dict[str, list[Candidate]]":
        gains: dict[tuple[int, int], list[_Gain]] = {}
        priced: dict[str, list[Candidate]] = {}
        for id_, layer in context.progress(layers.items(), label="pricing", total=len(layers)):
            shape = (layer.weight.shape[0], layer.weight.shape[1])
            if shape not in gains:
                gains[shape] = self._measure(layer, context.seed)
            priced[id_] = self._priced(layer, gains[shape])
        return priced

    def _measure(self, layer: Layer, seed: int) -> "list[_Gain]":
        """By how much dense-sparse beats low rank on one layer of a shape, at a few ratios: the least over a few shares of atoms.

        The factor is nearly the same for all layers of a shape, which makes pricing all of them cheap.
        """
        errors = ops.rank_errors(layer.weight, inputs=layer.inputs, outputs=layer.outputs)
        found: list[_Gain] = []
        for ratio in PROBED_RATIOS:
            best: _Gain | None = None
            for atoms, nonzeros in self._shapes(layer, ratio, PROBED_SHARES):
                factors = self._factorize(layer, atoms, nonzeros, sweeps=1, seed=seed)
                error = ops.metric_error(
                    layer.weight - factors.product(), inputs=layer.inputs, outputs=layer.outputs
                )
                gain = error / max(_at(errors, layer, layer.size_bytes / ratio), 1e-30)
                if best is None or gain < best.factor:
                    best = _Gain(ratio=ratio, share=atoms * self.blocks / self._columns(layer), factor=gain)
            if best is not None and best.factor < 1:
                found.append(best)
        return found

    def _priced(self, layer: Layer, gains: "list[_Gain]") -> "list[Candidate]":
        """Low rank at every ratio, and dense-sparse where it was measured to be better."""
        rows, cols = layer.weight.shape
        errors = ops.rank_errors(layer.weight, inputs=layer.inputs, outputs=layer.outputs)
        candidates: list[Candidate] = []
        for step in range(STEPS):
            ratio = LOWEST_RATIO * (HIGHEST_RATIO / LOWEST_RATIO) ** (step / (STEPS - 1))
            size = layer.size_bytes / ratio
            rank = int(size / layer.value_bytes / (rows + cols))
            if rank:
                candidates.append(
                    ops.Candidate(
                        size_bytes=layer.value_bytes * rank * (rows + cols),
                        error=float(errors[rank]),
                        choice={"rank": rank},
                    )
                )
            gain = _interpolated(gains, ratio)
            if gain is not None:
                for atoms, nonzeros in self._shapes(layer, ratio, (gain.share,)):
                    candidates.append(
                        ops.Candidate(
                            size_bytes=self._bytes(layer, atoms, nonzeros),
                            error=gain.factor * _at(errors, layer, size),
                            choice={"atoms": atoms, "nonzeros": nonzeros},
                        )
                    )
        return candidates

    def _build(self, layer: Layer, choice: Any, seed: int) -> "DenseSparseFactors":
        if "rank" in choice:
            rank = choice["rank"]
            return ops.dense_sparse(
                layer.weight, atoms=rank, nonzeros=rank, inputs=layer.inputs, outputs=layer.outputs
            )
        return self._factorize(layer, choice["atoms"], choice["nonzeros"], sweeps=self.sweeps, seed=seed)

    def _factorize(
        self, layer: Layer, atoms: int, nonzeros: int, *, sweeps: int, seed: int
    ) -> "DenseSparseFactors":
        return ops.dense_sparse(
            layer.weight,
            atoms=atoms,
            nonzeros=nonzeros,
            blocks=self.blocks,
            transposed=self._turns(*layer.weight.shape),
            inputs=layer.inputs,
            outputs=layer.outputs,
            sweeps=sweeps,
            seed=seed,
        )

    def _columns(self, layer: Layer) -> int:
        """Columns of the factorized matrix."""
        rows, cols = layer.weight.shape
        return rows if self._turns(rows, cols) else cols

    def _shapes(self, layer: Layer, ratio: float, shares: Sequence[float]) -> list[tuple[int, int]]:
        """Pairs (atoms, nonzeros) of about this ratio, really sparse ones only."""
        columns = self._columns(layer)
        found = ops.shapes_of_size(
            layer.weight.numel() // columns,
            columns,
            size_bytes=layer.size_bytes / ratio,
            shares=shares,
            blocks=self.blocks,
            value_bytes=layer.value_bytes,
        )
        return [(atoms, nonzeros) for atoms, nonzeros in found if 1 < nonzeros < atoms]

    def _bytes(self, layer: Layer, atoms: int, nonzeros: int) -> int:
        columns = self._columns(layer)
        return ops.dense_sparse_bytes(
            layer.weight.numel() // columns,
            columns,
            atoms=atoms,
            nonzeros=nonzeros,
            blocks=self.blocks,
            value_bytes=layer.value_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class _Gain:
    """At `ratio`, atoms worth `share` of the columns give `factor` times the error of low rank of the same bytes."""

    ratio: float
    share: float
    factor: float


def _interpolated(gains: "list[_Gain]", ratio: float) -> "_Gain | None":
    """The gain at `ratio`, between the measured ones around it in log ratio; None far outside of them."""
    if not gains or not gains[0].ratio / MARGIN <= ratio <= gains[-1].ratio * MARGIN:
        return None
    below = max(
        (gain for gain in gains if gain.ratio <= ratio), key=lambda gain: gain.ratio, default=gains[0]
    )
    above = min(
        (gain for gain in gains if gain.ratio >= ratio), key=lambda gain: gain.ratio, default=gains[-1]
    )
    if below.ratio == above.ratio:
        return replace(below, ratio=ratio)
    weight = log(ratio / below.ratio) / log(above.ratio / below.ratio)
    mix = [
        (1 - weight) * low + weight * high
        for low, high in ((below.share, above.share), (below.factor, above.factor))
    ]
    return _Gain(ratio=ratio, share=mix[0], factor=mix[1])


def _at(errors: "torch.Tensor", layer: Layer, size_bytes: float) -> float:
    """The error of low rank of so many bytes, between two ranks."""
    rank = min(size_bytes / layer.value_bytes / sum(layer.weight.shape), len(errors) - 1.001)
    low = int(rank)
    return float(errors[low] + (errors[low + 1] - errors[low]) * (rank - low))
