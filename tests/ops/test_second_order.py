"""The sweep of GPTQ and SparseGPT: parity with the published formulas, written out column by column."""

import pytest
import torch

from stackcomp.ops import low_bit, prune_columns, round_columns
from stackcomp.ops.second_order import BLOCK, curvature, sweep

LEVELS = {
    "int8": torch.arange(-128.0, 128),
    "int4": torch.arange(-8, 8) + 0.25,
    "int3": torch.arange(-4, 4) + 0.25,
    "int2": torch.arange(-2, 2) + 0.25,
    "ternary": torch.tensor([-1.0, 0.0, 1.0]),
    "binary": torch.tensor([-0.5, 0.5]),
}


def problem(n, m, seed=0):
    """A weight and the second moment of correlated inputs of uneven size."""
    chance = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(2, 0.1, m)[torch.randperm(m, generator=chance)]
    mixing = torch.randn(m, m, generator=chance) * sizes
    inputs = torch.randn(4 * m, m, generator=chance) @ mixing + 0.3
    weight = torch.randn(n, m, generator=chance)
    return weight, inputs.T @ inputs / len(inputs)


def nearest(values, steps, levels):
    """Values on the nearest of the levels, times their steps."""
    places = values / torch.where(steps == 0, 1, steps)
    return levels[(places.unsqueeze(-1) - levels).abs().argmin(-1)].to(values) * steps


def damped(moment, damping):
    return moment + damping * moment.diagonal().mean() * torch.eye(len(moment))


def published(weight, moment, damping, decide, order=None):
    """Equations 2 and 3 of GPTQ as they stand: an explicit inverse over the free columns F at every step.

    delta = -(w_q - v) / [H_F^-1]_qq * (H_F^-1)_q,:    decide(q, W, 1 / [H_F^-1]) gives v.
    """
    left, moment = weight.clone().double(), damped(moment, damping).double()
    free = list(range(len(moment))) if order is None else order.tolist()
    while free:
        q = free[0]
        inverse = torch.linalg.inv(moment[free][:, free])
        value = decide(q, left)
        error = (left[:, q] - value) / inverse[0, 0]
        left[:, free] -= error[:, None] * inverse[0]
        left[:, q] = value
        free = free[1:]
    return left.float()


def output_error(weight, other, moment):
    return float(torch.trace((weight - other) @ moment @ (weight - other).T))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("coding", LEVELS)
def test_rounding_agrees_with_the_published_formula(coding, ordered):
    weight, moment = problem(5, 24)
    steps = weight.abs().amax(1, keepdim=True).expand_as(weight) / LEVELS[coding].abs().max()
    steps = torch.where(torch.arange(24) % 7 == 3, 0, steps)  # these are not stored

    def decide(column, left):
        return nearest(left[:, column], steps[:, column].double(), LEVELS[coding])

    metric = curvature(moment, damping=0.01, ordered=ordered)
    found = round_columns(weight, metric, steps, coding)
    order = moment.diagonal().argsort(descending=True) if ordered else None
    torch.testing.assert_close(found, published(weight, moment, 0.01, decide, order))
    assert (found[:, 3::7] == 0).all()


@pytest.mark.parametrize("groups", [None, (2, 4), (1, 3)])
def test_pruning_agrees_with_the_published_formula(groups):
    """Scores w^2 / [H_F^-1]_qq, F the columns from q on; all columns fit one block."""
    weight, moment = problem(6, 24, seed=1)
    span = groups[1] if groups else 24
    costs = [torch.linalg.inv(damped(moment, 0.01)[q:, q:].double())[0, 0] for q in range(24)]
    kept = torch.zeros(6, 24, dtype=torch.bool)

    def masked(column, left):
        if column % span == 0:
            here = slice(column, column + span)
            scores = left[:, here] ** 2 / torch.stack(costs[here])
            if groups:
                best = scores.topk(groups[0], dim=1).indices
                kept[:, here].scatter_(1, best, True)
            else:
                lowest = scores.flatten().topk(round(0.4 * scores.numel())).values[-1]
                kept[:, here] = scores >= lowest
        return left[:, column] * kept[:, column]

    found, mask = prune_columns(weight, curvature(moment, damping=0.01), share=0.4, groups=groups)
    expected = published(weight, moment, 0.01, masked)
    assert torch.equal(mask, kept)
    torch.testing.assert_close(found, expected)
    assert ((found != 0) == mask).all()


@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_change_nothing(block):
    weight, moment = problem(4, 40)
    metric = curvature(moment, damping=0.01, ordered=True)

    def decide(j, values):
        return values[0].round()

    torch.testing.assert_close(
        sweep(weight, metric, decide, block=block), sweep(weight, metric, decide, block=40)
    )


@pytest.mark.parametrize("coding", LEVELS)
def test_on_correlated_inputs_the_sweep_beats_the_nearest_level(coding):
    largest = {"ternary": 0.4, "binary": 0.3}.get(coding, 1.0)  # of the grid, as a share of the largest value
    ratios = []
    for seed in range(12):
        weight, moment = problem(16, 2 * BLOCK + 24, seed)
        steps = weight.abs().amax(1, keepdim=True).expand_as(weight) * largest / LEVELS[coding].abs().max()
        plain = nearest(weight, steps, LEVELS[coding])
        found = round_columns(weight, curvature(moment, damping=0.01, ordered=True), steps, coding)
        ratios.append(output_error(weight, found, moment) / output_error(weight, plain, moment))
    assert max(ratios) < 1.0
    assert sum(ratios) / len(ratios) < (0.7 if coding == "binary" else 0.6)


def test_sensitivity_is_what_an_error_costs_when_others_make_up_for_it():
    _, moment = problem(1, 9)
    metric = curvature(moment, damping=0.05, ordered=True)
    inverse = torch.linalg.inv(damped(moment, 0.05))
    torch.testing.assert_close(metric.sensitivity, 1 / inverse.diagonal())


@pytest.mark.parametrize("coding", ["int3", "ternary", "binary"])
def test_weights_that_are_on_the_grid_already_stay(coding):
    weight, moment = problem(3, 16)
    codes, scales = low_bit.quantize_groups(weight, coding, 8)
    weight = low_bit.dequantize_groups(codes, scales.float(), coding, 8)
    steps = low_bit.per_value(scales.float(), 8, 16)
    found = round_columns(weight, curvature(moment, damping=0.01), steps, coding)
    torch.testing.assert_close(found, weight)


def test_inputs_that_are_always_zero_and_too_little_text_are_fine():
    weight, moment = problem(3, 16)
    few = torch.zeros(16, 16)
    few[:4, :4] = moment[:4, :4]
    for given in (few, torch.zeros(16, 16)):
        values, kept = prune_columns(weight, curvature(given, damping=0.01), share=0.5)
        assert torch.isfinite(values).all()
        assert kept.sum() == 24
