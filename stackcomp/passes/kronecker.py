"""Kronecker factorization, after training."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import floor, prod
from typing import TYPE_CHECKING, Any, ClassVar

from stackcomp import nn, ops
from stackcomp.core.contract import Contract
from stackcomp.core.errors import UnreachableRatio
from stackcomp.core.facts import Fact, facts
from stackcomp.core.ledger import LEFT_DENSE
from stackcomp.core.passes import Findings, Pass
from stackcomp.core.plan import PlannedWeight
from stackcomp.core.settings import shape, shape_fits, within
from stackcomp.core.spec import WeightSpec
from stackcomp.layerwise import FACTOR

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context

Tile = tuple[int, int]
SIDE = FACTOR | {Fact.KRONECKER}


@dataclass(frozen=True, kw_only=True, repr=False)
class Kronecker(Pass):
    """Replace each selected weight W (n x m) by a sum of Kronecker products: W ~ sum_k A_k (x) B_k, k = 1 .. r, B_k of c x d and A_k of
    n/c x m/d. Put Distill after it.

    The sum minimises || W - sum_k A_k (x) B_k ||: the truncated SVD of the matrix whose rows are the tiles of c x d that W is cut into. No
    data are looked at. Every layer has the same ratio, r = nm / (ratio (nm / cd + cd)) rounded down; one for which that is nothing is left
    dense.

    ratio: dense bytes / stored bytes of each layer, at least 1, where 1 does nothing; tile: (c, d), which must divide the rows and columns
    of every selected weight; None takes for each weight the tile of the least error among those of which one side is 1 or a whole side of
    W, as the best of trained weights are. Of these, whole rows (1, m) and whole columns (n, 1) are not tried: they make it the plain SVD,
    LowRank(data_aware=False), which mostly has less error than all others.

    A layer computes the sum of A_k X B_k^T, X its inputs as m/d x d, or puts W together at every call, with r nm multiplications,
    whichever takes fewer: it saves bytes, and is mostly slower than the dense product. Its values can be pruned, rounded and trained
    later; passes that look at what flows into a product refuse it.

    Where we differ from the paper: it takes one product of a given shape, for embeddings too, and trains it by distillation in two stages.
    """

    ratio: float = 2.0
    tile: Tile | None = None

    paper: ClassVar[str] = (
        "Tahaei et al., KroneckerBERT, arXiv:2109.06243; the nearest sum: Van Loan and Pitsianis, 1993"
    )
    idle: ClassVar[dict[str, Any]] = {"ratio": 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        within("ratio", self.ratio, 1.0, 10_000.0)
        if self.tile is not None:
            sides = shape("tile", self.tile)
            object.__setattr__(self, "tile", sides)  # a list would make the pass unhashable

    @property
    def contract(self) -> Contract:
        return Contract(
            requires=facts(Fact.FLOAT, Fact.DENSE),
            forbids=facts(Fact.FACTOR),
            becomes=({"basis": SIDE, "coefficients": SIDE},) if self.ratio > 1 else (),
            may_leave=True,
        )

    def examine(self, weights: Sequence[PlannedWeight]) -> None:
        if self.tile is not None:
            shape_fits("tile", self.tile, weights)
        largest = max(
            (
                _ratio(weight.rows, weight.cols, tile)
                for weight in weights
                for tile in self._tried(weight.rows, weight.cols)
            ),
            default=1.0,
        )
        if self.ratio > max(1.0, largest):
            raise UnreachableRatio(
                f"{self.name}: ratio={self.ratio:g} leaves no term to any of these {len(weights)} weights: the largest is "
                f"{floor(100 * largest) / 100:.2f}"
            )

    def stores(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        ways = self._ways(spec.rows, spec.cols)
        return tuple(spec.as_kronecker(terms=terms, tile=tile) for tile, terms in ways.items()) or (spec,)

    @property
    def undetermined(self) -> str:
        chosen = self.tile is None and self.ratio > 1
        return "takes for each weight the tile of the least error" if chosen else ""

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        if self.ratio == 1.0:
            return {}
        findings: dict[str, str] = {}
        handles = {id_: handle for id_, handle in nn.weights(model).items() if id_ in context.targets}
        for id_, handle in context.progress(handles.items(), label="factorizing", total=len(handles)):
            ways = self._ways(handle.spec.rows, handle.spec.cols)
            if not ways:
                findings[id_] = f"{LEFT_DENSE}: too small to gain"
                continue
            weight = handle.dense().float()
            tile = min(ways, key=lambda tile: float(ops.kronecker_errors(weight, tile)[ways[tile]]))
            coefficients, basis = ops.kronecker(weight, tile=tile, terms=ways[tile])
            nn.tile(model, id_, basis=basis, coefficients=coefficients)
            findings[id_] = f"{ways[tile]} terms, tiles of {tile[0]} x {tile[1]}"
        return {"layers": findings}

    def _ways(self, rows: int, cols: int) -> dict[Tile, int]:
        """The terms of a weight by the tiles that are tried and have any; none where nothing is asked for."""
        terms = {tile: int(_ratio(rows, cols, tile) / self.ratio) for tile in self._tried(rows, cols)}
        return {tile: count for tile, count in terms.items() if count and self.ratio > 1}

    def _tried(self, rows: int, cols: int) -> Iterable[Tile]:
        """The tiles that a weight may be cut into."""
        if self.tile:
            return [self.tile]
        across = [(c, d) for c in _divisors(rows)[1:-1] for d in sorted({1, cols})]
        return across + [(c, d) for c in sorted({1, rows}) for d in _divisors(cols)[1:-1]]


def _ratio(rows: int, cols: int, tile: Tile) -> float:
    """Entries of a weight to those of one Kronecker product of its shape: the largest ratio."""
    return rows * cols / (rows * cols // prod(tile) + prod(tile))


def _divisors(size: int) -> list[int]:
    """All of them, ascending."""
    return [divisor for divisor in range(1, size + 1) if size % divisor == 0]
