"""Symmetric int8: rows of a weight to integers with one scale each, inputs rounded as they come, and products
of both.

Letters: a weight has n rows (outputs) and m columns (inputs); t is tokens.

The arithmetic is torchao's (`Int8WeightOnlyConfig`, `Int8DynamicActivationInt8WeightConfig`, per-row
granularity), bit for bit:

    scale = max(max |row| / 127.5, 2^-23),    q = clamp(round(row * (1 / scale)), -128, 127)

Rounding is to nearest, ties to even; scales are float32 whatever the dtype of the weight.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int8
from torch import Tensor

HALF_RANGE = 127.5  # (127 - -128) / 2
EPSILON = torch.finfo(torch.float32).eps
EXACT = (
    1024  # columns: their products of int8 sum to 2^24 at most, up to where float32 holds every whole number
)
TILE = 128  # tokens a tile: its 32-bit products are scaled while they are still in the cache


def quantize_rows(
    weight: Float[Tensor, "*batch n m"], scale_dtype: torch.dtype = torch.float32
) -> tuple[Int8[Tensor, "*batch n m"], Float[Tensor, "*batch n"]]:
    """Each row as integers and its scale: `row ~ q * scale`.

    The largest magnitude is divided by 127.5 in the dtype of `weight`, as torchao does, so a largest positive
    value is clamped by half a step. With another `scale_dtype` than torchao's float32, rows are rounded with
    the scale as it is stored.
    """
    scales = row_scales(weight.abs().amax(dim=-1, keepdim=True), scale_dtype)
    integers = (weight * (1.0 / scales.to(torch.float32))).round_().clamp_(-128, 127).to(torch.int8)
    return integers, scales.squeeze(-1)


def row_scales(largest: Float[Tensor, "*rows"], dtype: torch.dtype) -> Float[Tensor, "*rows"]:
    """The scales of rows whose largest magnitudes are given."""
    return (largest / HALF_RANGE).clamp(min=EPSILON).to(dtype)


def int8_linear(
    x: Float[Tensor, "*batch m"],
    q: Int8[Tensor, "n m"],
    scales: Float[Tensor, " n"],
    outliers: float | None = None,
) -> Float[Tensor, "*batch n"]:
    """x (q * scales)^T with x rounded to int8 token by token; sums are exact 32-bit integers.

    outliers: inputs of at least this magnitude are not rounded, and do not make the steps of the others coarse: their products are added
    in floating point (LLM.int8(), arXiv 2208.07339; there a whole column is left so, in every token, where one has an outlier).
    The result has the wider dtype of x and scales, so that a bias is added before it is rounded to that of x.
    The gradient passes straight through the rounding of x (arXiv 1308.3432).
    """
    if outliers is None:
        return _Int8Linear.apply(x, q, scales)  # type: ignore[return-value]
    large = x.abs() >= outliers
    rounded: Tensor = _Int8Linear.apply(x.masked_fill(large, 0), q, scales)  # type: ignore[assignment]
    columns = large.reshape(-1, x.shape[-1]).any(0).nonzero().squeeze(1)
    few = (x * large)[..., columns]
    return rounded + int8_weight_linear(few, q[:, columns], scales)


class _Int8Linear(torch.autograd.Function):
    """Forward in integers, tile by tile, so that a token's result does not depend on the others; backward as
    if x had not been rounded.
    """

    @staticmethod
    def forward(ctx, x: Tensor, q: Tensor, scales: Tensor) -> Tensor:  # type: ignore[override]
        tokens = x.reshape(-1, x.shape[-1])
        y = torch.empty(
            len(tokens), len(q), dtype=torch.promote_types(x.dtype, scales.dtype), device=x.device
        )
        products: list[Tensor] = []
        multiplied = _multiplied(q)
        for start in range(0, len(tokens), TILE):
            integers, steps = quantize_rows(tokens[start : start + TILE])
            product = multiplied(integers) * steps[:, None]
            if x.dtype != torch.float16:  # whose range it may leave
                product = product.to(x.dtype)
            torch.mul(product, scales, out=y[start : start + TILE])
            if ctx.needs_input_grad[2]:
                products.append(product)
        ctx.save_for_backward(q, scales, torch.cat(products) if products else None)
        ctx.inputs = x.dtype
        return y.view(*x.shape[:-1], len(q))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:  # type: ignore[override]
        q, scales, products = ctx.saved_tensors
        to_x = to_scales = None
        if ctx.needs_input_grad[0]:
            to_x = ((grad * scales) @ q.to(grad.dtype)).to(ctx.inputs)
        if products is not None:
            to_scales = (grad.reshape(products.shape) * products).sum(0).to(scales.dtype)
        return to_x, None, to_scales


def _multiplied(q: Int8[Tensor, "n m"]) -> Callable[[Int8[Tensor, "t m"]], Tensor]:
    """What takes integers to integers q^T, summed exactly: by integer instructions where the processor has them (elsewhere `_int_mm` is
    twenty times as slow as floating point; with a single column it reads uninitialised memory in torch 2.13), else in float32, of so few
    columns at a time that whole numbers stay exact. On other devices than the CPU doubles stand in: `_int_mm` takes only some shapes there.
    """
    if q.device.type != "cpu":
        doubles = q.double().t()
        return lambda integers: (integers.double() @ doubles).float()
    if torch.cpu._is_vnni_supported() and q.shape[1] > 1:
        return lambda integers: torch._int_mm(integers, q.t())
    parts = [part.float().t() for part in q.split(EXACT, dim=1)]
    if len(parts) == 1:
        return lambda integers: integers.float() @ parts[0]

    def summed(integers: Tensor) -> Tensor:
        pieces = integers.split(EXACT, dim=1)
        found = [(a.float() @ b).int() for a, b in zip(pieces, parts, strict=True)]
        return torch.stack(found).sum(0, dtype=torch.int32)

    return summed


def int8_weight_linear(
    x: Float[Tensor, "*batch m"], q: Int8[Tensor, "n m"], scales: Float[Tensor, " n"]
) -> Float[Tensor, "*batch n"]:
    """x (q * scales)^T with x as it is: the integers are read into the dtype of x, and the product is scaled.
    Differentiable. In float16, whose range a product of integers leaves, they are scaled before.
    """
    if x.dtype == torch.float16:
        return torch.nn.functional.linear(x, q.to(x.dtype) * scales.to(x.dtype)[:, None])
    return torch.nn.functional.linear(x, q.to(x.dtype)) * scales.to(x.dtype)
