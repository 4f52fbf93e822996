"""Changing how the weights of a model are stored, in place.

Every function takes the id of a logical weight and changes all modules that use it; dtype, device, biases, padding and what trains are
kept. Afterwards `model.save_pretrained` writes the new form and `from_pretrained`
reads it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from stackcomp.core.matrices import CODEBOOKS, Coding, Dense, Fixed, Free
from stackcomp.core.settings import one_of
from stackcomp.nn.matrix import StoredMatrix
from stackcomp.nn.products import products
from stackcomp.nn.quantizer import attach
from stackcomp.nn.rounded import RoundedMatrix
from stackcomp.nn.storing import encoded, store
from stackcomp.nn.tree import WeightHandle, absolute, put, weights
from stackcomp.ops import low_bit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mask = Callable[[Tensor], Tensor]
Prune = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def factorize(
    model: "PreTrainedModel",
    id_: str,
    *,
    basis: Float[Tensor, "atoms g"],
    values: Float[Tensor, "..."],
    support: Int64[Tensor, "n groups s"] | None = None,
    transposed: bool = False,
) -> None:
    """Store W = S D (`transposed`: W^T = S D) with the basis D (blocks*b x g) and coefficients S.

    With a `support`, S has `values` (n, blocks*q, s) at the ascending columns `support` of each of the q groups of a
    block (q is mostly 1); without one S is dense, and `values` are (n, blocks*b): low rank. Raises ValueError when the shapes do not
    make W.
    """
    handle = weights(model)[id_]
    rows, cols = handle.spec.rows, handle.spec.cols
    n, m = (cols, rows) if transposed else (rows, cols)
    atoms, width = basis.shape
    blocks = m // width
    if m % width or atoms % blocks or (support is None and values.shape != (n, atoms)):
        raise ValueError(
            f"{id_}: basis {tuple(basis.shape)} and values {tuple(values.shape)} do not make {n} x {m}"
        )
    like = handle.dense()
    if support is None:
        coefficients = store(values.to(like), Dense())
    else:
        spans = support.shape[1]
        if support.shape != values.shape or len(support) != n or spans % blocks or atoms % spans:
            raise ValueError(
                f"{id_}: support {tuple(support.shape)} and values {tuple(values.shape)} do not make {n} x {blocks} x s"
            )
        group = atoms // spans
        layout = Fixed(block=group, nonzeros=support.shape[2])
        spread = torch.zeros(n, spans, group, dtype=like.dtype, device=like.device)
        mask = torch.zeros(n, spans, group, dtype=torch.bool, device=like.device)
        spread.scatter_(-1, support.to(like.device), values.detach().to(like))
        mask.scatter_(-1, support.to(like.device), True)
        coefficients = store(spread.flatten(1), layout, mask.flatten(1))
    matrices = {"basis": store(basis.to(like), Dense()), "coefficients": coefficients}
    for matrix in matrices.values():
        matrix.requires_grad_(handle.requires_grad)
    store_as(model, handle, matrices, transposed=transposed)


def tile(
    model: "PreTrainedModel",
    id_: str,
    *,
    basis: Float[Tensor, "k c d"],
    coefficients: Float[Tensor, "k p q"],
) -> None:
    """Store a plain W = sum_k A_k (x) B_k, the A_k in `coefficients` and the B_k in `basis`. Raises ValueError when the shapes do not make
    W."""
    handle = weights(model)[id_]
    spec, (p, q), (c, d) = handle.spec, coefficients.shape[1:], basis.shape[1:]
    if len(basis) != len(coefficients) or (p * c, q * d) != (spec.rows, spec.cols):
        raise ValueError(
            f"{id_}: basis {tuple(basis.shape)} and coefficients {tuple(coefficients.shape)} do not make {spec.rows} x {spec.cols}"
        )
    like = handle.dense()
    sides = {"basis": basis, "coefficients": coefficients}
    matrices = {part: store(side.flatten(1).to(like), Dense()) for part, side in sides.items()}
    for matrix in matrices.values():
        matrix.requires_grad_(handle.requires_grad)
    store_as(model, replace(handle, spec=replace(spec, tile=(c, d))), matrices, transposed=False)


def split(
    model: "PreTrainedModel",
    id_: str,
    *,
    rest: Float[Tensor, "rows cols"],
    kept: Bool[Tensor, "rows cols"],
    basis: Float[Tensor, "r cols"],
    coefficients: Float[Tensor, "rows r"],
) -> None:
    """Store a plain W = M + S D: of M = `rest` the entries that are `kept`, beside a bitmap, and the dense factors D = `basis` and S =
    `coefficients`."""
    handle = weights(model)[id_]
    (whole,) = handle.matrices.values()
    matrices = {
        "weight": _sparse(whole, rest.to(whole.dtype), kept, None),
        "basis": store(basis.to(whole.dtype), Dense()).requires_grad_(handle.requires_grad),
        "coefficients": store(coefficients.to(whole.dtype), Dense()).requires_grad_(handle.requires_grad),
    }
    store_as(model, handle, matrices, transposed=False)


def branch(
    model: "PreTrainedModel",
    id_: str,
    products: Sequence[tuple[Float[Tensor, "rows r"], Float[Tensor, "r cols"]]],
) -> None:
    """Store a plain W that several layers share as M = W, which they go on sharing, and for the i-th of them S_i D_i, `products[i]`, beside
    it: that layer then has M + S_i D_i."""
    handle = weights(model)[id_]
    (whole,) = handle.matrices.values()
    sides = {
        "basis": torch.cat([basis for _, basis in products]),
        "coefficients": torch.cat([coefficients for coefficients, _ in products], dim=1),
    }
    matrices = {"weight": whole} | {
        part: store(side.to(whole.dtype), Dense()).requires_grad_(handle.requires_grad)
        for part, side in sides.items()
    }
    branched = replace(handle, spec=replace(handle.spec, branched=True))
    store_as(model, branched, matrices, transposed=False)


def sparsify(
    model: "PreTrainedModel",
    id_: str,
    mask: Mask,
    *,
    groups: tuple[int, int] | None = None,
    block: tuple[int, int] = (1, 1),
) -> None:
    """Keep of every dense matrix of a weight the entries that `mask(matrix)`, a boolean of its shape, names;
    the rest is zero from now on.

    groups: (n, m) stores them as n of every m columns of a row, which the mask must then keep; else any
    entries, in whole blocks of the shape `block`, beside a bitmap of a bit a block.
    """
    handle = weights(model)[id_]
    matrices = dict(handle.matrices)
    for part, matrix in matrices.items():
        if isinstance(matrix.spec.layout, Dense) and not matrix.spec.integers:
            values = matrix.dense().detach()
            matrices[part] = _sparse(matrix, values, mask(values), groups, block)
    store_as(model, handle, matrices, transposed=handle.spec.transposed)


def prune(
    model: "PreTrainedModel",
    id_: str,
    choose: Prune,
    *,
    moment: Float[Tensor, "m m"],
    groups: tuple[int, int] | None = None,
) -> None:
    """The same with a view to the inputs of a linear weight, of second moment `moment`.

    `choose(weight, moment)` gives new values of a weight (n x m) and a boolean of its shape, which of them to keep; it is asked for
    every product that the weight is made of, with the moment of what flows into it.
    """
    handle = weights(model)[id_]
    matrices = dict(handle.matrices)
    for product in products(handle.spec, matrices, moment):
        parts = product.split(product.matrix.dense().detach().float())
        found = [choose(part, inputs) for part, inputs in zip(parts, product.moments, strict=True)]
        values, kept = (product.join(torch.stack(each)) for each in zip(*found, strict=True))
        matrices[product.part] = _sparse(product.matrix, values.to(product.matrix.dtype), kept, groups)
    store_as(model, handle, matrices, transposed=handle.spec.transposed)


def quantize(
    model: "PreTrainedModel",
    id_: str,
    *,
    coding: Coding = "int8",
    group: int | None = None,
    dynamic: bool = False,
    outliers: float | None = None,
) -> None:
    """Store every floating-point matrix of a weight as codes.

    int8: with scales in the dtype that the weight had. A matrix has one scale a row, or a column where its product
    sums over the rows (both factors of a transposed product). dynamic: the inputs of its products are rounded too,
    token by token, but for those of at least the magnitude `outliers`.

    int4, int3, int2, nf4, ternary and binary: packed codes, with a scale for every `group` stored values of a row (of a
    `Free` layout, of all values), kept as float16, or bfloat16 in a model that is so. codebook2 to codebook8: packed codes into
    as many shared values, kept as such scales are: those of the matrix, or with group=1 of each of its rows (of a `Free` layout,
    still of the matrix). Raises SettingError for other codings, and for a group or inputs that do not go with them.
    """
    handle = weights(model)[id_]
    rounded = _rounded(handle, coding, group, dynamic=dynamic, outliers=outliers)
    store_as(model, handle, handle.matrices | rounded, transposed=handle.spec.transposed)


def round_in_training(
    model: "PreTrainedModel", id_: str, *, coding: Coding = "int8", group: int | None = None
) -> list[RoundedMatrix]:
    """Let every floating-point matrix of a weight compute as `quantize` with the same settings would store it, and take gradients
    straight through; returns these matrices. `settle` then stores them as they compute."""
    handle = weights(model)[id_]
    before = handle.matrices
    learning = {
        part: RoundedMatrix(before[part], stored) for part, stored in _rounded(handle, coding, group).items()
    }
    store_as(model, handle, before | learning, transposed=handle.spec.transposed)
    return list(learning.values())


def round_columns(
    model: "PreTrainedModel",
    id_: str,
    *,
    moment: Float[Tensor, "m m"],
    coding: Coding,
    group: int | None,
    damping: float,
    ordered: bool,
) -> None:
    """As `quantize`, for a linear weight whose inputs have the second moment `moment`: of every product that it is made of, values
    that are rounded later make up for the errors of those before (see `RoundedMatrix.round_columns`)."""
    round_in_training(model, id_, coding=coding, group=group)
    handle = weights(model)[id_]
    for product in products(handle.spec, handle.matrices, moment):
        if isinstance(product.matrix, RoundedMatrix):
            product.matrix.round_columns(product, damping=damping, ordered=ordered)
    settle(model, id_)


def settle(model: "PreTrainedModel", id_: str) -> None:
    """Store a weight that is rounded in training: as integers, with the scales it computes with."""
    handle = weights(model)[id_]
    matrices = {
        part: matrix.stored() if isinstance(matrix, RoundedMatrix) else matrix
        for part, matrix in handle.matrices.items()
    }
    store_as(model, handle, matrices, transposed=handle.spec.transposed)


def share(model: "PreTrainedModel", ids: Sequence[str], value: Float[Tensor, "rows cols"]) -> None:
    """Make one weight, W = `value`, of the plain weights `ids`: every module that used one of them uses it from now on, and keeps
    its own bias. What trains is as it was for the first."""
    handles = [weights(model)[id_] for id_ in ids]
    kept = handles[0].parameter
    with torch.no_grad():
        kept.copy_(handles[0].oriented(value))
    for handle in handles:
        for module in handle.modules:
            module.weight = kept
    attach(model)


def rescale(
    model: "PreTrainedModel", source: str, readers: Sequence[str], factors: Float[Tensor, " m"]
) -> None:
    """Divide the m outputs of the module at path `source`, a norm or a plain linear layer, by `factors`, and multiply the columns of
    the plain weights `readers` with them. Where these alone read it, the model computes the same.
    """
    found = absolute(model, source)
    assert found is not None
    module: Any = model.get_submodule(found)
    handles = weights(model)
    with torch.no_grad():
        outputs = handles[source].oriented(module.weight) if source in handles else module.weight
        outputs /= factors.to(outputs).unsqueeze(1) if outputs.ndim == 2 else factors.to(outputs)
        if getattr(module, "bias", None) is not None:
            module.bias /= factors.to(module.bias)
        for reader in readers:
            columns = handles[reader].oriented(handles[reader].parameter)
            columns *= factors.to(columns)


def store_as(
    model: "PreTrainedModel", handle: WeightHandle, matrices: Mapping[str, StoredMatrix], *, transposed: bool
) -> None:
    """Store a weight as `matrices`, by part; transposed: whether these are the factors of W^T."""
    spec = replace(
        handle.spec,
        matrices={part: matrix.spec for part, matrix in matrices.items()},
        transposed=transposed,
    )
    put(model, spec, matrices)
    attach(model)


def _sparse(
    matrix: StoredMatrix,
    values: Float[Tensor, "rows cols"],
    kept: Bool[Tensor, "rows cols"],
    groups: tuple[int, int] | None,
    block: tuple[int, int] = (1, 1),
) -> StoredMatrix:
    """`values` in the place of `matrix`, of them those that are `kept`."""
    free = Free(nonzeros=int(kept.sum()), block=block)
    layout = Fixed(block=groups[1], nonzeros=groups[0]) if groups else free
    return store(values, layout, kept).requires_grad_(matrix.values.requires_grad)


def _rounded(
    handle: WeightHandle, coding: Coding, group: int | None, **inputs: Any
) -> dict[str, StoredMatrix]:
    """The floating-point matrices of a weight as codes. inputs: what `WeightSpec.rounded` asks of those of their products."""
    one_of("coding", coding, (*low_bit.GRIDS, *CODEBOOKS.values()))
    forms = handle.spec.rounded(coding, group, **inputs).matrices
    return {
        part: encoded(matrix, forms[part])
        for part, matrix in handle.matrices.items()
        if not matrix.spec.integers
    }
