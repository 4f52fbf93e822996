"""Dense-sparse: planted factors come back, sweeps never hurt, metrics help, and low rank is its corner."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from stackcomp.core.errors import BadWeights, SettingError
from stackcomp.ops.factorize import DenseSparseFactors, Factorizer, dense_sparse, narrowing, rounding_noise
from stackcomp.ops.low_bit import round_groups
from stackcomp.ops.low_rank import rank_errors
from stackcomp.ops.sparse_coding import scatter
from stackcomp.ops.whiten import Whitener, metric_error, whitener


def metric(size: int, seed: int) -> Whitener:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) / size**0.5
    x = (torch.randn(300, size, generator=generator) * torch.linspace(0.1, 2, size)) @ mixing
    return whitener(x.T @ x / 300, damping=1e-3)


def noise(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def error(
    weight: torch.Tensor,
    factors: DenseSparseFactors,
    inputs: Whitener | None = None,
    outputs: Whitener | None = None,
):
    return metric_error(weight - factors.product(), inputs=inputs, outputs=outputs)


def test_planted_factors_are_found():
    generator = torch.Generator().manual_seed(0)
    picks = torch.stack([torch.randperm(8, generator=generator)[:2].sort().values for _ in range(96)])
    codes = scatter(picks[:, None], torch.randn(96, 1, 2, generator=generator), 8)
    weight = codes @ torch.randn(8, 12, generator=generator)
    found = [dense_sparse(weight, atoms=8, nonzeros=2, sweeps=40, seed=seed) for seed in range(24)]
    left = min(metric_error(weight - factors.product()) for factors in found) / metric_error(weight)
    assert (
        left < 1e-4
    )  # some start finds them exactly; every start does far better than two directions for all
    assert all(
        metric_error(weight - factors.product()) < 0.5 * float(rank_errors(weight)[2]) for factors in found
    )


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("coupled", [False, True])
def test_no_sweep_by_itself_raises_the_error(blocks: int, transposed: bool, coupled: bool):
    weight, inputs, outputs = noise(40, 24), metric(24, 1), metric(40, 2) if coupled else None
    factorizer = Factorizer(
        weight,
        atoms=8,
        nonzeros=3,
        blocks=blocks,
        transposed=transposed,
        inputs=inputs,
        outputs=outputs,
    )
    errors = [error(weight, factorizer.factors(), inputs, outputs)]
    for _ in range(5):
        factorizer.sweep()
        errors.append(error(weight, factorizer.factors(), inputs, outputs))
    assert all(after <= before * 1.0001 for before, after in pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


def test_a_solution_that_raises_the_error_is_not_taken(monkeypatch):
    """Where few directions matter to the rows' metric float32 may not solve the equations of a factor any more."""
    weight, metrics = noise(40, 24), {"inputs": metric(24, 1), "outputs": metric(40, 2)}
    factorizer = Factorizer(weight, atoms=8, nonzeros=3, **metrics)
    factorizer.sweep()
    before = error(weight, factorizer.factors(), **metrics)
    for broken in ("_solved", "solve"):
        with monkeypatch.context() as patch:
            patch.setattr(f"stackcomp.ops.factorize.{broken}", lambda known, right: 1e3 * right)
            factorizer.sweep()
        assert error(weight, factorizer.factors(), **metrics) <= before * 1.0001


def test_a_parameter_is_factorized_and_a_product_is_differentiable():
    factors = dense_sparse(torch.nn.Parameter(noise(40, 24)), atoms=8, nonzeros=3)
    values = factors.values.requires_grad_()
    factors.product().sum().backward()
    assert values.grad is not None
    assert values.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("metrics", "left"),
    [
        ({}, 0.9999),
        ({"inputs": metric(24, 1)}, 0.99),
        ({"inputs": metric(24, 1), "outputs": metric(40, 2)}, 0.97),
    ],
)
def test_polishing_lowers_the_error_and_keeps_the_supports(metrics: dict[str, Whitener], left: float):
    weight = noise(40, 24)
    factorizer = Factorizer(weight, atoms=8, nonzeros=3, **metrics)
    factorizer.sweep(steps=2)
    factorizer.solve_basis()
    before = factorizer.factors()
    factorizer.polish()
    after = factorizer.factors()
    assert torch.equal(after.support, before.support)
    assert error(weight, after, **metrics) < left * error(weight, before, **metrics)


def test_a_factorizer_that_takes_over_judges_solutions_by_what_it_took(monkeypatch):
    weight, metrics = noise(40, 24), {"inputs": metric(24, 1), "outputs": metric(40, 2)}
    before, after = (Factorizer(weight, atoms=8, nonzeros=3, seed=seed, **metrics) for seed in (0, 1))
    before.sweep()
    after.resume(before.basis, before.code, before.mask)
    left = error(weight, before.factors(), **metrics)
    exact = torch.linalg.solve
    monkeypatch.setattr(
        "stackcomp.ops.factorize._solved", lambda known, right: 1.5 * exact(known, right)
    )  # worse than what it took, better than its own start
    after.solve_basis()
    assert error(weight, after.factors(), **metrics) <= left * 1.0001


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_rows_narrow_to_what_is_asked_for(groups: int, coupled: bool):
    weight, outputs = noise(40, 24), metric(40, 2) if coupled else None
    factorizer = Factorizer(weight, atoms=12, nonzeros=6 // groups, groups=groups, outputs=outputs)
    for nonzeros in (4 // groups, 2 // groups):
        factorizer.sweep(nonzeros=nonzeros)
        assert factorizer.factors().support.shape == (40, groups, nonzeros)
        kept = factorizer.mask.unflatten(2, (groups, -1)).sum(3)
        assert (kept == nonzeros).all()


@pytest.mark.parametrize("coupled", [False, True])
def test_narrowing_and_reaching_ahead_find_more_in_as_many_sweeps(coupled: bool, monkeypatch):
    weight, inputs = noise(96, 48) @ noise(48, 48, 1), metric(48, 1)
    outputs = metric(96, 2) if coupled else None

    def left() -> float:
        metrics = {"inputs": inputs, "outputs": outputs}
        found = [
            dense_sparse(weight, atoms=24, nonzeros=6, sweeps=12, seed=seed, **metrics) for seed in range(4)
        ]
        return sum(float(error(weight, factors, **metrics)) for factors in found)

    both = left()
    monkeypatch.setattr("stackcomp.ops.factorize.AHEAD", 0.0)
    narrowed = left()
    monkeypatch.setattr(
        "stackcomp.ops.factorize.narrowing", lambda kept, group, sweeps: [kept] * (sweeps + 1)
    )
    assert both < 0.97 * left()
    assert both < narrowed
    if coupled:  # where sweeps are slowest each helps by itself
        assert narrowed < left()


def test_rows_narrow_in_even_factors():
    assert narrowing(4, 16, 3) == [8, 6, 4, 4]
    assert narrowing(4, 16, 1) == [8, 4]
    assert narrowing(4, 16, 0) == [4]
    assert narrowing(1, 1, 2) == [1, 1, 1]


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_shapes_types_and_orientation(blocks: int, transposed: bool):
    weight = noise(20, 12)
    factors = dense_sparse(weight, atoms=5, nonzeros=2, blocks=blocks, transposed=transposed, sweeps=1)
    rows, columns = (12, 20) if transposed else (20, 12)
    assert factors.basis.shape == (blocks, 5, columns // blocks)
    assert factors.support.shape == factors.values.shape == (rows, blocks, 2)
    assert factors.support.dtype == torch.int64
    assert (factors.support.diff(dim=2) > 0).all()
    assert factors.product().shape == weight.shape
    parts = [
        scatter(factors.support[:, [j]], factors.values[:, [j]], 5) @ factors.basis[j] for j in range(blocks)
    ]
    made = torch.cat(parts, dim=1)
    torch.testing.assert_close(factors.product(), made.T if transposed else made)


@pytest.mark.parametrize("transposed", [False, True])
def test_every_coefficient_kept_is_the_best_low_rank(transposed: bool):
    weight, inputs, outputs = noise(30, 16), metric(16, 1), metric(30, 2)
    factors = dense_sparse(weight, atoms=6, nonzeros=6, transposed=transposed, inputs=inputs, outputs=outputs)
    best = float(rank_errors(weight, inputs=inputs, outputs=outputs)[6])
    assert error(weight, factors, inputs, outputs) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("blocks", [1, 2])
def test_each_metric_that_is_known_lowers_its_error(transposed: bool, blocks: int):
    weight, inputs, outputs = noise(48, 24), metric(24, 1), metric(48, 2)
    shape = {"atoms": 12, "nonzeros": 4, "transposed": transposed, "blocks": blocks}
    plain = error(weight, dense_sparse(weight, **shape), inputs, outputs)
    half = error(weight, dense_sparse(weight, inputs=inputs, **shape), inputs, outputs)
    full = error(weight, dense_sparse(weight, inputs=inputs, outputs=outputs, **shape), inputs, outputs)
    assert full < half < plain


def test_the_seed_decides_everything():
    weight, inputs, outputs = noise(32, 16), metric(16, 1), metric(32, 2)
    shape = {"atoms": 8, "nonzeros": 3, "inputs": inputs, "outputs": outputs, "sweeps": 2}
    state = torch.get_rng_state()
    first, second, other = (dense_sparse(weight, seed=seed, **shape) for seed in (0, 0, 1))
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.support, second.support)
    assert not torch.equal(first.basis, other.basis)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "shape",
    [
        {"atoms": 4, "nonzeros": 5},
        {"atoms": 0, "nonzeros": 0},
        {"atoms": 21, "nonzeros": 2},
        {"atoms": 4, "nonzeros": 2, "blocks": 5},
    ],
)
def test_settings_that_do_not_fit_are_refused(shape: dict[str, int]):
    with pytest.raises(SettingError, match=r"atoms=|blocks="):
        dense_sparse(noise(20, 12), **shape)


def test_a_negative_number_of_sweeps_is_refused():
    with pytest.raises(SettingError, match="sweeps=-1"):
        dense_sparse(noise(20, 12), atoms=4, nonzeros=2, sweeps=-1)


@pytest.mark.parametrize("nonzeros", [1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25])
def test_broken_weights_are_refused(nonzeros, value):
    weight = noise(6, 4)
    weight[2, 1] = value
    with pytest.raises(BadWeights, match=r"\(6, 4\) .*when squared"):
        dense_sparse(weight, atoms=3, nonzeros=nonzeros)


@pytest.mark.parametrize("weight", [noise(6, 4).half(), noise(6, 4).bfloat16(), torch.empty(0, 4)])
def test_what_cannot_be_factorized_is_refused(weight):
    with pytest.raises((BadWeights, SettingError), match=r"give values in float32|atoms <= 0"):
        dense_sparse(weight, atoms=3, nonzeros=1)


def test_a_weight_of_zeros_stays_zero():
    factors = dense_sparse(torch.zeros(10, 6), atoms=4, nonzeros=2, sweeps=2)
    assert torch.equal(factors.product(), torch.zeros(10, 6))


def test_the_input_is_left_alone():
    weight = noise(20, 12)
    before = weight.clone()
    dense_sparse(weight, atoms=5, nonzeros=2, outputs=metric(20, 0), sweeps=1)
    assert torch.equal(weight, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_in_error():
    weight, inputs, outputs = noise(40, 24), metric(24, 1), metric(40, 2)
    here = dense_sparse(weight, atoms=8, nonzeros=3, inputs=inputs, outputs=outputs)
    theirs = [whitener(part.moment.cuda(), damping=0.0) for part in (inputs, outputs)]
    there = dense_sparse(weight.cuda(), atoms=8, nonzeros=3, inputs=theirs[0], outputs=theirs[1])
    assert there.values.is_cuda
    expected = error(weight, here, inputs, outputs)
    assert metric_error(weight - there.product().cpu(), inputs=inputs, outputs=outputs) == pytest.approx(
        expected, rel=0.1
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_codes_that_pay_for_their_size_are_smaller_and_explain_no_less(seed: int, monkeypatch):
    """What rounding both factors costs grows with their size."""
    weight = noise(256, 96, seed) * torch.linspace(2, 0.1, 96)
    ours = dense_sparse(weight, atoms=72, nonzeros=30, sweeps=8)
    monkeypatch.setattr("stackcomp.ops.factorize.CODE_RIDGE", 0.0)
    free = dense_sparse(weight, atoms=72, nonzeros=30, sweeps=8)
    sizes = [factors.values.norm() * factors.basis.norm() for factors in (ours, free)]
    assert sizes[0] < 0.9 * sizes[1]
    assert error(weight, ours) < error(weight, free)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("blocks", [1, 2])
def test_factors_that_are_made_to_be_rounded_lose_less_by_it(blocks: int, coupled: bool, seed: int):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(192, 64, generator=generator) * torch.linspace(2, 0.1, 64)
    alike = torch.randn(
        192, 6, generator=generator
    )  # rows whose inputs move together invite codes that cancel
    moment = alike @ alike.T + 0.05 * torch.eye(192)
    outputs = whitener(moment, damping=1e-3) if coupled else None

    def rounded_error(bits: float | None) -> float:
        factors = dense_sparse(
            weight,
            atoms=48 // blocks,
            nonzeros=12 // blocks,
            blocks=blocks,
            outputs=outputs,
            sweeps=6,
            noise=rounding_noise(bits),
        )
        rounded = replace(
            factors,
            values=round_groups(factors.values.flatten(1), "int3", 32).view(factors.values.shape),
            basis=round_groups(factors.basis.flatten(0, 1), "int3", 32).view(factors.basis.shape),
        )
        return float(error(weight, rounded, None, outputs))

    assert rounded_error(3.6) < (0.5 if coupled else 1) * rounded_error(None)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_noise_to_be_ready_for_is_three_times_what_rounding_leaves_of_gaussian_groups(bits: int):
    values = noise(512, 128)
    left = (round_groups(values, f"int{bits}", 32) - values).square().mean()
    assert rounding_noise(bits + 0.6) == pytest.approx(3 * float(left), rel=0.1)


def test_nothing_is_made_for_a_rounding_that_does_not_come():
    assert rounding_noise(None) == 0
    assert rounding_noise(32) < 1e-15


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_are_all_alike_are_found(seed):
    for weight, transposed in ((noise(1, 16, seed).expand(32, 16), False), (torch.ones(64, 16), True)):
        factors = dense_sparse(
            weight.clone(), atoms=8, nonzeros=2, blocks=2, transposed=transposed, seed=seed
        )
        torch.testing.assert_close(factors.product(), weight, atol=1e-4, rtol=0)
