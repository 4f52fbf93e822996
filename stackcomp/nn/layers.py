"""Compressed layers: an affine map and an embedding whose weight W is stored whole, as two factors, or as a sum of both.

Letters: W is `rows` x `cols`, output x input features, also where the layer replaced keeps it transposed
(GPT-2's `Conv1D`). Factored, `W = S D` block by block of columns: S_k (n x b), D_k (b x g), W[:, block k] =
S_k D_k; `coefficients` are the S_k side by side (n x blocks*b), `basis` the D_k below each other (blocks*b x
g). `transposed`: the same of W^T, so n is the input side. A sum is W = M + S D, M the matrix `weight`. Tiled,
W = sum_k A_k (x) B_k: A_k (p x q) is row k of `coefficients`, B_k (c x d, the `tile`) row k of `basis`, W is pc x qd.
A sum may be branched, in a weight that several layers share: the layer at place i of c has M, which all have, and a product of its own, the
i-th c-th part of `coefficients` (by columns) and of `basis` (by rows). t is tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stackcomp.core.matrices import MatrixSpec
from stackcomp.core.spec import FORMS, WeightSpec
from stackcomp.nn.matrix import StoredMatrix


class CompressedLayer(nn.Module, ABC):
    """What the compressed layers share: matrices `weight`, or `basis` and `coefficients`, or all three, as submodules.

    A layer that is not the `owner` of its matrices uses those of another (tied weights): it does not register
    them, so that a state dict holds every tensor once.
    """

    def __init__(
        self,
        matrices: Mapping[str, StoredMatrix],
        *,
        transposed: bool,
        tile: tuple[int, int] | None,
        branch: tuple[int, int] | None = None,
        owner: bool,
    ) -> None:
        super().__init__()
        if set(matrices) not in FORMS:
            raise ValueError(
                f"matrices {sorted(matrices)}: give weight, or basis and coefficients, or all three"
            )
        self.transposed = transposed
        self.tile = tile
        self.branch = branch
        self.owner = owner
        first = {"weight": matrices["weight"]} if "weight" in matrices else {}  # without it, it is computed
        matrices = first | dict(matrices)
        self._borrowed = {} if owner else matrices
        if owner:
            for name, matrix in matrices.items():
                self.add_module(name, matrix)

    def __getattr__(self, name: str) -> Any:
        """`weight`, where it is no submodule: what code written for the plain layer asks for (its shape,
        dtype, device).
        """
        if name != "weight" or not self.matrices:
            return super().__getattr__(name)
        if "weight" in self.matrices:
            return self.matrices["weight"]
        weight = self.dense().detach()
        # transformers would fill a fresh tensor with random numbers, in vain
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight

    @property
    def matrices(self) -> dict[str, StoredMatrix]:
        """The matrices by part."""
        return dict(self._modules) if self.owner else self._borrowed  # type: ignore[arg-type]

    @property
    def specs(self) -> dict[str, MatrixSpec]:
        """How each matrix is stored now."""
        return {name: matrix.spec for name, matrix in self.matrices.items()}

    @property
    def factored(self) -> bool:
        """Whether W is a product, or a product plus a matrix."""
        return "basis" in self.matrices

    @property
    def summed(self) -> bool:
        """Whether W is a product plus a matrix."""
        return self.factored and "weight" in self.matrices

    @property
    def blocks(self) -> int:
        """Number of blocks of a factored weight; 1 for a whole one, and for a tiled one."""
        if not self.factored or self.tile:
            return 1
        return self._side[1] // self.matrices["basis"].shape[1]

    @property
    def _side(self) -> tuple[int, int]:
        """Shape of the product S D: of W, or of W^T."""
        return (self.cols, self.rows) if self.transposed else (self.rows, self.cols)

    @property
    @abstractmethod
    def rows(self) -> int:
        """Output features, or the size of the vocabulary."""

    @property
    @abstractmethod
    def cols(self) -> int:
        """Input features, or the width of an embedding."""

    def dense(self) -> Float[Tensor, "rows cols"]:
        """W; the gradient reaches what is stored."""
        if not self.factored:
            return self.matrices["weight"].dense()
        if self.tile:
            return torch.einsum("kpq,kcd->pcqd", *self._sides()).reshape(self.rows, self.cols)
        coefficients, basis = self.matrices["coefficients"].dense(), self.matrices["basis"].dense()
        if self.branch:
            place, count = self.branch
            coefficients, basis = coefficients.chunk(count, 1)[place], basis.chunk(count, 0)[place]
        coefficients = coefficients.unflatten(1, (self.blocks, -1))
        basis = basis.unflatten(0, (self.blocks, -1))
        product = torch.bmm(coefficients.transpose(0, 1), basis).transpose(0, 1).flatten(1)
        product = product.t() if self.transposed else product
        return product + self.matrices["weight"].dense() if self.summed else product

    def _sides(self) -> tuple[Float[Tensor, "k p q"], Float[Tensor, "k c d"]]:
        """All A_k and all B_k of a tiled weight."""
        assert self.tile is not None
        a, b = (self.matrices[part].dense() for part in ("coefficients", "basis"))
        return a.unflatten(1, (self.rows // self.tile[0], -1)), b.unflatten(1, self.tile)

    def extra_repr(self) -> str:
        form = ""
        if self.tile:
            form = f", a sum of {self.matrices['basis'].shape[0]} Kronecker products with tiles of {self.tile[0]}x{self.tile[1]}"
        elif self.factored:
            form = f", {'transposed ' if self.transposed else ''}factors in {self.blocks} block{'s' * (self.blocks > 1)}"
            form += " beside a matrix" * self.summed
            form += f", {self.branch[0] + 1} of {self.branch[1]}" if self.branch else ""
        return f"{self.cols} -> {self.rows}{form}{'' if self.owner else ', shared'}"


class CompressedLinear(CompressedLayer):
    """y = x W^T + b. The result has the dtype of x, or under autocast that of its products."""

    def __init__(
        self,
        matrices: Mapping[str, StoredMatrix],
        *,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None = None,
        transposed: bool = False,
        tile: tuple[int, int] | None = None,
        branch: tuple[int, int] | None = None,
        owner: bool = True,
    ) -> None:
        super().__init__(matrices, transposed=transposed, tile=tile, branch=branch, owner=owner)
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("bias", bias)

    @property
    def rows(self) -> int:
        return self.out_features

    @property
    def cols(self) -> int:
        return self.in_features

    def forward(self, x: Float[Tensor, "*t cols"]) -> Float[Tensor, "*t rows"]:
        y = self._product(x)
        if torch.is_autocast_enabled(x.device.type):  # the dtype of its products, as that of a plain layer
            return y if self.bias is None else y + self.bias.to(y.dtype)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def _product(self, x: Tensor) -> Tensor:
        matrices = self.matrices
        if not self.factored:
            return matrices["weight"].project(x)
        if self._composes(x):
            return torch.nn.functional.linear(x, self.dense().to(x.dtype))
        if self.tile:
            return self._tiled(x)
        if self.transposed:
            y = matrices["basis"].combine(matrices["coefficients"].combine(x).to(x.dtype), self.blocks)
        else:
            between = self._own(matrices["basis"].project(x, self.blocks).to(x.dtype))
            y = matrices["coefficients"].project(between)
        return y + matrices["weight"].project(x) if self.summed else y

    def _own(self, between: Float[Tensor, "*t atoms"]) -> Float[Tensor, "*t atoms"]:
        """What passes between two factors, less what is of other branches."""
        if self.branch is None:
            return between
        place, count = self.branch
        size = between.shape[-1] // count
        own = between.narrow(-1, place * size, size)
        return torch.nn.functional.pad(own, (place * size, (count - 1 - place) * size))

    def _tiled(self, x: Tensor) -> Tensor:
        """The sum of A_k X B_k^T, X (q x d) the inputs of a token, in the cheaper order."""
        assert self.tile is not None
        a, b = (side.to(x.dtype) for side in self._sides())
        pieces = x.unflatten(-1, (-1, self.tile[1]))
        b_first, a_first = self._orders
        if b_first <= a_first:
            y = torch.einsum("kpq,...qkc->...pc", a, torch.einsum("...qd,kcd->...qkc", pieces, b))
        else:
            y = torch.einsum("...kpd,kcd->...pc", torch.einsum("kpq,...qd->...kpd", a, pieces), b)
        return y.flatten(-2)

    @property
    def _orders(self) -> tuple[int, int]:
        """Multiplications of A_k X B_k^T: with X B_k^T first, and with A_k X first."""
        assert self.tile is not None
        c, d = self.tile
        entries = self.matrices["coefficients"].shape[1]
        return c * (self.cols + entries), d * (self.rows + entries)

    def _composes(self, x: Tensor) -> bool:
        """Whether composing W first takes fewer multiplications than going through the factors: a function of
        shapes alone. Rounded inputs always go through the factors.
        """
        if any(matrix.dynamic for matrix in self.matrices.values()):
            return False
        tokens = x.numel() // x.shape[-1]
        dense = tokens * self.rows * self.cols
        if self.tile:
            terms = self.matrices["basis"].shape[0]
            return dense + terms * self.rows * self.cols < tokens * terms * min(self._orders)
        n, atoms = self.matrices["coefficients"].shape
        through = tokens * (atoms * self.matrices["basis"].shape[1] + n * atoms) + dense * self.summed
        whole = dense + n * atoms * self.matrices["basis"].shape[1]
        return whole < through


class CompressedEmbedding(CompressedLayer):
    """Rows of W by id; the row of `padding_idx` passes no gradient."""

    def __init__(
        self,
        matrices: Mapping[str, StoredMatrix],
        *,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        transposed: bool = False,
        tile: tuple[int, int] | None = None,
        owner: bool = True,
    ) -> None:
        super().__init__(matrices, transposed=transposed, tile=tile, owner=owner)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx

    @property
    def rows(self) -> int:
        return self.num_embeddings

    @property
    def cols(self) -> int:
        return self.embedding_dim

    def forward(self, ids: Int[Tensor, "*t"]) -> Float[Tensor, "*t cols"]:
        matrices = self.matrices
        if not self.factored:
            return matrices["weight"].take(ids, self.padding_idx)
        if self.transposed:
            return nn.functional.embedding(ids, self.dense(), self.padding_idx)
        if self.tile:
            a, b = self._sides()
            c = self.tile[0]
            rows = torch.einsum("k...q,k...d->...qd", a[:, ids // c], b[:, ids % c]).flatten(-2)
            padding = ids.unsqueeze(-1) == (-1 if self.padding_idx is None else self.padding_idx)
            return torch.where(padding, rows.detach(), rows)
        rows = matrices["basis"].combine(matrices["coefficients"].take(ids, self.padding_idx), self.blocks)
        return rows + matrices["weight"].take(ids, self.padding_idx) if self.summed else rows


def build(
    spec: WeightSpec, replaced: nn.Module, matrices: Mapping[str, StoredMatrix], *, place: int, owner: bool
) -> CompressedLayer:
    """The layer for the path of a weight at `place`, in the place of `replaced`, whose bias or padding it keeps."""
    if isinstance(replaced, nn.Embedding | CompressedEmbedding):
        layer: CompressedLayer = CompressedEmbedding(
            matrices,
            num_embeddings=spec.rows,
            embedding_dim=spec.cols,
            padding_idx=replaced.padding_idx,
            transposed=spec.transposed,
            tile=spec.tile,
            owner=owner,
        )
    else:
        bias = replaced.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        layer = CompressedLinear(
            matrices,
            in_features=spec.cols,
            out_features=spec.rows,
            bias=bias,
            transposed=spec.transposed,
            tile=spec.tile,
            branch=(place, len(spec.paths)) if spec.branched else None,
            owner=owner,
        )
    return layer.train(replaced.training)
