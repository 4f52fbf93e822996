"""`StoredMatrix`: one matrix as it is saved: values, and where its form has them a support and scales.

Letters: the matrix M has `rows` rows and `cols` columns; t is tokens. A factor of a blocked weight is a stack
of `blocks` matrices below each other, M_1 ... M_blocks, of rows / blocks rows each.

What is in the state dict is what is in the file: `values` (a parameter; a buffer when they are integers, of packed
bytes below 8 bits), `support` (packed bytes; only where some entries are not stored) and `scales` (a parameter, so
that they stay trainable; only with integers). Codes of a codebook are packed bytes, too, and its shared values are in
the place of scales.

Scales of packed values are kept in the dtype of the model, which is what a product and an optimizer want, and are
rounded to their `scale_coding` wherever they are read: by a product, and by the state dict.
"""

from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from stackcomp.core.errors import UnsupportedModel
from stackcomp.core.matrices import Coding, Dense, Fixed, MatrixSpec
from stackcomp.nn.support import Support
from stackcomp.ops import clusters, low_bit, quantize

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
CODINGS: dict[torch.dtype, Coding] = {dtype: name for name, dtype in DTYPES.items()}  # type: ignore[misc]

GATHER_TOKENS = 256  # up to here, and up to this share of entries, gathering rows was measured faster than
GATHER_DENSITY = 0.25  # decoding and a dense product (2 to 5 times at 16 tokens, 1.5 to 3 times at 256)


def _as_tensor(value: Any) -> Any:
    return value.dense() if isinstance(value, StoredMatrix) else value


class StoredMatrix(nn.Module):
    """The matrix that a `MatrixSpec` describes, with its products. Values are uninitialised: `store` fills
    them. dtype: of the scales of packed values (default: their coding), which is that of the matrix.
    """

    values: Tensor
    support: Tensor | None
    scales: Tensor | None
    _is_hf_initialized = True  # transformers fills what lacks this flag with random numbers

    def __init__(
        self,
        spec: MatrixSpec,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._form = spec
        self._cached: Support | None = None
        values = torch.empty(
            spec.values_shape, dtype=torch.uint8 if spec.packed else DTYPES[spec.coding], device=device
        )
        own = dtype if spec.packed and dtype else DTYPES[spec.scale_coding]
        scales = torch.empty(spec.scale_count, dtype=own, device=device) if spec.integers else None
        self.register_buffer("values", values) if spec.integers else self.register_parameter(
            "values", nn.Parameter(values)
        )
        support = (
            torch.empty(spec.index_bytes, dtype=torch.uint8, device=device) if spec.index_bytes else None
        )
        self.register_buffer("support", support)
        self.register_parameter("scales", None if scales is None else nn.Parameter(scales))

    @property
    def spec(self) -> MatrixSpec:
        """How the matrix is stored now; codings follow the tensors, which `model.to(dtype)` may have changed.

        Raises UnsupportedModel for a dtype that is not stored.
        """
        if self.dtype not in CODINGS:
            raise UnsupportedModel(
                f"dtype {self.dtype} is not stored: cast the model to float32, bfloat16 or float16"
            )
        if self._form.packed:
            return self._form
        scale_coding = self._form.scale_coding if self.scales is None else CODINGS[self.scales.dtype]
        return replace(self._form, coding=CODINGS[self.values.dtype], scale_coding=scale_coding)

    @property
    def dynamic(self) -> bool:
        """Whether the inputs of its products are rounded."""
        return self._form.dynamic

    @property
    def shape(self) -> torch.Size:
        """(rows, cols), as of the tensor it stands for."""
        return torch.Size((self._form.rows, self._form.cols))

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of the matrix: that of the values, or of their scales."""
        return self.values.dtype if self.scales is None else self.scales.dtype

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.values.device

    # What models ask of the weight of a plain layer beside calling it: it stands for its tensor there, decoded each time.

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_as_tensor, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.dense() @ other

    def t(self) -> Tensor:
        """The transposed matrix."""
        return self.dense().t()

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def dense(self) -> Float[Tensor, "rows cols"]:
        """The whole matrix; the gradient reaches values and scales."""
        matrix = self._spread()
        if self.scales is None or self._form.packed:
            return matrix
        return matrix.to(self.scales.dtype) * self.scales.unsqueeze(1 - self._form.scale_axis)

    def mask(self) -> Bool[Tensor, "rows cols"]:
        """Which entries are stored."""
        if self.support is None:
            return torch.ones(self.shape, dtype=torch.bool, device=self.device)
        mask = torch.zeros(self.shape.numel(), dtype=torch.bool, device=self.device)
        return mask.index_fill_(0, self._support.flat, True).view(self.shape)

    def project(self, x: Float[Tensor, "*t in"], blocks: int = 1) -> Float[Tensor, "*t out"]:
        """x_k M_k^T for the parts x_k of x, side by side: with one block, x M^T."""
        if blocks > 1:
            return self._blockwise(x, blocks, transpose=True)
        if self._rounds(0):
            return self._integer_product(x, self._spread(), self._steps)
        if self._gathers(x):
            return self._gather(x, transpose=True)
        if self._scaled(0):
            return quantize.int8_weight_linear(x, self._spread(), self._steps)
        return F.linear(x, self.dense().to(x.dtype))

    def combine(self, x: Float[Tensor, "*t in"], blocks: int = 1) -> Float[Tensor, "*t out"]:
        """x_k M_k for the parts x_k of x, side by side: with one block, x M."""
        if blocks > 1:
            return self._blockwise(x, blocks, transpose=False)
        if self._rounds(1):
            return self._integer_product(x, self._spread().t(), self._steps)
        if self._gathers(x):
            return self._gather(x, transpose=False)
        if self._scaled(1):
            return quantize.int8_weight_linear(x, self._spread().t(), self._steps)
        return x @ self.dense().to(x.dtype)

    def take(self, ids: Int64[Tensor, "*t"], padding: int | None = None) -> Float[Tensor, "*t cols"]:
        """Rows of M; the row `padding` passes no gradient."""
        form = self._form
        if self.support is None and self.scales is None:
            return F.embedding(ids, self._spread(), padding)
        if self.support is not None:
            places, entries = self._support.of_rows(ids)
            found = self._at(entries)
            taken = found.new_zeros(ids.numel() * form.cols).scatter(0, places, found)
            taken = taken.view(*ids.shape, form.cols)
        elif form.packed:
            taken = self._at(ids.unsqueeze(-1) * form.cols + torch.arange(form.cols, device=ids.device))
        else:
            taken = self._spread()[ids]
        if self.scales is not None and not form.packed:
            scales = self.scales[ids].unsqueeze(-1) if form.scale_axis == 0 else self.scales
            taken = taken.to(scales.dtype) * scales
        return (
            taken if padding is None else torch.where((ids == padding).unsqueeze(-1), taken.detach(), taken)
        )

    def code_size(self) -> float:
        """Root mean square of the codes: how much further a step of a scale moves the values than one of the values themselves would.
        1 where there are none, and of shared values, which are values themselves."""
        if self.scales is None or self._form.clustered:
            return 1.0
        with torch.no_grad():
            values = self.dense().float().square().sum() / max(self._form.count, 1)
            return float((values / self.scales.float().square().mean()).sqrt().nan_to_num(1.0)) or 1.0

    def extra_repr(self) -> str:
        spec = self.spec
        match spec.layout:
            case Dense():
                form = "dense"
            case Fixed(block=block, nonzeros=nonzeros):
                form = f"{nonzeros} of {block}"
            case _:
                blocks = f" in blocks of {'x'.join(map(str, spec.layout.block))}" * (spec.layout.area > 1)
                form = f"{spec.layout.nonzeros} free{blocks}"
        shared = f" for each of {spec.books}" if spec.clustered else f" in groups of {spec.group}"
        group = shared if spec.group else ""
        inputs = ", dynamic" if spec.dynamic else ""
        some = f" below {spec.outliers:g}" if spec.outliers else ""
        return f"{spec.rows}x{spec.cols}, {form}, {spec.coding}{group}{inputs}{some}"

    @property
    def _steps(self) -> Tensor:
        """The scales of integers."""
        assert self.scales is not None
        return self.scales

    def _save_to_state_dict(
        self, destination: MutableMapping[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # on the meta device transformers asks in which dtype to load, and not what to save
        if self._form.packed and not keep_vars and not self.values.is_meta:
            scales = low_bit.stored_scales(destination[f"{prefix}scales"], self._scale_dtype)
            destination[f"{prefix}scales"] = scales.to(self._scale_dtype)

    @property
    def _scale_dtype(self) -> torch.dtype:
        """The dtype in which scales are stored."""
        return DTYPES[self._form.scale_coding]

    def _scaled(self, axis: Literal[0, 1]) -> bool:
        """Whether all values of an output, the outputs being on `axis`, have one scale."""
        return self.scales is not None and not self._form.packed and self._form.scale_axis == axis

    def _rounds(self, axis: Literal[0, 1]) -> bool:
        """Whether a product rounds its inputs: that needs the scales on its output side. (Rows taken by id
        have no inputs to round.)
        """
        return self._form.dynamic and self._form.scale_axis == axis

    def _integer_product(self, x: Tensor, integers: Tensor, scales: Tensor) -> Tensor:
        """x (integers * scales)^T with x rounded."""
        return quantize.int8_linear(x, integers, scales, self._form.outliers)

    def _blockwise(self, x: Tensor, blocks: int, *, transpose: bool) -> Tensor:
        """Products with each of the matrices below each other; inputs are rounded block by block."""
        if not self._rounds(0 if transpose else 1):
            stack = self.dense().to(x.dtype).unflatten(0, (blocks, -1))
            parts = x.reshape(-1, blocks, x.shape[-1] // blocks).transpose(0, 1)
            product = torch.bmm(parts, stack.transpose(1, 2) if transpose else stack)
            return product.transpose(0, 1).reshape(*x.shape[:-1], blocks * product.shape[-1])
        stack = self._spread().unflatten(0, (blocks, -1))
        parts = x.unflatten(-1, (blocks, -1)).unbind(-2)
        if transpose:
            scales = self._steps.unflatten(0, (blocks, -1))
            products = [self._integer_product(parts[k], stack[k], scales[k]) for k in range(blocks)]
        else:
            products = [self._integer_product(parts[k], stack[k].t(), self._steps) for k in range(blocks)]
        return torch.cat(products, dim=-1)

    def _flat(self) -> Tensor:
        """The stored values in a row; packed ones decoded, the scales of others not applied."""
        form = self._form
        if not form.packed:
            return self.values.flatten()
        scales = low_bit.stored_scales(self._steps, self._scale_dtype)
        if form.clustered:
            return self._of_books(scales.view(form.books, -1))
        assert form.group is not None
        grid = low_bit.grid_of(form.coding, scales.dtype, scales.device)
        places = low_bit.look_up(self.values, form.coding, form.count, grid).view(form.lines)
        return low_bit.scaled(places, scales.view(form.lines[0], -1), form.group).flatten()

    def _of_books(self, books: Float[Tensor, "books levels"]) -> Float[Tensor, " n"]:
        """The stored values, whose codes are those of codebooks."""
        form = self._form
        if len(books) == 1:
            wide = books[0].to(torch.promote_types(books.dtype, torch.float32))  # of gradients, too
            return low_bit.look_up(self.values, form.coding, form.count, wide).to(books.dtype)
        codes = low_bit.unpack(self.values, form.coding, form.count).view(form.books, -1)
        book = torch.arange(form.books, dtype=torch.int32, device=codes.device)
        return clusters.look_up(books, codes, book[:, None]).flatten()

    def _at(self, entries: Int64[Tensor, "*t"]) -> Tensor:
        """The stored values at these places of the row `_flat`, without decoding the others."""
        form = self._form
        if not form.packed:
            return self.values.flatten()[entries]
        length = form.lines[1]
        line = entries // length
        codes = low_bit.take(self.values, form.coding, entries)
        if form.clustered:
            books = low_bit.stored_scales(self._steps, self._scale_dtype).view(form.books, -1)
            return clusters.look_up(books, codes, line if form.group else torch.zeros_like(line))
        assert form.group is not None
        groups = line * -(-length // form.group) + (entries - line * length) // form.group
        scales = low_bit.stored_scales(self._steps[groups], self._scale_dtype)
        return low_bit.levels(codes, form.coding, scales.dtype) * scales

    def _spread(self) -> Tensor:
        """The stored values in their places, zeros elsewhere; the scales of values that are not packed are not
        applied.
        """
        return self._placed(self._flat())

    def _placed(self, values: Tensor) -> Tensor:
        """Values in a row, one for each that is stored, in their places; zeros elsewhere."""
        if self.support is None:
            return values.view(self.shape)
        return values.new_zeros(self.shape.numel()).scatter(0, self._support.flat, values).view(self.shape)

    def _picked(self, matrix: Tensor) -> Tensor:
        """The entries of a matrix that stand where values are stored, in a row."""
        return matrix.flatten() if self.support is None else matrix.flatten()[self._support.flat]

    def _gathers(self, x: Tensor) -> bool:
        """Whether a product gathers the stored entries instead of decoding the matrix: a function of shapes,
        dtypes and of whether a gradient is wanted, so that a new process does the same.
        """
        if (
            self.support is None
            or x.device.type != "cpu"
            or x.dtype != torch.float32
            or self.dtype != torch.float32
        ):
            return False
        wants_gradient = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.parameters())
        )
        few = (
            self._form.count <= GATHER_DENSITY * self.shape.numel()
            and x.numel() <= GATHER_TOKENS * x.shape[-1]
        )
        return few and not wants_gradient

    def _gather(self, x: Tensor, *, transpose: bool) -> Tensor:
        """x M^T (transpose) or x M: every output sums the rows of x^T, tokens side by side, that its stored
        entries name.
        """
        support = self._support
        values = self._flat()
        if self.scales is not None and not self._form.packed:
            values = values * self.scales[support.rows if self._form.scale_axis == 0 else support.cols]
        places, offsets, order = support.by_row if transpose else support.by_column
        tokens = x.reshape(-1, x.shape[-1]).t().contiguous()
        weights = values if order is None else values[order]
        sums = F.embedding_bag(
            places, tokens, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
        )
        return sums.t().reshape(*x.shape[:-1], len(sums))

    @property
    def _support(self) -> Support:
        """The decoded support; decoded anew whenever another tensor, or another content, took its place."""
        packed = self.support
        assert packed is not None
        version = None if packed.is_inference() else packed._version
        cached = self._cached
        if (
            cached is None
            or cached.packed is not packed
            or cached.version is None
            or cached.version != version
        ):
            cached = self._cached = Support(packed, version, self._form)
        return cached
