"""Sparse plus low rank: what is of that form is found again, and what is not is met better than by either part alone."""

from functools import partial
from itertools import pairwise

import pytest
import torch

from stackcomp import ops
from stackcomp.core.errors import SettingError


def largest(matrix, count):
    return ops.highest(matrix.abs(), count)


def split(weight, rank, count, importance=None, iterations=40):
    """The op's result, and its error in the metric as a share of the whole."""
    importance = torch.ones(weight.shape[1]) if importance is None else importance
    sparse, kept, left, right = ops.sparse_low_rank(
        weight, rank=rank, keep=partial(largest, count=count), importance=importance, iterations=iterations
    )
    assert int(kept.sum()) == count
    assert not sparse[~kept].any()
    assert (left.shape, right.shape) == ((len(weight), rank), (rank, weight.shape[1]))
    return (sparse, kept, left, right), error(weight, sparse + left @ right, importance)


def error(weight, other, importance):
    return float(((weight - other).square() * importance).sum() / (weight.square() * importance).sum())


def mixed(seed, noise, n=60, m=40, rank=4, share=0.05):
    """A matrix of low rank, with spikes, and noise."""
    chance = torch.Generator().manual_seed(seed)
    smooth = torch.randn(n, rank, generator=chance) @ torch.randn(rank, m, generator=chance)
    where = torch.rand(n, m, generator=chance) < share
    spikes = torch.where(where, 8 * torch.randn(n, m, generator=chance), 0)
    return smooth, spikes, smooth + spikes + noise * torch.randn(n, m, generator=chance)


@pytest.mark.parametrize("seed", range(3))
def test_a_matrix_of_this_form_is_found_again_part_by_part(seed):
    smooth, spikes, weight = mixed(seed, noise=0)
    (sparse, _, left, right), missed = split(weight, 4, int((spikes != 0).sum()), iterations=200)
    assert missed < 1e-10
    torch.testing.assert_close(sparse, spikes, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(left @ right, smooth, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_less_error_than_either_part_alone_with_as_many_values(seed, noise):
    *_, weight = mixed(seed, noise)
    n, m = weight.shape
    values = 8 * (n + m)
    _, both = split(weight, 4, values - 4 * (n + m))
    pruned = torch.where(largest(weight, values), weight, 0)
    left, right = ops.low_rank(weight, rank=8)
    assert both < 0.8 * error(weight, pruned, torch.ones(m))
    assert both < 0.8 * error(weight, left @ right, torch.ones(m))


@pytest.mark.parametrize("seed", range(3))
def test_more_iterations_never_hurt_in_the_metric_of_the_inputs(seed):
    *_, weight = mixed(seed, noise=0.5)
    importance = torch.logspace(-2, 1, 40)
    errors = [split(weight, 4, 300, importance, iterations)[1] for iterations in (1, 2, 4, 8, 16, 32)]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("seed", range(3))
def test_inputs_count_by_their_importance(seed):
    weight = torch.randn(60, 40, generator=torch.Generator().manual_seed(seed))
    importance = torch.logspace(-2, 1, 40)
    _, aware = split(weight, 4, 300, importance)
    (sparse, _, left, right), _ = split(weight, 4, 300)
    assert aware < 0.8 * error(weight, sparse + left @ right, importance)


@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_power_steps_are_near_the_papers_decompositions(iterations):
    """Alternating thresholding as the paper lists it: a truncated decomposition each time."""
    *_, weight = mixed(5, noise=0.5)
    scale = torch.logspace(-1, 1, 40)
    target, sparse = weight * scale, torch.zeros_like(weight)
    for _ in range(iterations):
        u, sigma, v = torch.linalg.svd(target - sparse, full_matrices=False)
        smooth = u[:, :4] * sigma[:4] @ v[:4]
        sparse = torch.where(largest(target - smooth, 300), target - smooth, 0)
    theirs = error(weight, (smooth + sparse) / scale, scale.square())
    assert split(weight, 4, 300, scale.square(), iterations)[1] == pytest.approx(theirs, rel=0.02)


def test_inputs_that_are_always_zero_do_no_harm():
    *_, weight = mixed(0, noise=0.5)
    importance = torch.ones(40)
    importance[3] = 0
    for given in (importance, torch.zeros(40)):
        parts, _ = split(weight, 4, 300, given)
        assert all(torch.isfinite(part).all() for part in parts)
        assert max(part.float().abs().max() for part in parts) < 100 * weight.abs().max()


def test_a_rank_out_of_range_is_refused():
    with pytest.raises(SettingError, match=r"rank=41 is not within 1 \.\. 40"):
        split(torch.randn(60, 40), 41, 10)
