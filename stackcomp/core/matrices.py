"""How one matrix is stored: which of its entries (layout) and how a value (coding), and how many bytes that takes.

Layout and coding are independent: that is what lets passes stack. Plain values, without torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from stackcomp.core.errors import SettingError
from stackcomp.core.facts import INTEGERS, Fact, Facts

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
    they come, but for those of at least the magnitude `outliers`. Values of fewer bits have a scale for every `group`
    stored values of a line (see `lines`), the last group of which may be shorter; their codes are packed without a gap.
    Codes of a codebook are packed too: its 2^bits shared values take the place of scales, and are those of one line
    (group=1) or of the matrix (None).
    """

    rows: int
    cols: int
    layout: Layout = field(default_factory=Dense)
    coding: Coding = "float32"
    scale_axis: Literal[0, 1] = 0
    scale_coding: Coding = "float32"
    dynamic: bool = False
    outliers: float | None = None
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
        if self.outliers is not None and not self.dynamic:
            raise SettingError(
                f"outliers={self.outliers!r} does not fit dynamic=False: give dynamic=True, or leave it out"
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

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` reads it back."""
        data = {
            name: getattr(self, name)
            for name in (
                "rows",
                "cols",
                "coding",
                "scale_axis",
                "scale_coding",
                "dynamic",
                "outliers",
                "group",
            )
            if (name != "group" or self.packed) and (name != "outliers" or self.outliers is not None)
        }
        return {**data, "layout": dict(vars(self.layout))}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "MatrixSpec":
        """The matrix that `to_json` wrote; raises KeyError, TypeError or SettingError on anything else."""
        layout = dict(data["layout"])
        rest = {name: value for name, value in data.items() if name != "layout"}
        return MatrixSpec(**rest, layout=_LAYOUTS[layout.pop("kind")](**layout))
