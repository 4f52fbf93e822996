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

How a matrix is stored is said by its own spec (`core.matrices`). These specs are what config.json carries, what facts are read from and
what sizes are computed from.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from stackcomp.core.errors import CheckpointError, SettingError
from stackcomp.core.facts import Fact, Facts, facts
from stackcomp.core.matrices import Coding, Dense, Fixed, Free, Layout, MatrixSpec

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

    def rounded(
        self,
        coding: Coding,
        group: int | None = None,
        *,
        dynamic: bool = False,
        outliers: float | None = None,
    ) -> "WeightSpec":
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
                outliers=outliers,
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
            "matrices": {name: matrix.to_json() for name, matrix in self.matrices.items()},
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
                matrices={name: MatrixSpec.from_json(matrix) for name, matrix in data["matrices"].items()},
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
