"""What runs in bfloat16, and what does not."""

import pytest
import torch
from torch.nn import functional

from stackcomp.training.precision import precision

CPU = torch.device("cpu")


def test_nothing_changes_where_bf16_is_off() -> None:
    a = torch.randn(3, 4)
    with precision(CPU, bf16=False):
        assert torch.equal(a @ a.T, torch.matmul(a, a.T))
        assert (a @ a.T).dtype == torch.float32


@pytest.mark.parametrize("by_name", [False, True])
def test_products_are_bf16_and_attention_is_computed_in_float32(by_name: bool) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, 5, 8).bfloat16() for _ in range(3)]
    mask = torch.rand(2, 1, 5, 5) > 0.3
    mask[..., 0] = True
    wide = functional.scaled_dot_product_attention(*(part.float() for part in parts), attn_mask=mask)
    names = ("query", "key", "value")
    with precision(CPU, bf16=True):
        found = (
            functional.scaled_dot_product_attention(**dict(zip(names, parts, strict=True)), attn_mask=mask)
            if by_name
            else functional.scaled_dot_product_attention(*parts, attn_mask=mask)
        )
        assert (parts[0].float() @ parts[0].float().mT).dtype == torch.bfloat16
        assert not torch.is_autocast_enabled("cuda")
        assert torch.is_autocast_enabled("cpu")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wide.bfloat16())
    assert not torch.is_autocast_enabled("cpu")


def test_it_ends_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), precision(CPU, bf16=True):
        _ = 1 / 0
    assert not torch.is_autocast_enabled("cpu")
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
