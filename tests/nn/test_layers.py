import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stackcomp.core.matrices import Dense, Fixed, Free
from stackcomp.nn import CompressedEmbedding, CompressedLinear
from stackcomp.nn.storing import store
from tests.nn.rounding import to_int8

OUT, IN, BLOCKS, ATOMS, KEPT = 12, 20, 2, 6, 2


def factors(rows, cols, transposed):
    """Matrices of a factored weight and the weight itself."""
    n, m = (cols, rows) if transposed else (rows, cols)
    coefficients = torch.randn(n, BLOCKS, ATOMS)
    mask = torch.zeros_like(coefficients, dtype=torch.bool)
    mask.scatter_(-1, torch.rand_like(coefficients).argsort(-1)[..., :KEPT], True)
    basis = torch.randn(BLOCKS, ATOMS, m // BLOCKS)
    product = torch.cat([(coefficients * mask)[:, k] @ basis[k] for k in range(BLOCKS)], dim=1)
    layout = Fixed(block=ATOMS, nonzeros=KEPT)
    matrices = {
        "basis": store(basis.flatten(0, 1), Dense()),
        "coefficients": store(coefficients.flatten(1), layout, mask.flatten(1)),
    }
    return matrices, product.t() if transposed else product


def linear(matrices, transposed=False, bias=True):
    bias = nn.Parameter(torch.randn(OUT)) if bias else None
    return CompressedLinear(matrices, in_features=IN, out_features=OUT, bias=bias, transposed=transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [1, 400])
@pytest.mark.parametrize("grad", [False, True])
def test_factored(transposed, tokens, grad):
    matrices, weight = factors(OUT, IN, transposed)
    layer = linear(matrices, transposed)
    assert layer.blocks == BLOCKS
    assert torch.allclose(layer.dense(), weight, atol=1e-5)
    x = torch.randn(2, tokens, IN)
    with torch.set_grad_enabled(grad):
        assert torch.allclose(layer(x), F.linear(x, weight, layer.bias), atol=1e-4)


def added(matrices, weight):
    """The same with a third matrix, of which a fifth is stored, and the sum."""
    rest = torch.randn(weight.shape)
    mask = torch.rand(weight.shape) < 0.2
    stored = store(rest, Free(nonzeros=int(mask.sum())), mask)
    return {"weight": stored, **matrices}, weight + rest * mask


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [1, 400])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("coding", ["float32", "int8"])
def test_a_sum(transposed, tokens, grad, coding):
    matrices, weight = added(*factors(OUT, IN, transposed))
    if coding == "int8":
        matrices = {
            part: to_int8(matrix, axis=int(transposed and part != "weight"), dynamic=False)
            for part, matrix in matrices.items()
        }
    layer = linear(matrices, transposed)
    assert layer.blocks == BLOCKS
    assert (layer.dense() - weight).norm() <= (0.03 if coding == "int8" else 1e-5) * weight.norm()
    x = torch.randn(2, tokens, IN)
    with torch.set_grad_enabled(grad):
        assert torch.allclose(layer(x), F.linear(x, layer.dense(), layer.bias), atol=1e-4)
    rows = CompressedEmbedding(
        matrices, num_embeddings=OUT, embedding_dim=IN, transposed=transposed, owner=False
    )
    ids = torch.tensor([[0, 4], [11, 0]])
    assert torch.allclose(rows(ids), layer.dense()[ids], atol=1e-5)


def test_a_sum_is_composed_where_that_takes_fewer_multiplications():
    thin = {
        "basis": store(torch.randn(2, IN), Dense()),
        "coefficients": store(torch.randn(OUT, 2), Dense()),
    }
    assert not linear(thin)._composes(torch.empty(1000, IN))
    layer = linear(added(thin, torch.zeros(OUT, IN))[0])
    assert layer._composes(
        torch.empty(8, IN)
    )  # 12 x 2 x 20 against 8 x 2 x (12 + 20), the third matrix in both
    assert not layer._composes(torch.empty(7, IN))


def test_both_roads_are_taken_and_the_choice_is_one_of_shapes():
    wide, _ = factors(OUT, IN, False)
    layer = linear(wide)
    assert not layer._composes(torch.empty(1, IN))
    thick = {
        "basis": store(torch.randn(40, IN), Dense()),
        "coefficients": store(torch.randn(OUT, 40), Dense()),
    }
    layer = linear(thick)
    assert not layer._composes(torch.empty(1, IN))
    assert layer._composes(torch.empty(1000, IN))
    rounded = linear({name: to_int8(matrix, axis=0, dynamic=True) for name, matrix in thick.items()})
    assert not rounded._composes(torch.empty(1000, IN))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_factored_in_int8(transposed, dynamic):
    matrices, weight = factors(OUT, IN, transposed)
    rounded = {
        name: to_int8(matrix, axis=int(transposed), dynamic=dynamic) for name, matrix in matrices.items()
    }
    layer = linear(rounded, transposed)
    x = torch.randn(3, 5, IN)
    with torch.no_grad():
        y, exact = layer(x), F.linear(x, weight, layer.bias)
    assert (y - exact).norm() <= 0.03 * exact.norm()
    assert not torch.equal(y, exact)
    with torch.no_grad():
        through = (layer(x) - F.linear(x, layer.dense(), layer.bias)).abs().max()
    assert (through > 1e-3) == dynamic


def test_every_stored_number_gets_its_gradient():
    matrices, _ = factors(OUT, IN, False)
    layer = linear(matrices)
    x = torch.randn(6, IN)
    layer(x).square().sum().backward()
    analytic = {name: parameter.grad.flatten()[:4].clone() for name, parameter in layer.named_parameters()}
    for name, parameter in layer.named_parameters():
        for place in range(4):
            numeric = difference(layer, x, parameter, place)
            assert abs(numeric - analytic[name][place]) <= 0.02 * max(1, abs(numeric)), name


TILES = [(3, 5), (1, 4), (4, 1), (1, 20), (12, 2)]


def kronecker(tile, terms=6):
    """Matrices of a sum of Kronecker products, and the sum."""
    c, d = tile
    a, b = torch.randn(terms, OUT // c, IN // d), torch.randn(terms, c, d)
    matrices = {"basis": store(b.flatten(1), Dense()), "coefficients": store(a.flatten(1), Dense())}
    return matrices, sum(torch.kron(*pair) for pair in zip(a, b, strict=True))


def tiled(matrices, tile):
    return CompressedLinear(
        matrices, in_features=IN, out_features=OUT, bias=nn.Parameter(torch.randn(OUT)), tile=tile
    )


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("tokens", [1, 400])
@pytest.mark.parametrize("coding", ["float32", "int8"])
def test_a_sum_of_kronecker_products(tile, tokens, coding):
    matrices, weight = kronecker(tile)
    if coding == "int8":
        matrices = {part: to_int8(matrix, axis=0, dynamic=False) for part, matrix in matrices.items()}
    layer = tiled(matrices, tile)
    assert (layer.dense() - weight).norm() <= (0.03 if coding == "int8" else 1e-5) * weight.norm()
    x = torch.randn(2, tokens, IN)
    assert torch.allclose(layer(x), F.linear(x, layer.dense(), layer.bias), atol=1e-4)
    assert torch.allclose(layer._tiled(x) + layer.bias, layer(x), atol=1e-4)


def test_each_road_through_a_sum_of_kronecker_products_is_the_shortest_somewhere():
    chosen = {}
    for tile in TILES:
        layer = tiled(kronecker(tile)[0], tile)
        b_first, a_first = layer._orders
        c, d = tile
        # A_k X B_k^T with A_k (OUT/c x IN/d), X (IN/d x d), B_k (c x d)
        assert b_first == IN * c + OUT // c * IN // d * c
        assert a_first == OUT // c * IN // d * d + OUT // c * d * c
        chosen[tile] = [b_first < a_first, *(layer._composes(torch.empty(t, IN)) for t in (1, 400))]
    assert chosen[1, 20] == [True, False, False]
    assert chosen[4, 1] == [False, False, True]
    assert chosen[12, 2][0] is False


@pytest.mark.parametrize("tile", [(1, 20), (4, 1)])
@pytest.mark.parametrize("tokens", [2, 400])
def test_every_stored_number_of_a_sum_of_kronecker_products_gets_its_gradient(tile, tokens):
    layer = tiled(kronecker(tile)[0], tile)
    x = torch.randn(tokens, IN) / tokens**0.5
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        if name != "bias":
            for place in range(4):
                numeric = difference(layer, x, parameter, place)
                assert abs(numeric - parameter.grad.flatten()[place]) <= 0.02 * max(1, abs(numeric)), name


@pytest.mark.parametrize("tile", TILES)
def test_rows_of_a_sum_of_kronecker_products(tile):
    matrices, weight = kronecker(tile)
    layer = CompressedEmbedding(matrices, num_embeddings=OUT, embedding_dim=IN, padding_idx=4, tile=tile)
    ids = torch.tensor([[0, 4], [11, 0]])
    rows = layer(ids)
    assert torch.allclose(rows, weight[ids], atol=1e-5)
    (rows[0, 1] ** 2).sum().backward(retain_graph=True)
    assert not any(parameter.grad.any() for parameter in layer.parameters())
    rows.sum().backward()
    assert all(parameter.grad.any() for parameter in layer.parameters())


def difference(layer, x, parameter, place, step=1e-2):
    values = []
    for sign in (1, -1):
        moved = parameter.data.flatten()
        moved[place] += sign * step
        with torch.no_grad():
            values.append(layer(x).double().square().sum().item())
        moved[place] -= sign * step
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("coding", ["float32", "int8"])
def test_factored_embedding(transposed, coding):
    matrices, weight = factors(OUT, IN, transposed)
    if coding == "int8":
        matrices = {name: to_int8(m, axis=int(transposed), dynamic=True) for name, m in matrices.items()}
    layer = CompressedEmbedding(
        matrices, num_embeddings=OUT, embedding_dim=IN, padding_idx=4, transposed=transposed
    )
    ids = torch.tensor([[0, 4], [11, 0]])
    assert torch.allclose(layer(ids), layer.dense()[ids], atol=1e-5)
    assert (layer.dense() - weight).norm() <= 0.03 * weight.norm()


def test_dtype_of_the_result_is_that_of_the_input():
    matrices, _ = factors(OUT, IN, False)
    layer = linear({name: to_int8(matrix, axis=0, dynamic=True) for name, matrix in matrices.items()})
    assert layer(torch.randn(2, IN, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.bfloat16()(torch.randn(2, IN, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_borrower_holds_no_tensor_and_follows_its_owner():
    matrices, weight = factors(OUT, IN, False)
    owner = CompressedEmbedding(matrices, num_embeddings=OUT, embedding_dim=IN)
    borrower = CompressedLinear(matrices, in_features=IN, out_features=OUT, owner=False)
    both = nn.ModuleDict({"owner": owner, "borrower": borrower})
    assert all(name.startswith("owner.") for name in both.state_dict())
    copied = copy.deepcopy(both).double()
    copied["owner"].matrices["basis"].values.data.zero_()
    x = torch.randn(3, IN)
    assert not copied["borrower"](x.double()).any()
    assert torch.allclose(borrower(x), x @ weight.t(), atol=1e-4)
    assert borrower.weight.shape == (OUT, IN)


def test_what_it_is_can_be_read():
    matrices, _ = factors(OUT, IN, True)
    text = repr(linear(matrices, transposed=True))
    assert "20 -> 12, transposed factors in 2 blocks" in text
    assert "(basis): StoredMatrix(12x6, dense, float32)" in text
    assert "20 -> 12, a sum of 6 Kronecker products with tiles of 3x5" in repr(
        tiled(kronecker((3, 5))[0], (3, 5))
    )
    assert "(coefficients): StoredMatrix(20x12, 2 of 6, float32)" in text


def test_parts_that_make_no_weight_are_refused():
    with pytest.raises(ValueError, match="basis and coefficients"):
        linear({"basis": store(torch.randn(2, 2), Dense())})


def test_an_unknown_attribute_is_still_an_error():
    with pytest.raises(AttributeError, match="wieght"):
        _ = linear(factors(OUT, IN, False)[0]).wieght
