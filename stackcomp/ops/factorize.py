"""Dense-sparse factorization: every row of a weight as a mix of a few shared directions (DSFormer, arXiv 2312.13211).

    W ~ S D,  block of columns by block of columns: W_j ~ S_j D_j

Letters: W has n rows and m columns, cut into k blocks of g = m / k columns; a block has b atoms, D_j (b x g); every row of S_j (n x b)
keeps s non-zeros. Transposed: the factorized matrix is W^T, and n and m here count *its* rows and columns.

The error that is minimised is tr(P (W - S D) Q (W - S D)^T). Q, the metric of the columns, is whitened away exactly. P, the metric of the
rows, ties the rows of S to one another; without P they are independent. For W itself Q is the moment of the layer's inputs and P that
of the gradients at its outputs; transposed they trade places.

A sweep has three parts, none of which raises the error:
1. D given S: linear least squares.
2. The support, a few rows at a time, the others held (block coordinate descent): the part of P between those few rows is bounded by its
   diagonal times its largest eigenvalue, which makes them independent, and each swaps atoms (`sparse_coding.swap`).
3. All values together given the support and D: conjugate gradients, preconditioned by each row's own normal equations.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from stackcomp.core.errors import BadWeights, SettingError
from stackcomp.ops.low_rank import low_rank
from stackcomp.ops.sparse_coding import SMALLEST, factor_supports, gather, omp, scatter, solve, swap
from stackcomp.ops.whiten import Whitener

COUPLED_ROWS = (
    32  # rows coded together where the metric couples rows: fewer bound P better and cost more calls
)
FREE_ROWS = 1024  # and where it does not: as many as memory likes
ROUNDS = 8  # of the first pursuit: s / ROUNDS atoms a round
SWAPPED = 4  # a sweep may swap s / SWAPPED atoms of a row
CONJUGATE_STEPS = 8
BASIS_RIDGE = 1e-6  # of the mean diagonal of S^T P S: an atom that no row uses stays finite


@dataclass(frozen=True, kw_only=True)
class DenseSparseFactors:
    """W (or W^T) as blocks S_j D_j. Supports ascend and count atoms from the start of their block."""

    basis: Float[Tensor, "k b g"]
    support: Int64[Tensor, "n k s"]
    values: Float[Tensor, "n k s"]
    transposed: bool

    def product(self) -> Tensor:
        """The weight itself, in its own orientation."""
        rows, blocks = self.support.shape[:2]
        codes = scatter(self.support, self.values, self.basis.shape[1]).view(rows, blocks, -1)
        product = torch.einsum("nkb,kbg->nkg", codes, self.basis).flatten(1)
        return product.T.contiguous() if self.transposed else product


def dense_sparse(
    weight: Float[Tensor, "rows cols"],
    *,
    atoms: int,
    nonzeros: int,
    blocks: int = 1,
    transposed: bool = False,
    inputs: Whitener | None = None,
    outputs: Whitener | None = None,
    sweeps: int = 6,
    seed: int = 0,
) -> DenseSparseFactors:
    """Factorize `weight` with `atoms` (b) and `nonzeros` (s) a block, minimising `whiten.metric_error`.

    Starts from random rows of the weight as atoms, those that matter more being likelier (all randomness is from `seed`), then `sweeps`
    sweeps. With s = b in one block nothing is sparse: the optimal low rank is returned at once. Where we differ from the paper:
    the metrics; and blocks are coded together, so that each corrects the errors of the others.
    SettingError: blocks, atoms or nonzeros do not fit the weight. BadWeights: NaN or infinite values.
    """
    if not torch.isfinite(weight).all():
        raise BadWeights(f"a weight of shape {tuple(weight.shape)} holds NaN or infinite values")
    if transposed:
        weight, inputs, outputs = weight.T.contiguous(), outputs, inputs
    rows, columns = weight.shape
    _check(rows, columns, atoms, nonzeros, blocks)
    if nonzeros == atoms and blocks == 1 and atoms <= columns:
        left, right = low_rank(weight, rank=atoms, inputs=inputs, outputs=outputs)
        support = torch.arange(atoms, device=weight.device).expand(rows, 1, atoms).contiguous()
        return DenseSparseFactors(
            basis=right[None], support=support, values=left[:, None], transposed=transposed
        )
    solver = _Solver(weight, atoms, nonzeros, blocks, rows_metric=outputs, columns_metric=inputs, seed=seed)
    for _ in range(sweeps):
        solver.solve_basis()
        solver.solve_support()
        solver.solve_values(CONJUGATE_STEPS)
    solver.solve_basis()
    balance = _balance(solver.values, solver.basis)
    return DenseSparseFactors(
        basis=solver.basis * balance,
        support=solver.support,
        values=solver.values / balance,
        transposed=transposed,
    )


def _balance(values: Tensor, basis: Tensor) -> Tensor:
    """The factor that gives both sides the same mean square: an optimizer that takes equal steps then trains both equally."""
    energies = [part.square().mean().clamp_min(torch.finfo(part.dtype).tiny) for part in (values, basis)]
    return (energies[0] / energies[1]) ** 0.25


def _check(rows: int, columns: int, atoms: int, nonzeros: int, blocks: int) -> None:
    if blocks < 1 or columns % blocks:
        raise SettingError(f"blocks={blocks} does not divide the {columns} columns of the factorized matrix")
    if not 1 <= atoms <= rows or not 1 <= nonzeros <= atoms:
        raise SettingError(
            f"nonzeros={nonzeros} and atoms={atoms} must satisfy 1 <= nonzeros <= atoms <= {rows}, the rows of the matrix"
        )


class _Solver:
    """The state of one factorization: basis (k, b, g), support and values (n, k, s), and what follows from them."""

    def __init__(
        self,
        weight: Tensor,
        atoms: int,
        nonzeros: int,
        blocks: int,
        *,
        rows_metric: Whitener | None,
        columns_metric: Whitener | None,
        seed: int,
    ) -> None:
        self._weight = weight
        self._blocks, self._atoms, self._nonzeros = blocks, atoms, nonzeros
        self._width = weight.shape[1] // blocks
        self._rows = rows_metric
        self._columns = columns_metric
        self._generator = torch.Generator().manual_seed(seed)
        self._importance = (
            torch.ones_like(weight[:, 0]) if rows_metric is None else rows_metric.moment.diagonal()
        )
        self._target = self._whiten(weight)  # n x m
        self._pulled = self._pull(self._target)  # P W Q^(1/2)
        self.basis = self._first_basis()
        self._normalise_atoms(None)
        self._correlate()
        step = max(1, nonzeros // ROUNDS)
        parts = [
            omp(self._gram, part, nonzeros, blocks=blocks, step=step)
            for part in self._correlations.split(FREE_ROWS)
        ]
        self.support = torch.cat([part[0] for part in parts])
        self.values = torch.cat([part[1] for part in parts])

    def _whiten(self, matrix: Tensor) -> Tensor:
        return matrix if self._columns is None else self._columns.whiten_columns(matrix)

    def _pull(self, matrix: Tensor) -> Tensor:
        """P times a matrix of n rows."""
        return matrix if self._rows is None else self._rows.moment @ matrix

    def _whitened_atoms(self) -> Tensor:
        """blockdiag(D) Q^(1/2): the dictionary (k b x m) that whitened rows are coded in."""
        if self._columns is None:
            return torch.block_diag(*self.basis)
        root = self._columns.root.unflatten(0, (self._blocks, self._width))
        return torch.einsum("kbg,kgm->kbm", self.basis, root).flatten(0, 1)

    def _first_basis(self) -> Tensor:
        """Random rows of each block of the weight."""
        parts = []
        energy = self._target.square().sum(1) * self._importance
        chance = (energy.double() + energy.double().mean() * 1e-6 + 1e-30).cpu()
        for part in self._weight.split(self._width, dim=1):
            picked = torch.multinomial(chance, self._atoms, generator=self._generator)
            parts.append(part[picked.to(part.device)])
        return torch.stack(parts)

    def _normalise_atoms(self, values: Tensor | None) -> None:
        """Atoms of length one in the metric; the values take the lengths up."""
        norms = self._whitened_atoms().norm(dim=1)
        norms = torch.where(norms > norms.max() * 1e-6, norms, norms.new_ones(()))
        self.basis = self.basis / norms.view(self._blocks, self._atoms, 1)
        if values is not None:
            self.values = values * gather(norms.expand(len(values), -1), self.support)

    def _correlate(self) -> None:
        self._dictionary = self._whitened_atoms()
        self._gram = self._dictionary @ self._dictionary.T
        self._correlations = self._target @ self._dictionary.T

    def _codes(self) -> Tensor:
        return scatter(self.support, self.values, self._atoms)

    def solve_basis(self) -> None:
        """D_j = (S_j^T P S_j)^-1 S_j^T P (W - sum_i!=j S_i D_i) restricted to its columns in the metric Q, block after block."""
        codes = self._codes()
        normal = codes.T @ self._pull(codes)
        normal.diagonal().add_(BASIS_RIDGE * normal.diagonal().mean().clamp_min(SMALLEST))
        if self._blocks == 1:  # Q cancels
            self.basis = torch.linalg.solve(normal, codes.T @ self._pull(self._weight))[None]
        else:
            self._solve_blocks(normal, codes.T @ self._pulled)
        self._normalise_atoms(self.values)
        self._correlate()

    def _solve_blocks(self, normal: Tensor, right: Tensor) -> None:
        """Gauss-Seidel over blocks. right: S^T P W Q^(1/2)."""
        basis = self.basis.clone()
        for j in range(self._blocks):
            atoms = slice(j * self._atoms, (j + 1) * self._atoms)
            columns = slice(j * self._width, (j + 1) * self._width)
            self.basis = basis
            others = self._whitened_atoms()
            others[atoms] = 0
            left = right[atoms] - normal[atoms] @ others
            if self._columns is None:
                metric, left = None, left[:, columns]
            else:
                root = self._columns.root[columns]
                metric, left = self._columns.moment[columns, columns], left @ root.T
            solved = torch.linalg.solve(normal[atoms, atoms], left)
            basis[j] = solved if metric is None else torch.linalg.solve(metric, solved, left=False)
        self.basis = basis

    def solve_support(self) -> None:
        """Swap atoms, a few rows at a time in random order, each seeing the rows before it as they are now."""
        order = torch.randperm(len(self._weight), generator=self._generator).to(self._weight.device)
        codes = self._codes()
        residual = self._correlations - codes @ self._gram  # (W - S D) Q D^T
        support, values = self.support.clone(), self.values.clone()
        count = max(1, self._nonzeros // SWAPPED)
        for picked in order.split(FREE_ROWS if self._rows is None else COUPLED_ROWS):
            pull = (
                residual[picked]
                if self._rows is None
                else self._step(self._rows.moment[picked], picked, residual)
            )
            wanted = codes[picked] @ self._gram + pull
            support[picked], values[picked] = swap(self._gram, wanted, support[picked], values[picked], count)
            codes[picked] = scatter(support[picked], values[picked], self._atoms)
            residual[picked] = self._correlations[picked] - codes[picked] @ self._gram
        self.support, self.values = support, values

    def _step(self, metric: Tensor, picked: Tensor, residual: Tensor) -> Tensor:
        """Where the picked rows want to move: the gradient over the bound of P between them. metric: their rows of P."""
        scale = self._importance[picked].rsqrt()
        bound = torch.linalg.eigvalsh(metric[:, picked] * scale * scale[:, None])[-1]
        return (metric @ residual) * (scale.square() / bound)[:, None]

    def solve_values(self, steps: int) -> None:
        """All values at once for the support and basis as they are: `steps` conjugate gradient steps, exact at once without P."""
        factor = torch.cat([factor_supports(self._gram, part) for part in self.support.split(FREE_ROWS)])
        if self._rows is None:
            self.values = solve(factor, gather(self._correlations, self.support))
            return
        importance = self._importance[:, None, None]
        x = self.values
        residual = gather(self._pull(self._correlations - self._codes() @ self._gram), self.support)
        ahead = step = solve(factor, residual / importance)
        size = (residual * ahead).sum()
        for _ in range(steps):
            curved = gather(self._pull(scatter(self.support, step, self._atoms) @ self._gram), self.support)
            curvature = (step * curved).sum()
            if curvature <= 0 or size <= 0:  # nothing left to gain in float32
                break
            length = size / curvature
            x = x + length * step
            residual = residual - length * curved
            ahead = solve(factor, residual / importance)
            before, size = size, (residual * ahead).sum()
            step = ahead + (size / before) * step
        self.values = x
