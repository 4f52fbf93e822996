"""The nearest sum of Kronecker products, against tiles cut out one by one."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stackcomp.core.errors import SettingError
from stackcomp.ops import kronecker, kronecker_errors

SIDES = st.integers(1, 4)


def summed(a, b):
    """sum_k A_k (x) B_k by numpy."""
    return sum(np.kron(left.numpy(), right.numpy()) for left, right in zip(a, b, strict=True))


@given(p=SIDES, q=SIDES, c=SIDES, d=SIDES, seed=st.integers(0, 100), data=st.data())
def test_the_error_is_the_tail_of_the_spectrum_of_the_tiles(p, q, c, d, seed, data):
    terms = data.draw(st.integers(1, min(p * q, c * d)))
    weight = torch.randn(p * c, q * d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = [
        weight[i * c : (i + 1) * c, j * d : (j + 1) * d].reshape(-1).numpy()
        for i in range(p)
        for j in range(q)
    ]
    tail = (np.linalg.svd(np.stack(rows), compute_uv=False)[terms:] ** 2).sum()
    a, b = kronecker(weight, tile=(c, d), terms=terms)
    assert (a.shape, b.shape) == ((terms, p, q), (terms, c, d))
    assert ((weight.numpy() - summed(a, b)) ** 2).sum() == pytest.approx(tail, abs=1e-9)
    assert float(kronecker_errors(weight, (c, d))[terms]) == pytest.approx(tail, abs=1e-9)


def test_a_sum_of_two_products_is_found_again():
    a, b = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 4, 2, dtype=torch.float64)
    weight = torch.from_numpy(summed(a, b))
    np.testing.assert_allclose(summed(*kronecker(weight, tile=(4, 2), terms=2)), weight, atol=1e-9)
    errors = kronecker_errors(weight, (4, 2))
    assert errors[1] > 1
    assert errors[2] < 1e-9
    assert kronecker_errors(weight, (3, 5))[2] > 1


@pytest.mark.parametrize("terms", [0, 7])
def test_more_terms_than_there_are_is_refused(terms):
    with pytest.raises(SettingError, match=rf"rank={terms} is not within 1 \.\. 6"):
        kronecker(torch.randn(6, 6), tile=(2, 3), terms=terms)
