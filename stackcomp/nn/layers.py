"""Compressed layers: an affine map and an embedding whose weight W is stored whole, as two factors, or as a sum of both.

Letters: W is `rows` x `cols`, output x input features, also where the layer replaced keeps it transposed
(GPT-2's `Conv1D`). Factored, `W = S D` block by block of columns: S_k (n x b), D_k (b x g), W[:, block k] =
S_k D_k; `coefficients` are the S_k side by side (n x blocks*b), `basis` the D_k below each other (blocks*b x
g). `transposed`: the same of W^T, so n is the input side. A sum is W = M + S D, M the matrix `weight`. t is
tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stackcomp.core.spec import FORMS, MatrixSpec, WeightSpec
from stackcomp.nn.matrix import StoredMatrix


class CompressedLayer(nn.Module, ABC):
    """What the compressed layers share: matrices `weight`, or `basis` and `coefficients`, or all three, as submodules.

    A layer that is not the `owner` of its matrices uses those of another (tied weights): it does not register
    them, so that a state dict holds every tensor once.
    """

    def __init__(self, matrices: Mapping[str, StoredMatrix], *, transposed: bool, owner: bool) -> None:
        super().__init__()
        if set(matrices) not in FORMS:
            raise ValueError(
                f"matrices {sorted(matrices)}: give weight, or basis and coefficients, or all three"
            )
        self.transposed = transposed
        self.owner = owner
        self._borrowed = {} if owner else dict(matrices)
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
        """Number of blocks of a factored weight; 1 for a whole one."""
        if not self.factored:
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
        coefficients = self.matrices["coefficients"].dense().unflatten(1, (self.blocks, -1))
        basis = self.matrices["basis"].dense().unflatten(0, (self.blocks, -1))
        product = torch.bmm(coefficients.transpose(0, 1), basis).transpose(0, 1).flatten(1)
        product = product.t() if self.transposed else product
        return product + self.matrices["weight"].dense() if self.summed else product

    def extra_repr(self) -> str:
        form = ""
        if self.factored:
            form = f", {'transposed ' if self.transposed else ''}factors in {self.blocks} block{'s' * (self.blocks > 1)}"
            form += " beside a matrix" * self.summed
        return f"{self.cols} -> {self.rows}{form}{'' if self.owner else ', shared'}"


class CompressedLinear(CompressedLayer):
    """y = x W^T + b. The result has the dtype of x."""

    def __init__(
        self,
        matrices: Mapping[str, StoredMatrix],
        *,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None = None,
        transposed: bool = False,
        owner: bool = True,
    ) -> None:
        super().__init__(matrices, transposed=transposed, owner=owner)
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
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)

    def _product(self, x: Tensor) -> Tensor:
        matrices = self.matrices
        if not self.factored:
            return matrices["weight"].project(x)
        if self._composes(x):
            return torch.nn.functional.linear(x, self.dense().to(x.dtype))
        if self.transposed:
            y = matrices["basis"].combine(matrices["coefficients"].combine(x).to(x.dtype), self.blocks)
        else:
            y = matrices["coefficients"].project(matrices["basis"].project(x, self.blocks).to(x.dtype))
        return y + matrices["weight"].project(x) if self.summed else y

    def _composes(self, x: Tensor) -> bool:
        """Whether composing W first takes fewer multiplications than going through the factors: a function of
        shapes alone. Rounded inputs always go through the factors.
        """
        if any(matrix.dynamic for matrix in self.matrices.values()):
            return False
        tokens = x.numel() // x.shape[-1]
        n, atoms = self.matrices["coefficients"].shape
        dense = tokens * self.rows * self.cols
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
        owner: bool = True,
    ) -> None:
        super().__init__(matrices, transposed=transposed, owner=owner)
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
        rows = matrices["basis"].combine(matrices["coefficients"].take(ids, self.padding_idx), self.blocks)
        return rows + matrices["weight"].take(ids, self.padding_idx) if self.summed else rows


def build(
    spec: WeightSpec, replaced: nn.Module, matrices: Mapping[str, StoredMatrix], *, owner: bool
) -> CompressedLayer:
    """The layer for one path of a weight, in the place of `replaced`, whose bias or padding it keeps."""
    if isinstance(replaced, nn.Embedding | CompressedEmbedding):
        layer: CompressedLayer = CompressedEmbedding(
            matrices,
            num_embeddings=spec.rows,
            embedding_dim=spec.cols,
            padding_idx=replaced.padding_idx,
            transposed=spec.transposed,
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
            owner=owner,
        )
    return layer.train(replaced.training)
