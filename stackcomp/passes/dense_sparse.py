"""Dense-sparse factorization, after training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import log
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from stackcomp import ops
from stackcomp.core.errors import SettingError
from stackcomp.core.facts import Fact, Facts, facts
from stackcomp.core.plan import PlannedWeight
from stackcomp.core.settings import one_of, whole
from stackcomp.core.spec import WeightSpec
from stackcomp.layerwise import FactorizingPass, Layer

if TYPE_CHECKING:
    from stackcomp.ops.allocate import Candidate
    from stackcomp.ops.factorize import DenseSparseFactors

FACTOR = facts(Fact.FLOAT, Fact.TRAINABLE, Fact.FACTOR)
DENSE, SPARSE = FACTOR | {Fact.DENSE}, FACTOR | {Fact.SPARSE}

# of one layer, whatever the ratio of all: 1.05 to 57
RATIOS = tuple(1.05 * (12 / 1.05) ** (step / 39) for step in range(65))
TALL = 2.0  # longer side over shorter, from which a weight counts as tall

Gains = tuple[tuple[float, float], ...]
"""The error over that of low rank at equal bytes, by the layer's own ratio: means over layers of MiniLM-L6, but at 60, where it is a
careful guess. They rank candidates; the error that results is the solver's own."""


@dataclass(frozen=True, kw_only=True)
class Shaping:
    """What leaves the least error on layers of MiniLM-L6, whatever the bytes and the width of values: the share of a row's atoms that it
    keeps, and the blocks of a square weight; a tall one has one. The gains then: of square weights, of tall ones, and of tall ones whose
    rows the metric of the inputs ties together."""

    density: float
    blocks: int
    square: Gains
    tall: Gains
    tied: Gains


MANY = Shaping(  # directions that matter: without gradients in the metric, too
    density=0.22,
    blocks=4,
    square=((1.05, 0.9), (1.1, 0.5), (1.5, 0.45), (2.0, 0.5), (3.6, 0.61), (7.0, 0.74), (12.0, 0.87)),
    tall=((1.05, 0.9), (1.1, 0.6), (1.5, 0.36), (2.0, 0.4), (3.6, 0.54), (7.0, 0.69), (12.0, 0.79)),
    tied=((1.05, 0.9), (1.1, 0.66), (1.5, 0.4), (2.0, 0.4), (3.6, 0.47), (7.0, 0.61), (12.0, 0.7)),
)
FEW = Shaping(
    density=0.4,
    blocks=1,
    square=((1.05, 0.9), (1.5, 0.7), (12.0, 0.76), (60.0, 0.9)),
    tall=((1.05, 0.9), (1.5, 0.6), (12.0, 0.6), (60.0, 0.75)),
    tied=((1.05, 0.9), (1.5, 0.68), (12.0, 0.66), (60.0, 0.8)),
)


@dataclass(frozen=True, kw_only=True, repr=False)
class DenseSparse(FactorizingPass):
    """Replace each selected weight by a small dense basis times a sparse matrix of coefficients: W ~ S D.

    Every row of W becomes a mix of a few of b shared directions. Atoms b and non-zeros s are chosen per layer
    under one ratio, with low rank (every coefficient kept, no index to store) among the choices; a layer whose
    factors turn out worse than low rank of as many bytes takes that, unless value_bits are said.

    ratio, data_aware, sensitivity, samples, damping, spread, value_bits: as in every factorization. atoms, nonzeros:
    b and s of every selected weight, in place of a budget (ratio is then not used); give both, with blocks. groups: the atoms of a
    block are cut into so many groups, in each of which a row keeps s: 1 lets a row choose freely, b / g with s = 1 makes it choose one
    of every g, which costs less to index; it goes with atoms and must divide them. blocks: blocks of
    columns, each with a basis of its own; it must divide every selected weight; None takes 1, or 4 for square weights, unless
    gradients span few directions there. orientation: which side the sparse rows run along: "rows" those of W, "columns" those
    of its transpose, "auto" the longer one. sweeps: rounds of alternating least squares and support updates.

    Where we differ from the paper: post-training and data-aware (its learned variant is another pass),
    supports are priced and stored at their entropy, and the budget is shared out over layers.
    """

    atoms: int | None = None
    nonzeros: int | None = None
    groups: int = 1
    blocks: int | None = None
    orientation: Literal["auto", "rows", "columns"] = "auto"
    sweeps: int = 6

    paper: ClassVar[str] = "Chand et al., DSFormer, arXiv:2312.13211"
    becomes: ClassVar[tuple[Mapping[str, Facts], ...]] = (
        {"basis": DENSE, "coefficients": SPARSE},
        {"basis": DENSE, "coefficients": DENSE},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks is not None:
            whole("blocks", self.blocks, 1)
        whole("sweeps", self.sweeps, 0)
        if (self.atoms is None) != (self.nonzeros is None):
            raise SettingError(
                f"atoms={self.atoms!r}, nonzeros={self.nonzeros!r}: give both, or neither and a ratio"
            )
        if self.atoms is not None:
            if self.ratio == 1.0:
                raise SettingError(
                    f"atoms={self.atoms} does not go with ratio=1.0, which does nothing: leave one out"
                )
            whole("atoms", self.atoms, 1)
            whole("groups", self.groups, 1, self.atoms)
            if self.atoms % self.groups:
                raise SettingError(f"groups={self.groups} does not divide atoms={self.atoms}: give a divisor")
            whole("nonzeros", self.nonzeros, 1, self.atoms // self.groups)
        elif self.groups != 1:
            raise SettingError(f"groups={self.groups!r} needs a shape: give atoms and nonzeros, too")
        one_of("orientation", self.orientation, ("auto", "rows", "columns"))

    def examine(self, weights: Sequence[PlannedWeight]) -> None:
        for weight in weights:
            form = self._form(weight.rows, weight.cols)
            if form.columns % form.blocks:
                raise SettingError(
                    f"DenseSparse: blocks={self.blocks} does not divide the {form.columns} columns of {weight.id}: "
                    f"give a divisor, or skip={weight.id!r}"
                )
            if self.atoms is not None and self.atoms > form.rows:
                raise SettingError(
                    f"DenseSparse: atoms={self.atoms} exceeds the {form.rows} rows that {weight.id} has to mix: "
                    f"give at most {form.rows}, or skip={weight.id!r}"
                )
        super().examine(weights)

    def _examine_ratio(self, weights: Sequence[PlannedWeight]) -> None:
        if self.atoms is None:
            super()._examine_ratio(weights)

    def _share(
        self, candidates: "dict[str, list[Candidate]]", layers: Mapping[str, Layer]
    ) -> "dict[str, Candidate]":
        if self.atoms is None:
            return super()._share(candidates, layers)
        return {id_: options[-1] for id_, options in candidates.items()}

    def _smallest(self, rows: int, cols: int) -> float:
        lowest = self._form(rows, cols).rank(RATIOS[-1])
        return (rows + cols) * max(1, lowest)

    def _priced(self, layer: Layer) -> "list[Candidate]":
        """Low rank at every ratio, and dense-sparse where it is expected to be better; or the one shape that was asked for."""
        form = self._form(*layer.weight.shape, shaping=FEW if layer.few_directions else MANY)
        if asked := self._asked(*layer.weight.shape):
            size = form.bytes(layer.value_bytes, **asked)
            return [ops.Candidate(size_bytes=size, error=0.0, choice=_Choice(shape=asked))]
        errors = ops.rank_errors(layer.weight, inputs=layer.inputs, outputs=layer.outputs)
        tries = list(self._tried(form, layer.value_bytes))
        low_rank = [
            ops.Candidate(
                size_bytes=ops.low_rank_bytes(
                    form.rows, form.columns, tried.rank, value_bytes=layer.value_bytes
                ),
                error=float(errors[tried.rank]),
                choice=_Choice(rank=tried.rank, error=float(errors[tried.rank])),
            )
            for tried in tries
            if tried.rank
        ]
        sparse: list[Candidate] = []
        for tried in tries:
            if not tried.shape:
                continue
            # an error is that of a shape, and gains were measured where values have their own bits
            alike = tried.ratio if self.value_bits is None else form.ratio(**tried.shape)
            gain = _interpolated(form.gains, alike)
            if gain >= 1:
                continue
            size = form.bytes(layer.value_bytes, **tried.shape)
            # errors do not tell what rounding will make of both
            rivals = () if self.value_bits else (option for option in low_rank if option.size_bytes <= size)
            rival = min(rivals, key=lambda option: option.error, default=None)
            choice = replace(rival.choice if rival else _Choice(), shape=tried.shape)
            error = gain * float(errors[form.rank(alike)])
            sparse.append(ops.Candidate(size_bytes=size, error=error, choice=choice))
        return [*low_rank, *sparse]

    def _asked(self, rows: int, cols: int) -> dict[str, int] | None:
        """The one shape that was asked for, if any."""
        if self.atoms is None or self.nonzeros is None:
            return None
        blocks = self._form(rows, cols).blocks
        return {"blocks": blocks, "atoms": self.atoms, "nonzeros": self.nonzeros, "groups": self.groups}

    def _tried(self, form: "_Form", value_bytes: float) -> "Iterator[_Tried]":
        """The ratios at which a weight is priced, and what has about that size."""
        for ratio in RATIOS:
            atoms, nonzeros = ops.shape_of_size(
                form.rows,
                form.columns,
                size_bytes=form.rows * form.columns / ratio * value_bytes,
                blocks=form.blocks,
                value_bytes=value_bytes,
                density=form.density,
            )
            shape = {"blocks": form.blocks, "atoms": atoms, "nonzeros": nonzeros}
            yield _Tried(ratio=ratio, rank=form.rank(ratio), shape=shape if 1 < nonzeros < atoms else None)

    def _forms(self, spec: WeightSpec) -> Iterator[WeightSpec]:
        for shaping in (MANY, FEW) if self.data_aware and self.sensitivity else (MANY,):
            form = self._form(spec.rows, spec.cols, shaping=shaping)
            for tried in self._tried(form, (self.value_bits or spec.matrices["weight"].bits) / 8):
                if tried.rank:
                    yield spec.as_product(atoms=tried.rank)
                if tried.shape:
                    yield spec.as_product(**tried.shape, transposed=form.turned)

    def stores(self, spec: WeightSpec) -> tuple[WeightSpec, ...]:
        if not (asked := self._asked(spec.rows, spec.cols)):
            return super().stores(spec)
        stored = spec.as_product(**asked, transposed=self._form(spec.rows, spec.cols).turned)
        return (stored if self.counted(stored) < self.counted(spec) else spec,)

    def budget(self, specs: Sequence[WeightSpec]) -> float | None:
        return None if self.atoms else super().budget(specs)

    @property
    def undetermined(self) -> str:
        return "" if self.atoms else super().undetermined

    def _build(self, layer: Layer, choice: Any, seed: int) -> "tuple[DenseSparseFactors, Any]":
        if choice.shape:
            factors = ops.dense_sparse(
                layer.weight,
                **choice.shape,
                transposed=self._form(*layer.weight.shape).turned,
                inputs=layer.inputs,
                outputs=layer.outputs,
                noise=ops.rounding_noise(self.value_bits),
                sweeps=self.sweeps,
                seed=seed,
            )
            if not choice.rank or layer.error(factors) <= choice.error:
                return factors, choice
        low_rank = ops.dense_sparse(
            layer.weight,
            atoms=choice.rank,
            nonzeros=choice.rank,
            inputs=layer.inputs,
            outputs=layer.outputs,
        )
        return low_rank, replace(choice, shape={})

    def _form(self, rows: int, cols: int, *, shaping: Shaping = MANY) -> "_Form":
        """How a weight of this shape is factorized."""
        turned = rows < cols if self.orientation == "auto" else self.orientation == "columns"
        long, wide = (cols, rows) if turned else (rows, cols)
        tall = long >= TALL * wide
        automatic = shaping.blocks if not tall and wide % shaping.blocks == 0 else 1
        tall_gains = shaping.tied if turned and self.data_aware else shaping.tall
        return _Form(
            rows=long,
            columns=wide,
            turned=turned,
            blocks=self.blocks or automatic,
            density=shaping.density,
            gains=tall_gains if tall else shaping.square,
        )


@dataclass(frozen=True, kw_only=True)
class _Form:
    """The factorized matrix: the weight, or its transpose when `turned`."""

    rows: int
    columns: int
    turned: bool
    blocks: int
    density: float
    gains: Gains

    def ratio(self, **shape: int) -> float:
        """Dense bytes over those of dense-sparse factors of this shape, in float32."""
        return 4 * self.rows * self.columns / self.bytes(4, **shape)

    def bytes(self, value_bytes: float, **shape: int) -> int:
        """Those of dense-sparse factors of this shape."""
        return ops.dense_sparse_bytes(self.rows, self.columns, value_bytes=value_bytes, **shape)

    def rank(self, ratio: float) -> int:
        """The rank at which low rank has this ratio."""
        return int(self.rows * self.columns / ratio / (self.rows + self.columns))


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """A dense-sparse shape, and the low rank of no more bytes that takes its place where its error turns out less; without a shape, that
    rank; without a rank (0), that shape."""

    shape: Mapping[str, int] = field(default_factory=dict)
    rank: int = 0
    error: float = 0.0  # of the low rank

    def __str__(self) -> str:
        return str(self.shape or {"rank": self.rank})


@dataclass(frozen=True, kw_only=True)
class _Tried:
    """A ratio of one layer, the rank that has it (0: none), and the dense-sparse shape that does, where one is sparse."""

    ratio: float
    rank: int
    shape: dict[str, int] | None


def _interpolated(gains: Gains, ratio: float) -> float:
    """The gain at `ratio`, linear in log ratio between the measured ones; 1 beyond them: no better than low
    rank."""
    for (below, low), (above, high) in pairwise(gains):
        if below <= ratio <= above:
            return low + (high - low) * log(ratio / below) / log(above / below)
    return 1.0
