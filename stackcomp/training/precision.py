"""The precision of forward passes: bfloat16 under autocast, but for attention on a processor.

There, torch's fused attention (2.13) goes backward through bfloat16 several times as slowly as through float32 where texts are short.
"""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@contextmanager
def precision(device: torch.device, *, bf16: bool) -> Generator[None]:
    """Run what is inside in bfloat16, where that is asked for; parameters stay as they are."""
    with ExitStack() as inside:
        if bf16:
            inside.enter_context(torch.autocast(device.type, dtype=torch.bfloat16))
            if device.type == "cpu":
                inside.enter_context(_WideAttention())
        yield


class _WideAttention(TorchFunctionMode):
    """Attention in float32; what comes out has the dtype of the queries."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query = args[0] if args else kwargs["query"]
        with torch.autocast("cpu", enabled=False):
            found = func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})
        return found.to(query.dtype)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
