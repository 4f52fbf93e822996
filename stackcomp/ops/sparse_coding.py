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


def gain(
    gram: Float[Tensor, "a a"],
    correlations: Float[Tensor, "n a"],
    support: Int64[Tensor, "n k s"],
    values: Float[Tensor, "n k s"],
) -> Float[Tensor, " n"]:
    """By how much the code lowers each row's squared error: 2 <c, x> - x^T A A^T x."""
    code = scatter(support, values, len(gram) // support.shape[1])
    return ((2 * correlations - code @ gram) * code).sum(1)


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


def swap(
    gram: Float[Tensor, "a a"],
    correlations: Float[Tensor, "n a"],
    support: Int64[Tensor, "n k s"],
    values: Float[Tensor, "n k s"],
    count: int,
) -> tuple[Int64[Tensor, "n k s"], Float[Tensor, "n k s"]]:
    """Exchange up to `count` atoms a row and block for better ones; a row that would get worse keeps its code.

    A round of subspace pursuit (arXiv 0803.0811): add the `count` strongest atoms, solve, drop as many. Where we differ: the ones
    dropped have the least x_i^2 / (inverse Gram)_ii, the exact rise of the error when one atom goes (optimal brain surgeon).
    """
    blocks, nonzeros = support.shape[1:]
    count = min(count, len(gram) // blocks - nonzeros)
    if count == 0:
        return support, values
    wide = torch.cat([support, _strongest(gram, correlations, support, values, count)], dim=2)
    inverse = torch.cholesky_inverse(factor_supports(gram, wide))
    weights = (inverse @ gather(correlations, wide).flatten(1)[..., None]).view(wide.shape)
    order = (weights.square() / inverse.diagonal(dim1=1, dim2=2).view_as(weights)).argsort(
        dim=2, descending=True
    )
    fresh, ascending = wide.gather(2, order[..., :nonzeros]).sort(dim=2)
    kept = order[..., :nonzeros].gather(2, ascending)
    solved = _without(inverse, weights, kept, order[..., nonzeros:])
    better = gain(gram, correlations, fresh, solved) > gain(gram, correlations, support, values)
    better = better[:, None, None]
    return torch.where(better, fresh, support), torch.where(better, solved, values)


def _without(
    inverse: Float[Tensor, "n kw kw"],
    weights: Float[Tensor, "n k w"],
    kept: Int64[Tensor, "n k s"],
    dropped: Int64[Tensor, "n k c"],
) -> Float[Tensor, "n k s"]:
    """Least-squares values once the dropped positions are gone, from the inverse with them: x_K - B_KC B_CC^-1 x_C, B the inverse.

    Cheaper than solving anew, as only the few dropped are inverted.
    """
    blocks, width = weights.shape[1:]
    offsets = width * torch.arange(blocks, device=kept.device)[:, None]
    stay, leave = (kept + offsets).flatten(1), (dropped + offsets).flatten(1)
    columns = inverse.gather(
        1, leave[..., None].expand(-1, -1, blocks * width)
    )  # B is symmetric: its rows are its columns
    corner = columns.gather(2, leave[:, None, :].expand(-1, leave.shape[1], -1))
    removed = torch.linalg.solve_ex(corner, weights.flatten(1).gather(1, leave)).result
    return (weights.flatten(1) - (removed[:, None, :] @ columns)[:, 0]).gather(1, stay).view_as(kept)
