"""Symmetric int8: rows of a weight to integers with one scale each, inputs rounded as they come, and products of both.

Letters: a weight has n rows (outputs) and m columns (inputs); t is tokens.

The arithmetic is torchao's (`Int8WeightOnlyConfig`, `Int8DynamicActivationInt8WeightConfig`, per-row granularity), bit for bit:

    scale = max(max |row| / 127.5, 2^-23),    q = clamp(round(row * (1 / scale)), -128, 127)

Rounding is to nearest, ties to even; scales are float32 whatever the dtype of the weight.
"""

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor

HALF_RANGE = 127.5  # (127 - -128) / 2
EPSILON = torch.finfo(torch.float32).eps
TILE = 128  # tokens a tile: its 32-bit products are scaled while they are still in the cache


def quantize_rows(
    weight: Float[Tensor, "*batch n m"],
) -> tuple[Int8[Tensor, "*batch n m"], Float32[Tensor, "*batch n"]]:
    """Each row as integers and its scale: `row ~ q * scale`.

    The largest magnitude is divided by 127.5 in the dtype of `weight`, as torchao does, so a largest positive value is clamped by half a step.
    """
    largest = weight.abs().amax(dim=-1, keepdim=True)
    scales = (largest / HALF_RANGE).clamp(min=EPSILON).to(torch.float32)
    integers = (weight * (1.0 / scales)).round_().clamp_(-128, 127).to(torch.int8)
    return integers, scales.squeeze(-1)


def round_rows(x: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
    """x rounded to int8 row by row and back; the gradient passes straight through (arXiv 1308.3432)."""
    with torch.no_grad():
        integers, scales = quantize_rows(x.reshape(-1, x.shape[-1]))
        rounding = (integers * scales[:, None]).view_as(x) - x
    return x + rounding.to(x.dtype)


def int8_linear(
    x: Float[Tensor, "*batch m"],
    q: Int8[Tensor, "n m"],
    scales: Float[Tensor, " n"],
    bias: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "*batch n"]:
    """x (q * scales)^T + bias with x rounded to int8 token by token; sums are exact 32-bit integers. No gradient.

    Runs on `torch._int_mm` in tiles of tokens, so that a token's result does not depend on the others.
    """
    tokens = x.reshape(-1, x.shape[-1])
    y = torch.empty(len(tokens), len(q), dtype=x.dtype, device=x.device)
    for start in range(0, len(tokens), TILE):
        integers, steps = quantize_rows(tokens[start : start + TILE])
        sums = torch._int_mm(integers, q.t())
        scaled = (sums * steps[:, None]).to(x.dtype) * scales
        y[start : start + TILE] = scaled if bias is None else scaled + bias
    return y.view(*x.shape[:-1], len(q))


def int8_weight_linear(
    x: Float[Tensor, "*batch m"], q: Int8[Tensor, "n m"], scales: Float[Tensor, " n"]
) -> Float[Tensor, "*batch n"]:
    """x (q * scales)^T with x as it is: the integers are read into the dtype of x, and the product is scaled. Differentiable."""
    return torch.nn.functional.linear(x, q.to(x.dtype)) * scales.to(x.dtype)
