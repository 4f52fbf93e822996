import copy

import pytest
import torch
from torch.nn import functional as F

from stackcomp.core.matrices import CODEBOOKS, Dense, Fixed, Free, MatrixSpec
from stackcomp.nn.matrix import GATHER_TOKENS, StoredMatrix
from stackcomp.nn.storing import store
from stackcomp.ops import cluster, round_groups
from tests.nn.rounding import to_int8, to_low_bit

ROWS, COLS = 12, 20
LAYOUTS = ["dense", "fixed", "full", "free"]


def masked(kind, seed=0):
    """A matrix, its layout and its mask."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(ROWS, COLS, generator=generator)
    scores = torch.rand(ROWS, COLS, generator=generator)
    match kind:
        case "dense":
            return matrix, Dense(), None
        case "fixed":
            mask = torch.zeros(ROWS, 2, 10, dtype=torch.bool)
            mask.scatter_(-1, scores.view(ROWS, 2, 10).argsort(-1)[..., :2], True)
            return matrix, Fixed(block=10, nonzeros=2), mask.view(ROWS, COLS)
        case "full":
            return matrix, Fixed(block=10, nonzeros=10), torch.ones(ROWS, COLS, dtype=torch.bool)
        case _:
            mask = scores < 0.2
            mask[3] = False  # a row that keeps nothing
            return matrix, Free(nonzeros=int(mask.sum())), mask


@pytest.fixture(params=LAYOUTS)
def kept(request):
    """The stored matrix and what it must be."""
    matrix, layout, mask = masked(request.param)
    return store(matrix, layout, mask), matrix if mask is None else matrix * mask


def test_dense_is_what_was_stored(kept):
    stored, matrix = kept
    assert torch.equal(stored.dense(), matrix)
    assert torch.equal(stored.mask(), matrix != 0)
    assert stored.values.shape == stored.spec.values_shape
    assert sum(part.nbytes for part in stored.state_dict().values()) == stored.spec.total_bytes


@pytest.mark.parametrize("tokens", [1, 5, GATHER_TOKENS + 1])
@pytest.mark.parametrize("grad", [False, True])
def test_products(kept, tokens, grad):
    stored, matrix = kept
    with torch.set_grad_enabled(grad):
        x = torch.randn(tokens, 1, COLS)
        assert torch.allclose(stored.project(x), x @ matrix.t(), atol=1e-5)
        x = torch.randn(tokens, 1, ROWS)
        assert torch.allclose(stored.combine(x), x @ matrix, atol=1e-5)


def test_products_with_matrices_below_each_other(kept):
    stored, matrix = kept
    parts = matrix.view(3, 4, COLS)
    x = torch.randn(2, 5, 3, COLS)
    assert torch.allclose(
        stored.project(x.flatten(2), 3), torch.einsum("btkc,krc->btkr", x, parts).flatten(2), atol=1e-5
    )
    x = torch.randn(2, 5, 3, 4)
    assert torch.allclose(
        stored.combine(x.flatten(2), 3), torch.einsum("btkr,krc->btkc", x, parts).flatten(2), atol=1e-5
    )


def test_one_text_or_none_is_taken_as_a_linear_layer_takes_them(kept):
    stored, dense = kept
    for shape in ((), (0,), (2, 0)):
        for blocks in (1, 2):
            x = torch.randn(*shape, COLS * blocks)
            parts = dense.view(blocks, ROWS // blocks, COLS)
            wanted = torch.einsum("...kc,krc->...kr", x.view(*shape, blocks, COLS), parts).flatten(-2)
            with torch.no_grad():
                torch.testing.assert_close(stored.project(x, blocks), wanted)
            y = torch.randn(*shape, ROWS)
            back = torch.einsum("...kr,krc->...kc", y.view(*shape, blocks, ROWS // blocks), parts).flatten(-2)
            with torch.no_grad():
                torch.testing.assert_close(stored.combine(y, blocks), back)


def test_rows(kept):
    stored, matrix = kept
    ids = torch.tensor([[3, 0, 3], [11, 5, 3]])
    assert torch.equal(stored.take(ids), matrix[ids])


def test_the_padding_row_takes_no_gradient(kept):
    stored, _ = kept
    stored.take(torch.tensor([0, 5, 5]), padding=5).sum().backward()
    reached = torch.zeros(ROWS, COLS)
    reached[0] = 1
    assert torch.equal(stored.values.grad, store_like(stored, reached))


def store_like(stored, matrix):
    """The entries of `matrix` that `stored` keeps, in its shape."""
    return matrix[stored.mask()].view(stored.values.shape)


def test_gradients_are_those_of_the_dense_matrix(kept):
    stored, matrix = kept
    dense = matrix.clone().requires_grad_()
    for product, reference, width in (
        (stored.project, lambda x: x @ dense.t(), COLS),
        (stored.combine, lambda x: x @ dense, ROWS),
    ):
        stored.zero_grad()
        dense.grad = None
        x, y = (
            torch.randn(7, width, generator=torch.Generator().manual_seed(1)).requires_grad_()
            for _ in range(2)
        )
        product(x).square().sum().backward()
        reference(y).square().sum().backward()
        assert torch.allclose(x.grad, y.grad, atol=1e-4)
        assert torch.allclose(stored.values.grad, store_like(stored, dense.grad), atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dynamic", [False, True])
def test_int8(kept, axis, dynamic):
    stored, matrix = kept
    rounded = to_int8(stored, axis=axis, dynamic=dynamic)
    assert rounded.spec.coding == "int8"
    assert rounded.spec.index_bytes == stored.spec.index_bytes
    assert torch.equal(rounded.mask(), stored.mask())
    steps = rounded.scales.detach().unsqueeze(1 - axis)
    assert ((rounded.dense() - matrix).abs() <= 1.01 * steps).all()
    assert not rounded.dense()[~stored.mask()].any()
    x = torch.randn(2, 3, COLS)
    exact = x @ rounded.dense().t()
    tolerance = 0.05 * exact.abs().max() if dynamic and axis == 0 else 1e-4
    assert (rounded.project(x) - exact).abs().max() <= tolerance
    x = torch.randn(2, 3, ROWS)
    exact = x @ rounded.dense()
    tolerance = 0.05 * exact.abs().max() if dynamic and axis == 1 else 1e-4
    assert (rounded.combine(x) - exact).abs().max() <= tolerance
    ids = torch.tensor([0, 3, 7])
    assert torch.allclose(rounded.take(ids), rounded.dense()[ids])


@pytest.mark.parametrize("dynamic", [False, True])
def test_int8_products_block_by_block(dynamic):
    matrix, layout, mask = masked("dense")
    x, y = torch.randn(5, 3, COLS), torch.randn(5, 3, 4)
    down = to_int8(store(matrix, layout, mask), axis=0, dynamic=dynamic)
    up = to_int8(store(matrix, layout, mask), axis=1, dynamic=dynamic)
    exact = torch.einsum("tkc,krc->tkr", x, down.dense().view(3, 4, COLS)).flatten(1)
    assert (down.project(x.flatten(1), 3) - exact).abs().max() <= (
        0.05 * exact.abs().max() if dynamic else 1e-4
    )
    exact = torch.einsum("tkr,krc->tkc", y, up.dense().view(3, 4, COLS)).flatten(1)
    assert (up.combine(y.flatten(1), 3) - exact).abs().max() <= (
        0.05 * exact.abs().max() if dynamic else 1e-4
    )


@pytest.mark.parametrize("coding", ["int4", "int3", "int2", "nf4", "ternary", "binary"])
@pytest.mark.parametrize("group", [7, 16])
def test_low_bits(kept, coding, group):
    stored, matrix = kept
    rounded = to_low_bit(stored, coding=coding, group=group)
    assert rounded.spec.coding == coding
    assert sum(part.nbytes for part in rounded.state_dict().values()) == rounded.spec.total_bytes
    assert torch.equal(rounded.mask(), stored.mask())
    assert not rounded.dense()[~stored.mask()].any()
    expected = round_groups(stored.values.detach().view(stored.spec.lines), coding, group)
    assert torch.equal(rounded.dense(), torch.zeros_like(matrix).masked_scatter(stored.mask(), expected))
    again = to_low_bit(store(rounded.dense().detach(), *form_of(stored)), coding=coding, group=group)
    assert torch.equal(again.dense(), rounded.dense())
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            x = torch.randn(2, 3, COLS)
            assert torch.allclose(rounded.project(x), x @ rounded.dense().t(), atol=1e-5)
            assert torch.allclose(rounded.project(x.repeat(1, 1, 3), 3), blockwise(rounded, x), atol=1e-5)
            x = torch.randn(2, 3, ROWS)
            assert torch.allclose(rounded.combine(x), x @ rounded.dense(), atol=1e-5)
    ids = torch.tensor([[0, 3, 7], [11, 3, 0]])
    assert torch.equal(rounded.take(ids), rounded.dense()[ids])
    assert rounded.take(torch.empty(0, dtype=torch.int64)).shape == (0, COLS)


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("group", [None, 1])
def test_codebooks(kept, bits, group):
    stored, matrix = kept
    shared = to_low_bit(stored, coding=CODEBOOKS[bits], group=group)
    assert sum(part.nbytes for part in shared.state_dict().values()) == shared.spec.total_bytes
    assert torch.equal(shared.mask(), stored.mask())
    codes, levels = cluster(stored.values.detach().view(shared.spec.books, -1), bits)
    expected = levels.float().gather(1, codes.long())
    assert torch.equal(shared.dense(), torch.zeros_like(matrix).masked_scatter(stored.mask(), expected))
    x = torch.randn(2, 3, COLS)
    assert torch.allclose(shared.project(x), x @ shared.dense().t(), atol=1e-5)
    assert torch.allclose(shared.project(x.repeat(1, 1, 3), 3), blockwise(shared, x), atol=1e-5)
    ids = torch.tensor([[0, 3, 7], [11, 3, 0]])
    assert torch.equal(shared.take(ids), shared.dense()[ids])
    small = copy.deepcopy(shared).to(torch.bfloat16)
    assert (small.dense().dtype, small.state_dict()["scales"].dtype) == (torch.bfloat16, torch.float16)
    assert repr(shared).endswith(f"codebook{bits}{f' for each of {shared.spec.books}' if group else ''})")


@pytest.mark.parametrize("group", [None, 1])
def test_shared_values_get_the_gradients_of_their_members(kept, group):
    shared = to_low_bit(kept[0], coding="codebook3", group=group)
    assert [name for name, part in shared.named_parameters() if part.requires_grad] == ["scales"]
    weights = torch.randn(ROWS, COLS)
    (shared.dense() * weights).sum().backward()
    books = shared.scales.view(shared.spec.books, -1)
    sums = torch.zeros_like(books)
    values, wanted = (part[shared.mask()].view(len(books), -1) for part in (shared.dense().detach(), weights))
    for book, (line, grads) in enumerate(zip(values, wanted, strict=True)):
        for value, grad in zip(line, grads, strict=True):
            sums[book, (books[book] == value).nonzero()[0, 0]] += grad
    grads = shared.scales.grad.view_as(books)
    assert torch.allclose(grads.sum(), weights[shared.mask()].sum(), atol=1e-4)
    for book, gradient, total in zip(books, grads, sums, strict=True):
        for value in book.unique():  # levels may be equal, and any of them may be the one that a value has
            assert torch.allclose(gradient[book == value].sum(), total[book == value].sum(), atol=1e-4)


def form_of(stored):
    """Layout and mask of a matrix, as `store` takes them."""
    return stored.spec.layout, None if stored.support is None else stored.mask()


def blockwise(stored, x):
    """Products of x with each of three matrices below each other."""
    return torch.cat([x @ part.t() for part in stored.dense().unflatten(0, (3, -1))], dim=-1)


def test_low_bit_scales_get_the_gradient_of_what_they_scale(kept):
    stored, _ = kept
    rounded = to_low_bit(stored, coding="int3", group=7)
    assert [name for name, part in rounded.named_parameters() if part.requires_grad] == ["scales"]
    weights = torch.randn(ROWS, COLS)
    (rounded.dense() * weights).sum().backward()
    with torch.no_grad():
        moved = copy.deepcopy(rounded)
        moved.scales.mul_(2)
        expected = ((moved.dense() - rounded.dense()) * weights).sum()
    assert torch.allclose((rounded.scales.grad * rounded.scales).sum(), expected, atol=1e-4)
    rounded.zero_grad()
    rounded.take(torch.tensor([0, 5, 5]), padding=5).sum().backward()
    first = rounded.scales.grad.clone()
    rounded.zero_grad()
    rounded.take(torch.tensor([0])).sum().backward()
    assert torch.equal(first, rounded.scales.grad)


def test_low_bit_scales_that_train_compute_what_is_saved(kept):
    rounded = to_low_bit(kept[0], coding="int4", group=5)
    with torch.no_grad():
        rounded.scales.mul_(1.0003)  # no 16-bit number now
    state = rounded.state_dict()
    assert state["scales"].dtype == torch.float16
    reloaded = copy.deepcopy(rounded)
    reloaded.load_state_dict(state)
    assert not torch.equal(reloaded.scales, rounded.scales)
    assert torch.equal(reloaded.dense(), rounded.dense())
    with torch.no_grad():
        assert torch.equal(reloaded.dense(), rounded.dense())
    x = torch.arange(ROWS)
    assert torch.equal(reloaded.take(x), rounded.take(x))


def test_low_bits_follow_a_cast_and_keep_their_file():
    rounded = to_low_bit(store(*masked("fixed")), coding="int4", group=4)
    small = copy.deepcopy(rounded).to(torch.bfloat16)
    assert small.dtype == small.dense().dtype == torch.bfloat16
    assert small.spec == rounded.spec
    assert small.state_dict()["scales"].dtype == torch.float16
    assert torch.allclose(small.dense().float(), rounded.dense(), rtol=0.02)
    assert repr(rounded) == "StoredMatrix(12x20, 2 of 10, int4 in groups of 4)"


def test_scales_are_what_trains_of_integers(kept):
    stored, _ = kept
    rounded = to_int8(stored, axis=0, dynamic=False)
    assert [name for name, part in rounded.named_parameters() if part.requires_grad] == ["scales"]
    rounded.project(torch.randn(4, COLS)).sum().backward()
    assert rounded.scales.grad is not None
    frozen = to_int8(stored.requires_grad_(False), axis=0, dynamic=False)
    assert not frozen.scales.requires_grad


def test_it_stands_for_its_tensor_where_a_model_asks_for_the_weight(kept):
    stored, dense = kept
    x = torch.randn(COLS, 3)
    for found, wanted in (
        (stored @ x, dense @ x),
        (x.t() @ stored.t(), x.t() @ dense.t()),
        (torch.randn(1, ROWS).zero_() @ stored, torch.zeros(1, COLS)),
        (torch.cat([stored, stored.t().t()], dim=1), torch.cat([dense, dense], dim=1)),
        (F.layer_norm(stored, (COLS,)), F.layer_norm(dense, (COLS,))),
        (F.linear(x.t(), weight=stored), x.t() @ dense.t()),
    ):
        torch.testing.assert_close(found, wanted)
    assert (stored.size(), stored.size(-1)) == (dense.size(), COLS)


def test_another_support_is_never_mistaken_for_the_old_one():
    first = store(*masked("free", seed=1))
    other = store(*masked("free", seed=1)[:2], masked("free", seed=1)[2].flip(0))
    assert not torch.equal(first.dense(), other.dense())
    x = torch.randn(2, COLS)
    with torch.no_grad():
        first.project(x)
        first.load_state_dict(other.state_dict())  # in place
        assert torch.equal(first.project(x), other.project(x))
        first.support = store(*masked("free", seed=1)).support  # another tensor
        assert torch.equal(first.mask(), masked("free", seed=1)[2])


def test_values_that_change_are_seen_at_once():
    stored = store(*masked("fixed"))
    x = torch.randn(2, COLS)
    with torch.no_grad():
        before = stored.project(x)
        stored.values.data.mul_(2)  # leaves no trace in the version counter
        assert torch.allclose(stored.project(x), 2 * before)


def test_copies_and_casts(kept):
    stored, _ = kept
    stored.project(torch.randn(2, COLS))
    copied = copy.deepcopy(stored).to(torch.bfloat16)
    assert copied.spec.coding == "bfloat16"
    assert copied.dtype == torch.bfloat16
    assert torch.equal(copied.dense(), stored.dense().bfloat16())
    x = torch.randn(3, COLS, dtype=torch.bfloat16)
    assert torch.allclose(copied.project(x).float(), F.linear(x.float(), copied.dense().float()), atol=0.1)
    copied.values.data.zero_()
    assert stored.dense().any()


def test_under_inference_mode():
    matrix, layout, mask = masked("free")
    with torch.inference_mode():
        stored = store(matrix, layout, mask)
        assert torch.allclose(stored.project(torch.eye(COLS)), (matrix * mask).t())
        assert torch.equal(stored.dense(), matrix * mask)


def test_a_mask_that_breaks_the_groups_is_refused():
    matrix = torch.randn(2, 8)
    with pytest.raises(ValueError, match="must keep 2"):
        store(matrix, Fixed(block=4, nonzeros=2), matrix.abs() >= 0)


def test_it_can_be_built_without_memory_and_says_what_it_is():
    with torch.device("meta"):
        matrix = StoredMatrix(MatrixSpec(rows=4, cols=8, layout=Fixed(block=4, nonzeros=2), coding="int8"))
    assert {part.device.type for part in matrix.state_dict().values()} == {"meta"}
    assert matrix.shape == (4, 8)
    assert repr(matrix) == "StoredMatrix(4x8, 2 of 4, int8)"
