"""Sparse coding of many rows at once: each row picks s of the b atoms of every block and weighs them.

Letters: n rows (targets), k blocks, b atoms a block, s atoms kept a row and block, a = k b atoms in all, d the length of an atom.

Everything here sees the dictionary A (a x d) and the targets T (n x d) through `gram = A A^T` and `correlations = T A^T` only: the cost
of a row is then free of d. A support is an (n, k, s) tensor of atom numbers *inside their block*, in ascending order.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

# Of the mean squared norm of the atoms: keeps the solve defined when a row picks two equal ones.
RIDGE = 1e-6
SMALLEST = 1e-12  # of that mean: atoms of zeros (a weight of zeros) get values of zero


def scatter(
    support: Int64[Tensor, "n k s"], values: Float[Tensor, "n k s"], atoms: int
) -> Float[Tensor, "n a"]:
    """Sparse rows as a dense n x a matrix."""
    dense = values.new_zeros(len(support), support.shape[1], atoms)
    return dense.scatter_(2, support, values).flatten(1)


def gather(dense: Float[Tensor, "n a"], support: Int64[Tensor, "n k s"]) -> Float[Tensor, "n k s"]:
    """The entries of a dense n x a matrix on a support."""
    return dense.unflatten(1, (support.shape[1], -1)).gather(2, support)


def factor_supports(gram: Float[Tensor, "a a"], support: Int64[Tensor, "n k s"]) -> Float[Tensor, "n ks ks"]:
    """Cholesky factors of each row's own part of the Gram matrix: the normal equations of least squares on its support."""
    atoms = len(gram) // support.shape[1]
    offsets = atoms * torch.arange(support.shape[1], device=support.device)
    flat = (support + offsets[:, None]).flatten(1)
    # One flat index: twice as fast as indexing rows and columns.
    pairs = (flat[:, :, None] * len(gram) + flat[:, None, :]).flatten()
    part = gram.flatten().index_select(0, pairs).view(len(flat), flat.shape[1], flat.shape[1])
    ridge = RIDGE * gram.diagonal().mean().clamp_min(SMALLEST)
    part.diagonal(dim1=1, dim2=2).add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(part)
    if failed.any():  # atoms so alike that float32 cannot part them
        part.diagonal(dim1=1, dim2=2).add_(1e3 * ridge)
        factor = torch.linalg.cholesky(part)
    return factor


def solve(factor: Float[Tensor, "n ks ks"], right: Float[Tensor, "n k s"]) -> Float[Tensor, "n k s"]:
    """Least-squares values of each row from its Cholesky factor."""
    return torch.cholesky_solve(right.flatten(1)[..., None], factor).view_as(right)


def _strongest(
    gram: Float[Tensor, "a a"],
    correlations: Float[Tensor, "n a"],
    support: Int64[Tensor, "n k s"],
    values: Float[Tensor, "n k s"],
    count: int,
) -> Int64[Tensor, "n k count"]:
    """The `count` atoms of each block, off the support, that correlate most with the residual."""
    blocks = support.shape[1]
    atoms = len(gram) // blocks
    residual = correlations - scatter(support, values, atoms) @ gram
    norms = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    score = (residual / norms).abs().unflatten(1, (blocks, atoms)).scatter(2, support, -1.0)
    return score.topk(count, dim=2).indices


def omp(
    gram: Float[Tensor, "a a"],
    correlations: Float[Tensor, "n a"],
    nonzeros: int,
    *,
    blocks: int = 1,
    step: int = 1,
) -> tuple[Int64[Tensor, "n blocks nonzeros"], Float[Tensor, "n blocks nonzeros"]]:
    """Orthogonal matching pursuit of all rows together.

    Each round adds the atom that correlates most with the residual and solves least squares on all atoms so far. `step` atoms a round
    is generalized OMP (arXiv 1111.6664), nearly as good and `step` times as fast. With blocks, a round adds `step` atoms *to each*.
    """
    rows = len(correlations)
    support = torch.zeros(rows, blocks, 0, dtype=torch.int64, device=gram.device)
    values = correlations.new_zeros(rows, blocks, 0)
    while support.shape[2] < nonzeros:
        count = min(step, nonzeros - support.shape[2])
        new = _strongest(gram, correlations, support, values, count)
        support = torch.cat([support, new], dim=2).sort(dim=2).values
        values = solve(factor_supports(gram, support), gather(correlations, support))
    return support, values
