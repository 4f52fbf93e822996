"""Dense-sparse factorization: every row of a weight as a mix of a few shared directions (DSFormer, arXiv 2312.13211).

    W ~ S D,  block of columns by block of columns: W_j ~ S_j D_j

Letters: W has n rows and m columns, cut into k blocks of g = m / k columns; a block has b atoms, D_j (b x g), in q groups; every row of
S_j (n x b) keeps s non-zeros of each group (q = 1: s of b free; s = 1: one of each group, cheaper to index). a = k b atoms in all.
Transposed: the factorized matrix is W^T, and n and m here count *its* rows and columns.

The error that is minimised is tr(P (W - S D) Q (W - S D)^T). Q, the metric of the columns, is whitened away exactly. P, the metric of the
rows, ties the rows of S to one another; without P they are independent, and without Q the blocks are too: then they are p = k problems
solved side by side, otherwise p = 1.

A sweep alternates two steps, and by itself neither raises the error:
1. D given S: linear least squares.
2. S given D. Independent rows exchange atoms and solve their values by matrix products (`pursuit`), part by part, with D solved anew
   after each part (as online dictionary learning does, Mairal et al., ICML 2009, with exact steps and nothing forgotten). Rows tied by P
   do it a few at a time, the others held (block coordinate descent): the part of P between those few is bounded by its diagonal times
   its largest eigenvalue, which makes them independent; then all values together, by conjugate gradients.

Sweeps converge slowly, and the first supports are poor. So a row starts with more atoms than it is to keep, and drops some in every sweep,
when the basis has learned what they are for (`narrowing`); and each new basis is taken `AHEAD` times its last move further (momentum of
alternating least squares, Mitchell et al., arXiv:1810.05846).

Codes of independent rows pay a little for their size, as in a ridge regression: values that cancel one another are large, and hold the
next dictionary where it is. After the last sweep they do not (`polish`).

Factors that will be rounded are made for it: with `noise`, the mean square of the rounding over that of the values, what is minimised is
the error that is to be expected afterwards,

    tr(P E Q E^T) + noise (sum_i P_ii |s_i|^2 + sum_a (S^T P S)_aa |d_a|^2),   E = W - S D,  atoms d_a of length one in Q,

a ridge on both factors: values that cancel one another do not survive being rounded. (Rounding in groups is taken as noise of equal share
in every value, and uncorrelated.)
"""

from dataclasses import dataclass
from math import inf, sqrt

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from stackcomp.core.errors import BadWeights, SettingError
from stackcomp.core.settings import whole
from stackcomp.ops import pursuit
from stackcomp.ops.low_rank import low_rank
from stackcomp.ops.sparse_coding import SMALLEST, factor_supports, gather, scatter, solve
from stackcomp.ops.whiten import Whitener

TIED_ROWS = 16  # rows coded together where the metric ties rows: fewer bound P better and cost more calls
TIED_STEPS = 4  # at most, of conjugate gradients, for their codes: all values are solved together afterwards
FREE_ROWS = 192  # and where it does not: as many as the cache likes, which bounds the memory beyond S itself
DESCENT_STEPS = 12  # at most, of conjugate gradients, for each least squares of independent rows
AHEAD = 0.8  # of the last move of a basis, added to it; from 1 on it diverges
SWAPPED = 4  # a sweep may swap s / SWAPPED atoms of a row
CONJUGATE_STEPS = 16  # of all values together, where P ties them
POLISHING = 8  # rounds at the end, supports held, where P ties rows: they cost a fraction of a sweep
CODE_RIDGE = 0.01  # of an atom's own product, added to it where rows are independent
ROUNDING = 5.0  # times 4^-bits: see `rounding_noise`
RIDGE = 1e-6  # of the mean diagonal of a Gram matrix before it is inverted
BASIS_RIDGE = 1e-6  # of the mean diagonal of S^T P S: an atom that no row uses stays finite


@dataclass(frozen=True, kw_only=True)
class DenseSparseFactors:
    """W (or W^T) as blocks S_j D_j. Supports ascend and count atoms from the start of their group; a block has k q / k = q groups."""

    basis: Float[Tensor, "k b g"]
    support: Int64[Tensor, "n kq s"]
    values: Float[Tensor, "n kq s"]
    transposed: bool

    def product(self) -> Tensor:
        """The weight itself, in its own orientation; codes are spread out a few rows at a time."""
        blocks, atoms, width = self.basis.shape
        group = blocks * atoms // self.support.shape[1]
        product = self.values.new_empty(len(self.values), blocks, width)
        for start in range(0, len(product), FREE_ROWS):
            rows = slice(start, start + FREE_ROWS)
            codes = scatter(self.support[rows], self.values[rows], group).unflatten(1, (blocks, atoms))
            product[rows] = torch.einsum("nkb,kbg->nkg", codes, self.basis)
        return product.flatten(1).T.contiguous() if self.transposed else product.flatten(1)


@torch.no_grad()
def dense_sparse(
    weight: Float[Tensor, "rows cols"],
    *,
    atoms: int,
    nonzeros: int,
    blocks: int = 1,
    groups: int = 1,
    transposed: bool = False,
    inputs: Whitener | None = None,
    outputs: Whitener | None = None,
    noise: float = 0.0,
    sweeps: int = 6,
    seed: int = 0,
) -> DenseSparseFactors:
    """Factorize `weight`, float32 or float64, with `atoms` (b) a block and `nonzeros` (s) a group, minimising `whiten.metric_error`.

    Starts from random rows of the weight as atoms, those that matter more being likelier (all randomness is from `seed`), then `sweeps`
    sweeps. noise: what rounding will do to the values, by `rounding_noise`. With s = b in one block nothing is sparse: the optimal low
    rank is returned at once. Where we differ from the paper: the metrics; and blocks are coded together, so that each corrects the errors
    of the others.
    SettingError: blocks, groups, atoms or nonzeros do not fit the weight, or sweeps is no count. BadWeights: another dtype, no values,
    NaN or infinite ones, or such as are so when squared.
    """
    whole("sweeps", sweeps, 0)
    rows, columns = reversed(weight.shape) if transposed else weight.shape
    if nonzeros == atoms and blocks == groups == 1 and 1 <= atoms <= columns:
        _refuse_broken(weight)
        if transposed:
            weight, inputs, outputs = weight.T.contiguous(), outputs, inputs
        left, right = low_rank(weight, rank=atoms, inputs=inputs, outputs=outputs)
        support = torch.arange(atoms, device=weight.device).expand(rows, 1, atoms).contiguous()
        return DenseSparseFactors(
            basis=right[None], support=support, values=left[:, None], transposed=transposed
        )
    _check(rows, columns, atoms, nonzeros, blocks, groups)
    kept = narrowing(nonzeros, atoms // groups, sweeps)
    factorizer = Factorizer(
        weight,
        atoms=atoms,
        nonzeros=kept[0],
        blocks=blocks,
        groups=groups,
        transposed=transposed,
        inputs=inputs,
        outputs=outputs,
        noise=noise,
        seed=seed,
    )
    for count in kept[1:]:
        factorizer.sweep(nonzeros=count, ahead=AHEAD)
    factorizer.polish()
    return factorizer.factors()


def narrowing(nonzeros: int, group: int, sweeps: int) -> list[int]:
    """How many atoms of a group a row has at first and after each sweep: from half way, in factors, between all and those it is to keep."""
    return [*(round(kept) for kept in np.geomspace(sqrt(nonzeros * group), nonzeros, sweeps)), nonzeros]


def rounding_noise(value_bits: float | None) -> float:
    """The `noise` to be ready for where values will take so many bits, their share of a scale included; None: as they are, 0.

    Three times what the grids of `low_bit` leave of Gaussian groups of 32, which is 1.67 * 4^-bits: groups of a factor are less even.
    """
    return 0.0 if value_bits is None else ROUNDING / 4 ** int(value_bits)


class Factorizer:
    """A factorization under way, which can go on after its weight has moved: the warm start of training (`aim`, then `sweep`).

    `basis` (k b g), `code` (p n a/p), the rows of S spread over all atoms, and `mask`, where they may differ from zero, are its whole
    state: a new one that takes them over (`resume`) goes on the same.
    """

    def __init__(
        self,
        weight: Float[Tensor, "rows cols"],
        *,
        atoms: int,
        nonzeros: int,
        blocks: int = 1,
        groups: int = 1,
        transposed: bool = False,
        inputs: Whitener | None = None,
        outputs: Whitener | None = None,
        noise: float = 0.0,
        seed: int = 0,
        start: DenseSparseFactors | None = None,
    ) -> None:
        self._transposed = transposed
        self._columns, self._rows = (outputs, inputs) if transposed else (inputs, outputs)
        rows, columns = reversed(weight.shape) if transposed else weight.shape
        _check(rows, columns, atoms, nonzeros, blocks, groups)
        self._blocks, self._atoms, self._group, self._nonzeros = blocks, atoms, atoms // groups, nonzeros
        self._width = columns // blocks
        self._noise = noise
        self._last: Tensor | None = None  # the basis of the last sweep, where it reached ahead
        self._problems = blocks if self._columns is None and self._rows is None else 1
        size = blocks * atoms // self._problems
        self._gram = weight.new_empty(self._problems, size, size)
        self._generator = torch.Generator().manual_seed(seed)
        self._importance = weight.new_ones(rows) if self._rows is None else self._rows.moment.diagonal()
        self._order = torch.randperm(rows, generator=self._generator).to(weight.device)
        self.aim(weight)
        if start is None:
            self.basis = self._first_basis()
            self._normalise_atoms()
            self._look()
            self.code = weight.new_empty(self._problems, rows, size)
            self.mask = torch.empty_like(self.code, dtype=torch.bool)
            inverse = _inverse(self._gram)
            for part in self._parts():
                self.code[:, part], self.mask[:, part] = self._first_code(inverse, part)
        else:
            self.basis = start.basis
            self.code = self._split(scatter(start.support, start.values, self._group)).contiguous()
            self.mask = self._split(scatter(start.support, torch.ones_like(start.values), self._group)) > 0
            self.code *= self._normalise_atoms()
            self._look()

    def aim(self, weight: Float[Tensor, "rows cols"]) -> None:
        """Take another weight of the same shape as the target of the next sweep. Raises BadWeights as `dense_sparse` does."""
        _refuse_broken(weight)
        self._weight = weight.T if self._transposed else weight
        whitened = self._weight if self._columns is None else self._columns.whiten_columns(self._weight)
        self._target = self._split(whitened)  # p n m/p

    def resume(self, basis: Tensor, code: Tensor, mask: Tensor) -> None:
        """Go on from copies of another factorizer's state."""
        self.basis, self.code, self.mask = basis.clone(), code.clone(), mask.clone()
        self._look()

    def sweep(self, *, nonzeros: int | None = None, ahead: float = 0.0, steps: int = DESCENT_STEPS) -> None:
        """One round. nonzeros: what a row is to keep of each group from now on, no more than so far; None: as many. ahead: of the move of
        the basis since the last sweep, added to it: above 0 a sweep may raise the error. steps: conjugate gradient steps for each least
        squares, at most: a code that is nearly right needs few."""
        self._nonzeros = nonzeros or self._nonzeros
        count = min(max(1, self._nonzeros // SWAPPED), self._group - self._nonzeros)
        self.solve_basis()
        if ahead:
            self._reach(ahead)
        if self._rows is not None:
            self._exchange_tied(count)
            self._solve_tied(min(steps, CONJUGATE_STEPS))
            return
        normal, right = self._equations()
        for rows in self._parts():
            self._count(normal, right, rows, -1)
            self.code[:, rows], self.mask[:, rows] = pursuit.exchange(
                self._gram,
                self._correlations(rows),
                self.code[:, rows],
                self.mask[:, rows],
                nonzeros=self._nonzeros,
                group=self._group,
                count=count,
                steps=steps,
            )
            self._count(normal, right, rows, 1)
            self._fit(normal, right)

    def polish(self) -> None:
        """Both factors in turn, supports held, where P ties the rows; the others, which gain little by more rounds, have their values
        solved once more without the ridge that learning needs."""
        if self._rows is None:
            self._settle()
            self.solve_basis()
            return
        support = self._support()
        factors = self._row_equations(support)  # stay near enough to condition all rounds
        for _ in range(POLISHING):
            self.solve_basis()
            self._descend_tied(support, factors, CONJUGATE_STEPS // 2)
        self.solve_basis()

    def factors(self) -> DenseSparseFactors:
        """What has been found so far, both factors with the same mean square: an optimizer that takes equal steps then trains both
        equally."""
        support = self._support()
        values = gather(self._flat(self.code), support)
        energies = [
            part.square().mean().clamp_min(torch.finfo(part.dtype).tiny) for part in (values, self.basis)
        ]
        balance = (energies[0] / energies[1]) ** 0.25
        return DenseSparseFactors(
            basis=self.basis * balance,
            support=support,
            values=values / balance,
            transposed=self._transposed,
        )

    def product(self) -> Tensor:
        """S D as it is, in the weight's own orientation."""
        codes = self._flat(self.code).unflatten(1, (self._blocks, self._atoms))
        product = torch.bmm(codes.transpose(0, 1), self.basis).transpose(0, 1).flatten(1)
        return product.T if self._transposed else product

    # layouts: p problems side by side, or one matrix

    def _split(self, matrix: Tensor) -> Tensor:
        """n x (p c) as p n c, the same memory."""
        return matrix.unflatten(1, (self._problems, -1)).transpose(0, 1)

    def _flat(self, problems: Tensor) -> Tensor:
        """p n c as n x (p c)."""
        return problems.transpose(0, 1).flatten(1)

    def _parts(self) -> list[slice]:
        rows = len(self._weight)
        return [slice(start, min(start + FREE_ROWS, rows)) for start in range(0, rows, FREE_ROWS)]

    def _support(self) -> Tensor:
        grouped = self._flat(self.mask).unflatten(1, (-1, self._group))
        return grouped.flatten().nonzero().remainder_(self._group).view(*grouped.shape[:2], self._nonzeros)

    # the dictionary, as the targets see it

    def _look(self) -> None:
        """What the code needs of the basis: the atoms in the metric and their products, always in the same memory."""
        self._dictionary = (
            self.basis if self._problems == self._blocks and self._columns is None else self._whitened()[None]
        )
        torch.matmul(self._dictionary, self._dictionary.mT, out=self._gram)
        if self._rows is None:
            self._gram.diagonal(dim1=1, dim2=2).add_(max(CODE_RIDGE, self._noise))

    def _whitened(self) -> Tensor:
        """blockdiag(D) Q^(1/2): the dictionary (k b x m) that whitened rows are coded in."""
        if self._columns is None:
            return torch.block_diag(*self.basis)
        root = self._columns.root.unflatten(0, (self._blocks, self._width))
        return torch.einsum("kbg,kgm->kbm", self.basis, root).flatten(0, 1)

    def _correlations(self, rows: slice = slice(None)) -> Tensor:
        return self._target[:, rows] @ self._dictionary.mT

    def _first_code(self, inverse: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        return pursuit.first_code(
            self._gram,
            inverse,
            self._correlations(rows),
            nonzeros=self._nonzeros,
            group=self._group,
            steps=DESCENT_STEPS,
        )

    def _settle(self) -> None:
        """The values of independent rows on their supports, with no other ridge than rounding asks for."""
        gram = _ridged(self._gram, min(self._noise - CODE_RIDGE, 0.0))
        for rows in self._parts():
            code = self.code[:, rows]
            residual = pursuit.unexplained(gram, self._correlations(rows), code)
            self.code[:, rows] = pursuit.descend(gram, residual, code, self.mask[:, rows], DESCENT_STEPS)

    # the basis

    def _first_basis(self) -> Tensor:
        """Random rows of each block of the weight."""
        energy = torch.linalg.vector_norm(self._target, dim=(0, 2)).square() * self._importance
        chance = (energy.double() + energy.double().mean() * 1e-6 + 1e-30).cpu()
        parts: list[Tensor] = []
        for part in self._weight.split(self._width, dim=1):
            picked = torch.multinomial(chance, self._atoms, generator=self._generator)
            parts.append(part[picked.to(part.device)])
        return torch.stack(parts)

    def _normalise_atoms(self) -> Tensor:
        """Atoms of length one in the metric; returns the lengths they had (p 1 a/p), for a code to take up."""
        atoms = self.basis if self._columns is None else self._whitened()
        norms = atoms.norm(dim=-1).view(self._blocks, self._atoms)
        norms = torch.where(norms > norms.max() * 1e-6, norms, norms.new_ones(()))
        self.basis = self.basis / norms[..., None]
        return norms.view(self._problems, 1, -1)

    def solve_basis(self) -> None:
        """D_j = (S_j^T P S_j)^-1 S_j^T P (W - sum_i!=j S_i D_i) restricted to its columns in the metric Q, block after block."""
        left = self._left()
        before = None if left == -inf else self.basis
        self._fit(*self._equations())
        if before is not None and self._left() > left:
            self.basis = before
        self.code *= self._normalise_atoms()
        self._look()

    def _reach(self, ahead: float) -> None:
        """Move the basis on in the direction in which it has moved since the last time."""
        solved = self.basis
        if self._last is not None:
            self.basis = solved + ahead * (solved - self._last)
            self.code *= self._normalise_atoms()
            self._look()
        self._last = solved

    def _goal(self) -> Tensor:
        """What the codes times the basis, or times the dictionary, are to come near."""
        return self._split(self._weight) if self._problems == self._blocks else self._target  # Q cancels

    def _equations(self) -> tuple[Tensor, Tensor]:
        """The normal equations of the basis: S^T P S, and S^T P times the goal."""
        pulled = self._pull(self.code)
        return self.code.mT @ pulled, pulled.mT @ self._goal()

    def _count(self, normal: Tensor, right: Tensor, rows: slice, sign: int) -> None:
        """Add some independent rows to these equations, in place, or take them away."""
        code = self.code[:, rows]
        normal.baddbmm_(code.mT, code, alpha=sign)
        right.baddbmm_(code.mT, self._goal()[:, rows], alpha=sign)

    def _fit(self, normal: Tensor, right: Tensor) -> None:
        """Solve these equations. `normal` is ridged in place, and given back as it was."""
        diagonal = normal.diagonal(dim1=1, dim2=2)
        plain = diagonal.clone()
        diagonal += BASIS_RIDGE * plain.mean(1, keepdim=True).clamp_min(SMALLEST) + self._noise * plain
        if self._problems == self._blocks:  # Q cancels
            self.basis = _solved(normal, right)
        else:
            self._solve_blocks(normal[0], right[0])
        diagonal.copy_(plain)
        self._look()

    def _solve_blocks(self, normal: Tensor, right: Tensor) -> None:
        """Gauss-Seidel over blocks. right: S^T P W Q^(1/2)."""
        basis = self.basis.clone()
        for j in range(self._blocks):
            atoms = slice(j * self._atoms, (j + 1) * self._atoms)
            columns = slice(j * self._width, (j + 1) * self._width)
            self.basis = basis
            others = self._whitened()
            others[atoms] = 0
            left = right[atoms] - normal[atoms] @ others
            if self._columns is None:
                metric, left = None, left[:, columns]
            else:
                root = self._columns.root[columns]
                metric, left = self._columns.moment[columns, columns], left @ root.T
            solved = _solved(normal[atoms, atoms], left)
            basis[j] = solved if metric is None else torch.linalg.solve(metric, solved, left=False)
        self.basis = basis

    # rows that P ties together: one problem, each row's own normal equations

    def _left(self) -> float:
        """The error, where P ties the rows and no noise keeps equations solvable; -inf elsewhere. Few directions may matter to P: a
        solution that float32 could not find any more, and that raises the error, is not taken."""
        if self._rows is None or self._noise:
            return -inf
        residual = self._target - self.code @ self._dictionary
        return float((self._pull(residual) * residual).sum())

    def _pull(self, matrix: Tensor) -> Tensor:
        """P times matrices of n rows."""
        return matrix if self._rows is None else self._rows.moment @ matrix

    def _exchange_tied(self, count: int) -> None:
        """Exchange atoms, a few rows at a time in an order drawn once, each seeing the rows before it as they are now."""
        assert self._rows is not None
        correlations = self._correlations()
        residual = correlations - self.code @ self._gram  # (W - S D) Q D^T
        for picked in self._order.split(TIED_ROWS):
            metric = self._rows.moment[picked]
            scale = self._importance[picked].rsqrt()
            bound = torch.linalg.eigvalsh(metric[:, picked] * scale * scale[:, None])[-1]
            step = (metric @ residual[0]) * (scale.square() / bound)[:, None]
            self.code[:, picked], self.mask[:, picked] = pursuit.exchange(
                _ridged(self._gram, self._noise / bound),
                self.code[:, picked] @ self._gram + step,
                self.code[:, picked],
                self.mask[:, picked],
                nonzeros=self._nonzeros,
                group=self._group,
                count=count,
                steps=TIED_STEPS,
            )
            residual[:, picked] = correlations[:, picked] - self.code[:, picked] @ self._gram

    def _solve_tied(self, steps: int) -> None:
        """All values at once for the support and basis as they are, preconditioned by each row's own equations."""
        support = self._support()
        self._descend_tied(support, self._row_equations(support), steps)

    def _row_equations(self, support: Tensor) -> list[Tensor]:
        """Those of each row's values on its support, factored, a part of the rows at a time."""
        ridged = _ridged(self._gram[0], self._noise)
        return [factor_supports(ridged, part) for part in support.split(FREE_ROWS)]

    def _descend_tied(self, support: Tensor, factors: list[Tensor], steps: int) -> None:
        """Conjugate gradients on the values of a support. factors: the row equations, of this basis or one near it."""
        start, left = self.code, self._left()
        gram, correlations = self._gram[0], self._correlations()[0]
        importance = self._importance[:, None, None]

        def conditioned(residual: Tensor) -> Tensor:
            parts = (residual / importance).split(FREE_ROWS)
            return torch.cat([solve(factor, part) for factor, part in zip(factors, parts, strict=True)])

        x = gather(self.code[0], support)
        residual = gather(self._pull(correlations - self.code[0] @ gram), support)
        residual -= self._noise * importance * x
        ahead = step = conditioned(residual)
        size = (residual * ahead).sum()
        for _ in range(steps):
            curved = gather(self._pull(scatter(support, step, self._group) @ gram), support)
            curved += self._noise * importance * step
            curvature = (step * curved).sum()
            if curvature <= 0 or size <= 0:  # nothing left to gain in float32
                break
            length = size / curvature
            x = x + length * step
            residual = residual - length * curved
            ahead = conditioned(residual)
            before, size = size, (residual * ahead).sum()
            step = ahead + (size / before) * step
        self.code = scatter(support, x, self._group)[None]
        if self._left() > left:
            self.code = start


def _check(rows: int, columns: int, atoms: int, nonzeros: int, blocks: int, groups: int) -> None:
    if blocks < 1 or columns % blocks:
        raise SettingError(f"blocks={blocks} does not divide the {columns} columns of the factorized matrix")
    if groups < 1 or atoms % groups:
        raise SettingError(f"groups={groups} does not divide the atoms={atoms} of a block")
    if not 1 <= atoms <= rows or not 1 <= nonzeros <= atoms // groups:
        of = f"{atoms // groups} atoms of a group" if groups > 1 else "atoms"
        raise SettingError(
            f"nonzeros={nonzeros} and atoms={atoms} must satisfy 1 <= nonzeros <= {of} and atoms <= {rows}, the rows of the matrix"
        )


def _refuse_broken(weight: Tensor) -> None:
    what = f"a weight of shape {tuple(weight.shape)} and {weight.dtype}"
    if weight.dtype not in (torch.float32, torch.float64) or not weight.numel():
        raise BadWeights(f"{what} cannot be factorized: give values in float32 or float64")
    if not torch.isfinite(torch.linalg.vector_norm(weight).square()):  # needs no memory of the weight's size
        raise BadWeights(f"{what} holds NaN or infinite values, or such as are so when squared")


def _ridged(gram: Float[Tensor, "*p a a"], ridge: Tensor | float) -> Float[Tensor, "*p a a"]:
    """Gram matrices with `ridge` added along their diagonals."""
    ridged = gram.clone()
    ridged.diagonal(dim1=-2, dim2=-1).add_(ridge)
    return ridged


def _solved(normal: Float[Tensor, "*p a a"], right: Float[Tensor, "*p a m"]) -> Float[Tensor, "*p a m"]:
    """The solutions of normal equations, ridged until float32 can solve them: rows of a weight that are all alike use atoms alike."""
    mean = normal.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(SMALLEST)
    for power in range(7):
        ridged = _ridged(normal, 10**power * RIDGE * mean) if power else normal
        found, failed = torch.linalg.solve_ex(ridged, right)
        if not failed.any() and torch.isfinite(found).all():
            return found
    raise BadWeights("the atoms of a factorization are not finite: look for huge values in the weight")


def _inverse(gram: Float[Tensor, "p a a"]) -> Float[Tensor, "p a a"]:
    """The inverse of Gram matrices, ridged until float32 can factor them."""
    mean = gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp_min(SMALLEST)
    for power in range(7):
        factor, failed = torch.linalg.cholesky_ex(_ridged(gram, 10**power * RIDGE * mean))
        if not failed.any():
            return torch.cholesky_inverse(factor)
    raise BadWeights("the atoms of a factorization are not finite: look for huge values in the weight")
