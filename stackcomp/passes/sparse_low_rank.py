"""Sparse plus low rank, after training."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from stackcomp import data, nn, ops
from stackcomp.core.contract import Contract, Need
from stackcomp.core.errors import UnreachableRatio
from stackcomp.core.facts import Fact, facts
from stackcomp.core.ledger import LEFT_DENSE
from stackcomp.core.matrices import Free
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.plan import PlannedWeight
from stackcomp.core.settings import have_inputs, whole, within
from stackcomp.core.spec import WeightSpec
from stackcomp.layerwise import FACTOR

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context

SPARSE = facts(Fact.FLOAT, Fact.TRAINABLE, Fact.SPARSE)
WIDEST = 32.0  # bits of a value beside which the bitmap weighs least


@dataclass(frozen=True, kw_only=True, repr=False)
class SparseLowRank(Pass):
    """Replace each selected weight W (n x m) by the sum of a sparse matrix and a product of rank r: W ~ S + L R.

    S + L R makes || (W - S - L R) diag(s) || small, s_j = sqrt(E x_j^2) the size of input j over calibration text, by alternating
    thresholding: L R becomes the best rank r of what S leaves, and S keeps the largest entries of what L R leaves. No labels, no
    training. All three are stored, S beside a bitmap (1 bit an entry), and a layer computes x S^T + (x R^T) L^T.

    ratio: dense bytes / stored bytes of each layer, the bitmap counted, at least 1, where 1 does nothing; rank_ratio: share of the kept
    values that are in L and R, 0 to 1: r is rounded down, at least 1, and S keeps what is left, at least one entry. A layer of which
    the ratio leaves less is left dense. iterations: how often each of the two follows the other, at least 1; samples: calibration texts.

    Later passes reach the three matrices as they do others: values can be rounded, and trained with the support left alone.

    Where we differ from the paper: S keeps the largest entries of the whole matrix, not as many in each row; the best rank r is followed
    by a step of the power method an iteration, in place of a new decomposition; and all layers are calibrated at once, on the model as
    this pass finds it.
    """

    ratio: float = 2.0
    rank_ratio: float = 0.25
    iterations: int = 40
    samples: int = 1024

    paper: ClassVar[str] = "Zhang and Papyan, OATS, arXiv:2409.13652"
    idle: ClassVar[Mapping[str, Any]] = {"ratio": 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        within("ratio", self.ratio, 1.0, 10_000.0)
        within("rank_ratio", self.rank_ratio, 0.0, 1.0)
        whole("iterations", self.iterations, 1)
        whole("samples", self.samples, 1)

    @property
    def contract(self) -> Contract:
        return Contract(
            requires=facts(Fact.FLOAT, Fact.DENSE),
            forbids=facts(Fact.FACTOR),
            becomes=({"weight": SPARSE, "basis": FACTOR, "coefficients": FACTOR},) if self.ratio > 1 else (),
            may_leave=True,
            needs=frozenset({Need.CALIBRATION}) if self.ratio > 1 else frozenset(),
        )

    def examine(self, weights: Sequence[PlannedWeight]) -> None:
        have_inputs(weights, "FactorizeEmbeddings or MagnitudePrune")
        self._examine_ratio((weight.rows, weight.cols, WIDEST) for weight in weights)

    def stores(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        rank, nonzeros = self._counts(spec.rows, spec.cols, spec.matrices["weight"].bits)
        if self.ratio == 1.0 or not rank:
            return (spec,)
        sparse = spec.pruned({"weight": nonzeros})
        return (replace(sparse, matrices={**sparse.matrices, **spec.as_product(atoms=rank).matrices}),)

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        if self.ratio == 1.0:
            return {}
        handles = {id_: handle for id_, handle in nn.weights(model).items() if id_ in context.targets}
        shapes = {
            id_: (handle.spec.rows, handle.spec.cols, handle.spec.matrices["weight"].bits)
            for id_, handle in handles.items()
        }
        self._examine_ratio(shapes.values())
        moments = data.input_moments(model, context, self.samples)
        findings: dict[str, str] = {}
        for id_, handle in context.progress(handles.items(), label="factorizing", total=len(handles)):
            rank, nonzeros = self._counts(*shapes[id_])
            if not rank:
                findings[id_] = f"{LEFT_DENSE}: too small to gain"
                continue
            weight = handle.dense().float()
            rest, kept, left, right = ops.sparse_low_rank(
                weight,
                rank=rank,
                keep=partial(_largest, count=nonzeros),
                importance=moments[id_].diagonal().to(weight),
                iterations=self.iterations,
            )
            nn.split(model, id_, rest=rest, kept=kept, basis=right, coefficients=left)
            findings[id_] = f"rank {rank}, and {nonzeros} of {weight.numel()} entries"
        return {"layers": findings}

    def _examine_ratio(self, shapes: "Iterable[tuple[int, int, float]]") -> None:
        """Refuse a ratio that leaves none of the weights, given by rows, columns and bits of a value, a rank."""
        largest = [rows * cols / (_bitmap(rows, cols, bits) + rows + cols + 1) for rows, cols, bits in shapes]
        if self.ratio > max(1.0, *largest):
            raise UnreachableRatio(
                f"{self.name}: ratio={self.ratio:g} leaves no rank to any of these {len(largest)} weights: the largest is "
                f"{max(largest):.2f}"
            )

    def _counts(self, rows: int, cols: int, bits: float) -> tuple[int, int]:
        """The rank, 0 where not even 1 leaves S an entry, and how many entries S keeps."""
        values = max(1.0, rows * cols / self.ratio - _bitmap(rows, cols, bits))
        most = int((values - 1) / (rows + cols))
        rank = min(most, max(1, int(self.rank_ratio * values / (rows + cols))))
        return rank, int(values - rank * (rows + cols))


def _bitmap(rows: int, cols: int, bits: float) -> float:
    """What the bitmap of S takes, in values of so many bits."""
    return 8 * Free(nonzeros=0).support_bytes(rows, cols) / bits


def _largest(matrix: "torch.Tensor", count: int) -> "torch.Tensor":
    """The `count` entries of largest magnitude."""
    return ops.highest(matrix.abs(), count)
