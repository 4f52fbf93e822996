"""Sparse coding: the pursuit is scikit-learn's, and swaps only ever lower the error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import orthogonal_mp_gram

from stackcomp.ops.sparse_coding import factor_supports, gain, gather, omp, scatter, solve, swap


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


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 2, 3]), st.integers(1, 4), st.integers(0, 1000))
def test_swaps_never_raise_the_error_and_gain_is_what_it_lowers(blocks: int, count: int, seed: int):
    dictionary, targets = problem(8, 24, 10, seed)
    gram, correlations = dictionary @ dictionary.T, targets @ dictionary.T
    support = torch.arange(3).expand(8, blocks, 3).contiguous()
    values = solve(factor_supports(gram, support), gather(correlations, support))

    def errors(support: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return (targets - scatter(support, values, 24 // blocks) @ dictionary).square().sum(1)

    before = errors(support, values)
    torch.testing.assert_close(
        before, targets.square().sum(1) - gain(gram, correlations, support, values), rtol=1e-3, atol=1e-3
    )
    swapped, weights = swap(gram, correlations, support, values, count)
    assert (errors(swapped, weights) <= before + 1e-4).all()
    assert errors(swapped, weights).sum() < before.sum()
    assert (swapped.diff(dim=2) > 0).all()


def test_values_after_a_swap_are_least_squares_on_what_was_kept():
    dictionary, targets = problem(6, 16, 12, 5)
    gram, correlations = dictionary @ dictionary.T, targets @ dictionary.T
    start = torch.arange(4).expand(6, 1, 4).contiguous()
    values = solve(factor_supports(gram, start), gather(correlations, start))
    support, values = swap(gram, correlations, start, values, 2)
    assert (support != start).any()
    torch.testing.assert_close(
        values, solve(factor_supports(gram, support), gather(correlations, support)), rtol=1e-3, atol=1e-3
    )


def test_a_full_support_has_nothing_to_swap():
    dictionary, targets = problem(3, 4, 6, 0)
    support, values = omp(dictionary @ dictionary.T, targets @ dictionary.T, 4)
    again, same = swap(dictionary @ dictionary.T, targets @ dictionary.T, support, values, 2)
    assert again is support
    assert same is values
