"""Low rank: the error is the tail of the whitened spectrum, and no other factors of that rank do better in the metric."""

import pytest
import torch

from stackcomp.core.errors import SettingError
from stackcomp.ops.low_rank import low_rank, low_rank_of_rows, rank_errors, rank_of_ratio
from stackcomp.ops.whiten import Whitener, metric_error, whitener

RANK = 4


def case() -> tuple[torch.Tensor, Whitener, Whitener]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(14, 10, generator=generator)
    x = torch.randn(90, 10, generator=generator) * torch.linspace(0.1, 3, 10)
    g = torch.randn(90, 14, generator=generator) * torch.linspace(3, 0.1, 14)
    return weight, whitener(x.T @ x / 90, damping=1e-3), whitener(g.T @ g / 90, damping=1e-3)


@pytest.mark.parametrize("with_inputs", [False, True])
@pytest.mark.parametrize("with_outputs", [False, True])
def test_the_error_is_the_tail_of_the_spectrum(with_inputs: bool, with_outputs: bool):
    weight, inputs, outputs = case()
    metrics = {"inputs": inputs if with_inputs else None, "outputs": outputs if with_outputs else None}
    left, right = low_rank(weight, rank=RANK, **metrics)
    assert left.shape == (14, RANK)
    assert right.shape == (RANK, 10)
    error = metric_error(weight - left @ right, **metrics)
    assert error == pytest.approx(float(rank_errors(weight, **metrics)[RANK]), rel=1e-3)


def test_knowing_the_metric_beats_not_knowing_it():
    weight, inputs, outputs = case()
    plain = metric_error(weight - torch.matmul(*low_rank(weight, rank=RANK)), inputs=inputs, outputs=outputs)
    half = metric_error(
        weight - torch.matmul(*low_rank(weight, rank=RANK, inputs=inputs)), inputs=inputs, outputs=outputs
    )
    full = metric_error(
        weight - torch.matmul(*low_rank(weight, rank=RANK, inputs=inputs, outputs=outputs)),
        inputs=inputs,
        outputs=outputs,
    )
    assert full < 0.95 * half < half < 0.95 * plain


def test_full_rank_is_exact():
    weight, inputs, outputs = case()
    left, right = low_rank(weight, rank=10, inputs=inputs, outputs=outputs)
    torch.testing.assert_close(left @ right, weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 11])
def test_a_rank_that_does_not_exist_is_refused(rank: int):
    with pytest.raises(SettingError, match=f"rank={rank}"):
        low_rank(case()[0], rank=rank)


def test_weighted_rows_are_the_best_of_their_rank():
    weight, _, _ = case()
    importance = torch.logspace(-3, 3, 14)
    left, right = low_rank_of_rows(weight, rank=RANK, importance=importance)
    outputs = Whitener(
        moment=importance.diag(), root=importance.sqrt().diag(), damping=0.0, effective_rank=0.0
    )
    error = metric_error(weight - left @ right, outputs=outputs)
    assert error == pytest.approx(float(rank_errors(weight, outputs=outputs)[RANK]), rel=1e-4)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))


def test_rows_of_no_importance_have_no_say_and_are_projected():
    weight, _, _ = case()
    importance = torch.ones(14)
    importance[RANK:] = 0
    left, right = low_rank_of_rows(weight, rank=RANK, importance=importance)
    torch.testing.assert_close((left @ right)[:RANK], weight[:RANK], rtol=1e-4, atol=1e-5)
    residual = (weight - left @ right)[RANK:]
    torch.testing.assert_close(residual @ right.T, torch.zeros(14 - RANK, RANK), rtol=0, atol=1e-4)


def test_without_any_importance_it_is_the_plain_svd():
    weight, _, _ = case()
    expected = torch.matmul(*low_rank(weight, rank=RANK))
    found = torch.matmul(*low_rank_of_rows(weight, rank=RANK, importance=torch.zeros(14)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ratio", "rank"), [(1.0, 5), (2.0, 2), (5.8, 1), (5.9, 0)])
def test_a_rank_keeps_its_ratio(ratio: float, rank: int):
    assert rank_of_ratio(14, 10, ratio) == rank
