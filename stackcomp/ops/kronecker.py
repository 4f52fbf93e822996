"""The nearest sum of Kronecker products to a weight.

Letters: W (n x m) is cut into tiles of c x d: p x q of them, n = pc, m = qd. W ~ sum_k A_k (x) B_k over k = 1 .. r, A_k (p x q) and
B_k (c x d): tile (i, j) of W is sum_k A_k[i, j] B_k. With the tiles as the rows of a matrix R(W) (pq x cd), a Kronecker product has rank
one there, and the best sum of r of them is the truncated SVD of R(W) (Van Loan and Pitsianis, 1993).
"""

from jaxtyping import Float
from torch import Tensor

from stackcomp.ops.low_rank import low_rank, rank_errors


def kronecker(
    weight: Float[Tensor, "n m"], *, tile: tuple[int, int], terms: int
) -> tuple[Float[Tensor, "r p q"], Float[Tensor, "r c d"]]:
    """The A_k and B_k of the sum of r = `terms` Kronecker products that minimises ||W - sum_k A_k (x) B_k||, `tile` the shape of every B_k,
    which divides that of W. Singular values are shared evenly between the two.
    SettingError: `terms` is not within 1 .. min(pq, cd).
    """
    left, right = low_rank(_tiles(weight, tile), rank=terms)
    return left.T.unflatten(1, (len(weight) // tile[0], -1)), right.unflatten(1, tile)


def kronecker_errors(weight: Float[Tensor, "n m"], tile: tuple[int, int]) -> Float[Tensor, " terms"]:
    """Entry r is the least squared error of any sum of r Kronecker products, from 0 to min(pq, cd) (none)."""
    return rank_errors(_tiles(weight, tile))


def _tiles(weight: Float[Tensor, "n m"], tile: tuple[int, int]) -> Float[Tensor, "pq cd"]:
    """R(W): row i q + j holds tile (i, j) of W, row by row."""
    cut = weight.unflatten(0, (-1, tile[0])).unflatten(2, (-1, tile[1]))
    return cut.transpose(1, 2).flatten(2).flatten(0, 1)
