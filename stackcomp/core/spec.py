"""How one weight is stored: plain values that describe layers without importing torch.

A logical weight W (`rows` x `cols`, output features x input features) is stored as one, two or three *matrices*:

- whole: one matrix `weight`, the layer computes `x W^T`;
- factored: `W = S D` block by block of input columns (`transposed=False`), or `W^T = S D`
  (`transposed=True`): matrices `coefficients` (S, n x blocks*b) and `basis` (D, blocks*b x g), b atoms and g
  columns a block. Low rank is one block whose coefficients are dense; dense-sparse has coefficients with a
  `Fixed` support;
- a sum: all three matrices, W = `weight` + S D (`transposed`: that of the product). Sparse plus low rank is one;
- tiled: W = sum_k A_k (x) B_k, a sum of Kronecker products. `tile` is the shape of every B_k: W is cut into tiles of it,
  and A_k has an entry for each. Row k of `coefficients` holds A_k, row k of `basis` holds B_k, row by row.

Each matrix has a layout (which entries are stored) and a coding (how a value is stored). Layout and coding
are independent: that is what lets passes stack. These specs are what config.json carries, what facts are read
from and what sizes are computed from.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from stackcomp.core.errors import CheckpointError, SettingError
from stackcomp.core.facts import INTEGERS, Fact, Facts, facts

WORD_BITS = 63  # ranks of small supports are packed together into words that fit a signed 64-bit integer


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Every entry is stored: values (rows, cols)."""

    kind: Literal["dense"] = "dense"


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Exactly `nonzeros` entries in every `block` columns of every row: values (rows, cols / block,
    nonzeros).

    Covers dense-sparse supports (s of b atoms) and N:M sparsity (n of m columns). The support is stored by
    enumeration: the rank of the chosen subset among all C(block, nonzeros), several ranks to a word where
    they are small.
    """

    block: int
    nonzeros: int
    kind: Literal["fixed"] = "fixed"

    def __post_init__(self) -> None:
        if not 1 <= self.nonzeros <= self.block:
            raise SettingError(f"nonzeros={self.nonzeros} is out of range: give 1 to block={self.block}")

    @property
    def choices(self) -> int:
        """C(block, nonzeros): the number of supports a block may have."""
        return math.comb(self.block, self.nonzeros)

    @property
    def ranks_per_word(self) -> int:
        """How many ranks are packed into one word: as many as fit 63 bits, at least one."""
        if self.choices == 1:
            return 1
        count = 1
        while self.choices ** (count + 1) <= 1 << WORD_BITS:
            count += 1
        return count

    def support_bytes(self, rows: int, cols: int) -> int:
        """Bytes of the packed support of a rows x cols matrix; 0 when every entry is kept."""
        ranks = rows * (cols // self.block)
        full, rest = divmod(ranks, self.ranks_per_word)
        bits = full * word_bits(self.choices, self.ranks_per_word) + (
            word_bits(self.choices, rest) if rest else 0
        )
        return -(-bits // 8)


@dataclass(frozen=True, kw_only=True)
class Free:
    """Any `nonzeros` entries, in whole blocks of the shape `block`, which divides that of the matrix: values (nonzeros,) in row-major
    order beside a bitmap of a bit a block."""

    nonzeros: int
    block: tuple[int, int] = (1, 1)
    kind: Literal["free"] = "free"

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", tuple(self.block))  # a list, from JSON
        if len(self.block) != 2 or min(self.block) < 1:
            raise SettingError(f"block={self.block} is no shape: give (rows, columns), both at least 1")

    @property
    def area(self) -> int:
        """Entries of a block."""
        return math.prod(self.block)

    def support_bytes(self, rows: int, cols: int) -> int:
        """Bytes of the bitmap."""
        return -(-rows * cols // (8 * self.area))


Layout = Dense | Fixed | Free
_LAYOUTS: dict[str, type[Dense] | type[Fixed] | type[Free]] = {"dense": Dense, "fixed": Fixed, "free": Free}

TRITS = 5  # ternary values in a byte: 3^5 = 243

Coding = Literal[
    "float32",
    "bfloat16",
    "float16",
    "int8",
    "int4",
    "int3",
    "int2",
    "nf4",
    "ternary",
    "binary",
    "codebook8",
    "codebook7",
    "codebook6",
    "codebook5",
    "codebook4",
    "codebook3",
    "codebook2",
]
CODEBOOKS: dict[int, Coding] = {  # codings by shared values, by their bits
    8: "codebook8",
    7: "codebook7",
    6: "codebook6",
    5: "codebook5",
    4: "codebook4",
    3: "codebook3",
    2: "codebook2",
}
VALUE_BITS: dict[str, float] = {
    "float32": 32,
    "bfloat16": 16,
    "float16": 16,
    "int8": 8,
    "int4": 4,
    "int3": 3,
    "int2": 2,
    "nf4": 4,
    "ternary": 8 / TRITS,
    "binary": 1,
    **{coding: bits for bits, coding in CODEBOOKS.items()},
}
ROUNDED: dict[float, Coding] = {  # codings on evenly spaced levels, by their bits
    8: "int8",
    4: "int4",
    3: "int3",
    2: "int2",
    8 / TRITS: "ternary",
    1: "binary",
}


def packed_bytes(count: int, bits: float) -> int:
    """Bytes of `count` values of `bits` bits side by side; of ternary ones, `TRITS` in every byte."""
    return -(-count // TRITS) if bits == VALUE_BITS["ternary"] else -(-count * int(bits) // 8)


def word_bits(choices: int, ranks: int) -> int:
    """Bits of a word that holds `ranks` ranks, each below `choices`."""
    return (choices**ranks - 1).bit_length()


@dataclass(frozen=True, kw_only=True)
class MatrixSpec:
    """One stored matrix: rows x cols, its layout, its coding.

    `scale_axis` tells along which axis an int8 matrix has its scales (0: one a row, 1: one a column);
    `scale_coding` is the scales' own dtype; `dynamic` that the inputs of its product are rounded to int8 as
    they come. Values of fewer bits have a scale for every `group` stored values of a line (see `lines`), the
    last group of which may be shorter; their codes are packed without a gap. Codes of a codebook are packed too:
    its 2^bits shared values take the place of scales, and are those of one line (group=1) or of the matrix (None).
    """

    rows: int
    cols: int
    layout: Layout = field(default_factory=Dense)
    coding: Coding = "float32"
    scale_axis: Literal[0, 1] = 0
    scale_coding: Coding = "float32"
    dynamic: bool = False
    group: int | None = None

    def __post_init__(self) -> None:
        if self.clustered:
            fits = self.group in (None, 1)
        else:
            fits = self.group is not None and self.group >= 1 if self.packed else self.group is None
        if not fits:
            raise SettingError(
                f"group={self.group!r} does not fit coding={self.coding!r}: integers of fewer than 8 bits take a whole "
                "number from 1, a codebook 1 or none, all others none"
            )
        if self.dynamic and self.coding != "int8":
            raise SettingError(
                f"dynamic=True does not fit coding={self.coding!r}: inputs are rounded for int8 values only"
            )
        if isinstance(self.layout, Fixed) and self.cols % self.layout.block:
            raise SettingError(
                f"block={self.layout.block} does not divide the {self.cols} columns: give a divisor"
            )
        if isinstance(self.layout, Free) and (
            self.rows % self.layout.block[0] or self.cols % self.layout.block[1]
        ):
            raise SettingError(
                f"block={self.layout.block} does not divide {self.rows} x {self.cols}: give divisors"
            )

    @property
    def lines(self) -> tuple[int, int]:
        """Number and length of the lines of stored values that are cut into groups: the rows; of a `Free`
        layout, whose rows differ, all values are one line.
        """
        match self.layout:
            case Dense():
                return self.rows, self.cols
            case Fixed(block=block, nonzeros=nonzeros):
                return self.rows, self.cols // block * nonzeros
            case Free(nonzeros=nonzeros):
                return 1, nonzeros

    @property
    def count(self) -> int:
        """Number of stored values."""
        return math.prod(self.lines)

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of the stored values tensor: of bytes, where several values share one."""
        if self.packed:
            return (self.value_bytes,)
        match self.layout:
            case Dense():
                return (self.rows, self.cols)
            case Fixed(block=block, nonzeros=nonzeros):
                return (self.rows, self.cols // block, nonzeros)
            case Free(nonzeros=nonzeros):
                return (nonzeros,)

    @property
    def bits(self) -> float:
        """Bits of a value."""
        return VALUE_BITS[self.coding]

    @property
    def clustered(self) -> bool:
        """Whether values are codes of a codebook."""
        return self.coding in CODEBOOKS.values()

    @property
    def books(self) -> int:
        """Number of codebooks, each of which serves as many stored values: 0 where values are no codes of one."""
        return (self.lines[0] if self.group else 1) if self.clustered else 0

    @property
    def integers(self) -> bool:
        """Whether values are codes: integers with scales, or of a codebook."""
        return self.clustered or self.coding in INTEGERS

    @property
    def packed(self) -> bool:
        """Whether values are codes packed side by side: integers of fewer than 8 bits, with scales for groups of them, or codes of
        a codebook."""
        return self.integers and self.coding != "int8"

    @property
    def value_bytes(self) -> int:
        """Bytes of the values."""
        return packed_bytes(self.count, self.bits)

    @property
    def index_bytes(self) -> int:
        """Bytes of the packed support."""
        return 0 if isinstance(self.layout, Dense) else self.layout.support_bytes(self.rows, self.cols)

    @property
    def scale_count(self) -> int:
        """Number of scales, or of shared values: 0 for floating-point values."""
        if self.clustered:
            return self.books << int(self.bits)
        if self.group is not None:
            lines, length = self.lines
            return lines * -(-length // self.group)
        return (self.rows, self.cols)[self.scale_axis] if self.integers else 0

    @property
    def total_bytes(self) -> int:
        """Bytes of values, indices and scales."""
        scale_bytes = packed_bytes(self.scale_count, VALUE_BITS[self.scale_coding])
        return self.value_bytes + self.index_bytes + scale_bytes

    @property
    def facts(self) -> Facts:
        """The facts of this matrix, but for `factor`, which its weight knows."""
        words = {Fact.DENSE if isinstance(self.layout, Dense) else Fact.SPARSE}
        if self.clustered:
            words |= {Fact.CODEBOOK}
        else:
            words |= {Fact(self.coding)} if self.integers else {Fact.FLOAT, Fact.TRAINABLE}
        return frozenset(words | ({Fact.DYNAMIC} if self.dynamic else set()))


FORMS = (
    {"weight"},
    {"basis", "coefficients"},
    {"weight", "basis", "coefficients"},
)  # parts that make a weight


@dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """One compressed logical weight: its kind, its matrices and every module path that uses it.

    `kind` is what the first path is: `linear` or `embedding` (a tied output head is a second path of an
    embedding). branched: the weight is a sum, of a matrix that all paths share and of a product that each has for itself: `coefficients`
    holds their first factors side by side, `basis` their second ones below each other, in the order of the paths.
    """

    id: str
    kind: Literal["linear", "embedding"]
    rows: int
    cols: int
    paths: tuple[str, ...]
    matrices: Mapping[str, MatrixSpec]
    transposed: bool = False
    tile: tuple[int, int] | None = None
    branched: bool = False

    @property
    def factored(self) -> bool:
        """Whether the weight is a product of two matrices, or such a product plus a third; a sum of Kronecker products counts as one."""
        return "basis" in self.matrices

    @property
    def plain(self) -> bool:
        """Whether it is stored as the model came: whole, and in floating point."""
        return (
            all(matrix.facts >= {Fact.DENSE, Fact.FLOAT} for matrix in self.matrices.values())
            and not self.factored
        )

    @property
    def blocks(self) -> int:
        """Number of blocks of a product; 1 of a whole weight, and of a sum of Kronecker products."""
        side = self.rows if self.transposed else self.cols
        return side // self.matrices["basis"].cols if self.factored and not self.tile else 1

    @property
    def dense_count(self) -> int:
        """Entries of the weight when it is dense."""
        return self.rows * self.cols

    @property
    def total_bytes(self) -> int:
        """Bytes of all its matrices."""
        return sum(matrix.total_bytes for matrix in self.matrices.values())

    def parts(self) -> "dict[str, Facts]":
        """The facts of every part."""
        more = {Fact.KRONECKER: self.tile, Fact.BRANCH: self.branched}
        factor = facts(Fact.FACTOR, *(fact for fact, there in more.items() if there))
        return {
            name: matrix.facts if name == "weight" else matrix.facts | factor
            for name, matrix in self.matrices.items()
        }

    def reshaped(self, id_: str, paths: tuple[str, ...], rows: int, cols: int) -> "WeightSpec":
        """The weight under other names, and with another shape where it is whole."""
        if self.branched:
            return self._with_branches(id_, paths)
        renamed = replace(self, id=id_, paths=paths, rows=rows, cols=cols)
        same = (rows, cols) == (self.rows, self.cols)
        return (
            renamed
            if same
            else renamed.with_matrix("weight", replace(self.matrices["weight"], rows=rows, cols=cols))
        )

    def _with_branches(self, id_: str, paths: tuple[str, ...]) -> "WeightSpec":
        """A branched weight with a product for each of `paths`; one path needs none beside its matrix."""
        if len(paths) == 1:
            whole = {"weight": self.matrices["weight"]}
            return replace(self, id=id_, paths=paths, matrices=whole, branched=False)
        basis, coefficients = self.matrices["basis"], self.matrices["coefficients"]
        atoms = basis.rows // len(self.paths) * len(paths)
        matrices = {
            **self.matrices,
            "basis": replace(basis, rows=atoms),
            "coefficients": replace(coefficients, cols=atoms),
        }
        return replace(self, id=id_, paths=paths, matrices=matrices)

    def as_branched(self, *, rank: int) -> "WeightSpec":
        """A weight that is whole as the sum of itself and of a product of this rank for each of its paths."""
        coding, atoms = self.matrices["weight"].coding, rank * len(self.paths)
        matrices = {
            **self.matrices,
            "basis": MatrixSpec(rows=atoms, cols=self.cols, coding=coding),
            "coefficients": MatrixSpec(rows=self.rows, cols=atoms, coding=coding),
        }
        return replace(self, matrices=matrices, branched=True)

    def as_product(
        self,
        *,
        atoms: int,
        nonzeros: int | None = None,
        groups: int = 1,
        blocks: int = 1,
        transposed: bool = False,
    ) -> "WeightSpec":
        """A weight that is whole as a product of a basis with `atoms` atoms a block and of coefficients, `nonzeros` of them a row and
        group of atoms; all of them where nothing is said."""
        n, m = (self.cols, self.rows) if transposed else (self.rows, self.cols)
        coding = self.matrices["weight"].coding
        group = atoms // groups
        kept = group if nonzeros is None else nonzeros
        layout = Fixed(block=group, nonzeros=kept) if kept < group else Dense()
        matrices = {
            "basis": MatrixSpec(rows=blocks * atoms, cols=m // blocks, coding=coding),
            "coefficients": MatrixSpec(rows=n, cols=blocks * atoms, layout=layout, coding=coding),
        }
        return replace(self, matrices=matrices, transposed=transposed)

    def as_kronecker(self, *, terms: int, tile: tuple[int, int]) -> "WeightSpec":
        """A weight that is whole as a sum of so many Kronecker products, the second factor of each of the shape `tile`, which divides
        that of the weight."""
        coding, area = self.matrices["weight"].coding, math.prod(tile)
        matrices = {
            "basis": MatrixSpec(rows=terms, cols=area, coding=coding),
            "coefficients": MatrixSpec(rows=terms, cols=self.dense_count // area, coding=coding),
        }
        return replace(self, matrices=matrices, tile=tile)

    def pruned(
        self, kept: Mapping[str, int] | tuple[int, int], block: tuple[int, int] = (1, 1)
    ) -> "WeightSpec":
        """The weight with so many entries of each dense matrix, by part and in whole blocks, or n of every m columns of a row."""

        def layout(part: str) -> Layout:
            return (
                Fixed(nonzeros=kept[0], block=kept[1])
                if isinstance(kept, tuple)
                else Free(nonzeros=kept[part], block=block)
            )

        sparse = {
            part: replace(matrix, layout=layout(part)) if isinstance(matrix.layout, Dense) else matrix
            for part, matrix in self.matrices.items()
        }
        return replace(self, matrices=sparse)

    def rounded(self, coding: Coding, group: int | None = None, *, dynamic: bool = False) -> "WeightSpec":
        """The weight with every floating-point matrix as codes: of int8 with one scale a row, or a column where a product sums over the
        rows (both factors of a transposed product); all others with scales, or shared values, of 16 bits.

        Raises SettingError for a group or rounded inputs that do not go with the coding.
        """

        def codes(part: str, matrix: MatrixSpec) -> MatrixSpec:
            short: Coding = "bfloat16" if matrix.coding == "bfloat16" else "float16"
            return replace(
                matrix,
                coding=coding,
                group=group,
                dynamic=dynamic,
                scale_axis=1 if coding == "int8" and self.transposed and part != "weight" else 0,
                scale_coding=matrix.coding if coding == "int8" else short,
            )

        return replace(
            self,
            matrices={
                part: matrix if matrix.integers else codes(part, matrix)
                for part, matrix in self.matrices.items()
            },
        )

    def with_matrix(self, name: str, matrix: MatrixSpec) -> "WeightSpec":
        """The same weight with one matrix replaced."""
        return replace(self, matrices={**self.matrices, name: matrix})

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` reads it back."""
        return {
            "kind": self.kind,
            "shape": [self.rows, self.cols],
            "paths": list(self.paths),
            "transposed": self.transposed,
            **({"tile": list(self.tile)} if self.tile else {}),
            **({"branched": True} if self.branched else {}),
            "matrices": {name: _matrix_to_json(matrix) for name, matrix in self.matrices.items()},
        }

    @staticmethod
    def from_json(id_: str, data: Mapping[str, Any]) -> "WeightSpec":
        """The weight that `to_json` wrote; raises CheckpointError on anything else."""
        try:
            return WeightSpec(
                id=id_,
                kind=data["kind"],
                rows=data["shape"][0],
                cols=data["shape"][1],
                paths=tuple(data["paths"]),
                transposed=data["transposed"],
                tile=(data["tile"][0], data["tile"][1]) if "tile" in data else None,
                branched=_flag(data.get("branched", False)),
                matrices={name: _matrix_from_json(matrix) for name, matrix in data["matrices"].items()},
            )
        except (KeyError, TypeError, IndexError, SettingError) as error:
            raise CheckpointError(
                f"{id_}: its description in config.json is damaged ({error!r}); save it again"
            ) from error


def _flag(value: Any) -> bool:
    """A JSON truth value; raises TypeError for anything that is only taken for one."""
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def _matrix_to_json(matrix: MatrixSpec) -> dict[str, Any]:
    data = {
        name: getattr(matrix, name)
        for name in ("rows", "cols", "coding", "scale_axis", "scale_coding", "dynamic", "group")
        if name != "group" or matrix.packed
    }
    return {**data, "layout": dict(vars(matrix.layout))}


def _matrix_from_json(data: Mapping[str, Any]) -> MatrixSpec:
    layout = dict(data["layout"])
    rest = {name: value for name, value in data.items() if name != "layout"}
    return MatrixSpec(**rest, layout=_LAYOUTS[layout.pop("kind")](**layout))
