"""Whitening: the root reproduces the moment, singular moments are damped visibly, the error is the trace it claims to be."""

import pytest
import torch

from stackcomp.core.errors import BadWeights
from stackcomp.ops.whiten import metric_error, whitener


def moment(size: int, tokens: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / tokens


def test_the_root_reproduces_the_damped_moment():
    given = moment(12, 100)
    made = whitener(given, damping=1e-2)
    expected = given + 1e-2 * given.diagonal().mean() * torch.eye(12)
    torch.testing.assert_close(made.root @ made.root.T, expected)
    torch.testing.assert_close(made.moment, expected)
    assert made.damping == 1e-2


def test_whitening_is_undone():
    made = whitener(moment(12, 100), damping=1e-3)
    matrix = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(made.unwhiten_columns(made.whiten_columns(matrix)), matrix)


def test_a_singular_moment_is_damped_more_and_says_so():
    made = whitener(moment(64, 4), damping=0.0)
    assert made.damping > 0.0
    assert torch.isfinite(made.root).all()


def test_zeros_become_the_identity():
    made = whitener(torch.zeros(3, 3), damping=1e-3)
    torch.testing.assert_close(made.root, torch.eye(3))
    assert made.effective_rank == 0.0


def test_effective_rank_of_white_data_and_of_one_direction():
    assert whitener(torch.eye(7), damping=1e-3).effective_rank == pytest.approx(7)
    one = torch.arange(1.0, 8.0)
    assert whitener(torch.outer(one, one), damping=1e-3).effective_rank == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float):
    broken = torch.eye(3)
    broken[1, 1] = value
    with pytest.raises(BadWeights, match="NaN or infinite"):
        whitener(broken, damping=1e-3)


def test_an_indefinite_matrix_is_refused():
    with pytest.raises(BadWeights, match="no second moment"):
        whitener(torch.diag(torch.tensor([1e12, 1.0, -9e11])), damping=1e-9)


def test_metric_error_is_the_error_of_the_outputs():
    generator = torch.Generator().manual_seed(2)
    x, residual = torch.randn(50, 6, generator=generator), torch.randn(4, 6, generator=generator)
    inputs, outputs = whitener(x.T @ x / 50, damping=1e-6), whitener(moment(4, 30), damping=1e-6)
    seen = x @ residual.T
    assert metric_error(residual, inputs=inputs) == pytest.approx(float(seen.square().sum() / 50), rel=1e-4)
    trace = torch.trace(outputs.moment @ residual @ inputs.moment @ residual.T)
    assert metric_error(residual, inputs=inputs, outputs=outputs) == pytest.approx(float(trace), rel=1e-4)
