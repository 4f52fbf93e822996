"""The products that a linear layer is made of, and the second moments of what flows into each.

Letters: x (m) the inputs of the layer, C = E[x x^T]; W = S D block by block, or W^T = S D, as in `nn.layers`. A whole weight is one
product, a factored one two: z = D x, then S z; or, transposed, z = S^T x, then D^T z. What flows into the second has the moment
D C D^T, or S^T C S. A sum has the product of a whole weight before these two; where it is branched, C is that of all layers together.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stackcomp.core.errors import ContractBroken
from stackcomp.core.facts import Fact
from stackcomp.core.spec import WeightSpec
from stackcomp.nn.matrix import StoredMatrix


@dataclass(frozen=True, kw_only=True)
class Product:
    """The product with one stored matrix: y_k = M_k x_k, or with `on_rows` y_k = M_k^T x_k, for each of the matrices M_k that stand
    below each other in it (mostly one).

    moments: E[x_k x_k^T] of each, (blocks, m, m).
    """

    part: str
    matrix: StoredMatrix
    moments: Float[Tensor, "blocks m m"]
    on_rows: bool

    def split(self, matrix: Float[Tensor, "rows cols"]) -> Float[Tensor, "blocks n m"]:
        """A matrix of the shape of the stored one as weights, outputs x inputs."""
        parts = matrix.unflatten(0, (len(self.moments), -1))
        return parts.mT if self.on_rows else parts

    def join(self, weights: Float[Tensor, "blocks n m"]) -> Float[Tensor, "rows cols"]:
        """Undo `split`."""
        return (weights.mT if self.on_rows else weights).flatten(0, 1)


@torch.no_grad()
def products(
    spec: WeightSpec, matrices: Mapping[str, StoredMatrix], moment: Float[Tensor, "m m"]
) -> Iterator[Product]:
    """The products of a weight in the order in which inputs pass through them. The second of two factors is given what the first makes
    of the inputs by the time it is asked for: changes of the first, also in `matrices`, are seen."""
    if "weight" in matrices:
        yield Product(part="weight", matrix=matrices["weight"], moments=moment[None], on_rows=False)
    if not spec.factored:
        return
    if spec.tile:
        raise ContractBroken(
            f"{spec.id}: a sum of Kronecker products is no product of two matrices; let the pass forbid '{Fact.KRONECKER}'"
        )

    def diagonal(square: Tensor) -> Tensor:
        """The blocks on the diagonal, (blocks, size / blocks, size / blocks)."""
        split = square.unflatten(1, (spec.blocks, -1)).unflatten(0, (spec.blocks, -1))
        return split.diagonal(dim1=0, dim2=2).movedim(-1, 0)

    if spec.transposed:
        yield Product(
            part="coefficients", matrix=matrices["coefficients"], moments=moment[None], on_rows=True
        )
        passed = matrices["coefficients"].dense().float()
        between = diagonal(passed.T @ moment @ passed)
        yield Product(part="basis", matrix=matrices["basis"], moments=between, on_rows=True)
        return
    yield Product(part="basis", matrix=matrices["basis"], moments=diagonal(moment), on_rows=False)
    passed = torch.block_diag(*matrices["basis"].dense().float().unflatten(0, (spec.blocks, -1)))
    between = (passed @ moment @ passed.T)[None]
    if spec.branched:  # what one layer passes on never meets what another does
        count = len(spec.paths)
        size = len(passed) // count
        between *= torch.block_diag(*between.new_ones(count, size, size))
    yield Product(part="coefficients", matrix=matrices["coefficients"], moments=between, on_rows=False)
