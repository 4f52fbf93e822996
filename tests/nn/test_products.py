"""The products of a layer: what is said to flow into each matrix is what does when the layer runs."""

import pytest
import torch

import stackcomp as sc
from stackcomp import nn
from stackcomp.core.errors import ContractBroken
from tests import toys
from tests.passes.test_conformance import apply

BLOCKS = "encoder.layer.*"
ID = "encoder.layer.0.output.dense"


def with_factors(atoms, width, *, transposed):
    """A toy with one factored weight of 16 x 32: its handle, and what the layer computes on random inputs."""
    model = toys.bert_classifier()
    handle = nn.weights(model)[ID]
    n, m = (32, 16) if transposed else (16, 32)
    chance = torch.Generator().manual_seed(1)
    basis = torch.randn(atoms, width, generator=chance)
    values = torch.randn(n, atoms, generator=chance)
    assert m % width == 0
    nn.factorize(model, ID, basis=basis, values=values, transposed=transposed)
    return nn.weights(model)[ID], torch.randn(200, handle.spec.cols, generator=chance)


@pytest.mark.parametrize(("atoms", "width"), [(6, None), (8, 8)])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_products_one_after_the_other_are_the_layer(atoms, width, transposed):
    width = width or (16 if transposed else 32)
    handle, x = with_factors(atoms, width, transposed=transposed)
    layer = handle.modules[0]
    passed = x
    for product in nn.products(handle.spec, layer.matrices, x.T @ x / len(x)):
        weights = product.split(product.matrix.dense().detach())
        assert torch.equal(product.join(weights), product.matrix.dense())
        parts = passed.unflatten(1, (len(weights), -1))
        for k, moment in enumerate(product.moments):
            torch.testing.assert_close(moment, parts[:, k].T @ parts[:, k] / len(x))
        passed = torch.cat([parts[:, k] @ weights[k].T for k in range(len(weights))], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(passed + layer.bias, layer(x), rtol=1e-4, atol=1e-4)


def test_a_plain_weight_is_one_product():
    handle = nn.weights(toys.bert_classifier())[ID]
    matrices = {"weight": nn.storing.store(handle.dense(), sc.core.matrices.Dense())}
    (product,) = nn.products(handle.spec, matrices, torch.eye(32))
    assert torch.equal(product.split(product.matrix.dense())[0], handle.dense())


def test_a_sum_is_its_matrix_beside_two_factors():
    handle, x = with_factors(6, 32, transposed=False)
    pair = handle.modules[0].matrices
    rest = torch.randn(16, 32)
    nn.split(
        model := toys.bert_classifier(),
        ID,
        rest=rest,
        kept=rest > 0,
        basis=pair["basis"].dense().detach(),
        coefficients=pair["coefficients"].dense().detach(),
    )
    whole, *factors = nn.products(
        nn.weights(model)[ID].spec, nn.weights(model)[ID].matrices, moment := x.T @ x / len(x)
    )
    assert [whole.part, *(product.part for product in factors)] == ["weight", "basis", "coefficients"]
    assert torch.equal(whole.matrix.dense(), rest.clamp_min(0))
    for found, wanted in zip(
        [whole.moments, *(product.moments for product in factors)],
        [moment[None], *(product.moments for product in nn.products(handle.spec, pair, moment))],
        strict=True,
    ):
        assert torch.equal(found, wanted)


def test_a_sum_of_kronecker_products_is_not_taken_for_two(model):
    nn.tile(model, ID, basis=torch.randn(2, 4, 8), coefficients=torch.randn(2, 4, 4))
    handle = nn.weights(model)[ID]
    with pytest.raises(ContractBroken, match=f"{ID}: .*let the pass forbid 'kronecker'"):
        list(nn.products(handle.spec, handle.matrices, torch.eye(32)))


def test_the_second_product_sees_what_was_done_to_the_first(tokenizer, tmp_path):
    model = toys.bert_classifier()
    apply(sc.LowRank(ratio=1.3, only=BLOCKS), model, tokenizer, tmp_path)
    handle = next(h for h in nn.weights(model).values() if h.spec.factored and not h.spec.transposed)
    matrices = handle.modules[0].matrices
    seen = nn.products(handle.spec, matrices, torch.eye(handle.spec.cols))
    next(seen)
    with torch.no_grad():
        matrices["basis"].values.mul_(2)
    basis = matrices["basis"].dense()
    torch.testing.assert_close(next(seen).moments[0], basis @ basis.T)
