"""Sparse coding: the pursuit is scikit-learn's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import orthogonal_mp_gram

from stackcomp.ops.sparse_coding import gather, omp, scatter


def problem(rows: int, atoms: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.nn.functional.normalize(torch.randn(atoms, length, generator=generator), dim=1)
    return dictionary, torch.randn(rows, length, generator=generator)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(0, 1000))
def test_omp_agrees_with_scikit_learn(nonzeros: int, seed: int):
    dictionary, targets = problem(5, 12, 9, seed)
    gram, correlations = dictionary @ dictionary.T, targets @ dictionary.T
    support, values = omp(gram, correlations, nonzeros)
    theirs = torch.from_numpy(
        orthogonal_mp_gram(gram.double().numpy(), correlations.T.double().numpy(), n_nonzero_coefs=nonzeros)
    )
    torch.testing.assert_close(
        scatter(support, values, 12), theirs.reshape(12, 5).T.float(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(("blocks", "step"), [(1, 1), (1, 3), (3, 1), (3, 2)])
def test_supports_ascend_and_values_solve_least_squares(blocks: int, step: int):
    dictionary, targets = problem(7, 18, 15, 3)
    gram, correlations = dictionary @ dictionary.T, targets @ dictionary.T
    support, values = omp(gram, correlations, 4, blocks=blocks, step=step)
    assert support.shape == values.shape == (7, blocks, 4)
    assert (support.diff(dim=2) > 0).all()
    assert support.max() < 18 // blocks
    left = gather((targets - scatter(support, values, 18 // blocks) @ dictionary) @ dictionary.T, support)
    assert left.abs().max() < 1e-3  # nothing on the support is left in the residual
