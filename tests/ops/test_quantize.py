import pytest
import torch
from torch import nn

from stackcomp.ops import int8_linear, int8_weight_linear, quantize_rows
from stackcomp.ops.quantize import EXACT, TILE

SHAPES = [(48, 32), (37, 65), (1, 3), (384, 96)]


@pytest.fixture(params=SHAPES, ids=str)
def linear(request):
    torch.manual_seed(0)
    rows, cols = request.param
    return nn.Linear(cols, rows)


def torchao(linear, config):
    """What torchao makes of the layer: its integers, scales and result function."""
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(linear.in_features, linear.out_features).to(linear.weight.dtype))
    model[0].load_state_dict(linear.state_dict())
    quantization.quantize_(model, getattr(quantization, config)())
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "product"),
    [("Int8WeightOnlyConfig", int8_weight_linear), ("Int8DynamicActivationInt8WeightConfig", int8_linear)],
)
def test_bit_for_bit_as_torchao(linear, config, product, dtype):
    linear = linear.to(dtype)
    theirs = torchao(linear, config)
    q, scales = quantize_rows(linear.weight.detach())
    assert torch.equal(q, theirs[0].weight.qdata)
    assert torch.equal(scales, theirs[0].weight.scale.flatten())
    x = 3 * torch.randn(5, 7, linear.in_features, dtype=dtype)
    with torch.no_grad():
        assert torch.equal((product(x, q, scales) + linear.bias).to(dtype), theirs(x))


def test_rounding_error_is_at_most_half_a_step():
    weight = torch.randn(20, 30)
    q, scales = quantize_rows(weight)
    error = (q * scales[:, None] - weight).abs() / scales[:, None]
    assert (
        error.max() <= 0.501 + (error > 0.501).logical_and(q == 127).any() * 0.5
    )  # the largest one is clamped


def test_a_row_of_zeros_stays_zero():
    q, scales = quantize_rows(torch.zeros(2, 4))
    assert not q.any()
    assert (scales > 0).all()


def test_scales_rounded_to_another_dtype_are_the_ones_used():
    weight = torch.randn(6, 50)
    q, scales = quantize_rows(weight, torch.bfloat16)
    assert scales.dtype == torch.bfloat16
    expected = torch.round(weight * (1 / scales.float())[:, None]).clamp(-128, 127)
    assert torch.equal(q.float(), expected)


def test_a_tokens_result_does_not_depend_on_the_others():
    q, scales = quantize_rows(torch.randn(9, 16))
    x = torch.randn(2 * TILE + 3, 16)
    together = int8_linear(x, q, scales)
    assert torch.equal(together[TILE + 1], int8_linear(x[TILE + 1 : TILE + 2], q, scales)[0])
    assert torch.equal(together, int8_linear(x.flip(0), q, scales).flip(0))


def test_integers_are_summed_exactly():
    q = torch.randint(-128, 128, (7, 3000), dtype=torch.int8)
    x = torch.randint(-127, 128, (5, 3000)).float()
    x[:, 0] = 127.5  # makes the step 1
    rounded = x.clamp(max=127)
    expected = (rounded.double() @ q.double().t()).float()
    assert torch.equal(int8_linear(x, q, torch.ones(7)), expected)


def test_gradients_are_those_of_the_product_without_rounding():
    q, scales = quantize_rows(torch.randn(9, 16))
    scales.requires_grad_()
    x = torch.randn(3, 4, 16, requires_grad=True)
    grad = torch.randn(3, 4, 9)
    int8_linear(x, q, scales).backward(grad)
    assert torch.allclose(x.grad, grad @ (q * scales[:, None]).detach(), atol=1e-5)
    steps = x.detach().abs().amax(-1, keepdim=True) / 127.5
    rounded = torch.round(x.detach() / steps).clamp(-128, 127) * steps
    assert torch.allclose(scales.grad, (grad * (rounded @ q.float().t())).sum((0, 1)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("product", [int8_linear, int8_weight_linear])
def test_outputs_that_fit_float16_are_finite_there(product):
    """127 times an input of 800 does not, and the scale brings it back."""
    weight = torch.full((2, 64), 0.2)
    q, scales = quantize_rows(weight)
    x = torch.full((3, 64), 800.0, dtype=torch.float16)
    found = product(x, q, scales.half())
    torch.testing.assert_close(found.float(), x.float() @ weight.T, rtol=0.01, atol=0)


def test_weight_only_gradients():
    q, scales = quantize_rows(torch.randn(4, 6).double().float())
    x = torch.randn(3, 6, requires_grad=True)
    scales.requires_grad_()
    grad = torch.randn(3, 4)
    int8_weight_linear(x, q, scales).backward(grad)
    assert torch.allclose(x.grad, grad @ (q * scales[:, None]).detach(), atol=1e-5)
    assert torch.allclose(scales.grad, (grad * (x.detach() @ q.float().t())).sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 5, 130])
@pytest.mark.parametrize("columns", [1, 2, 3, 17])
@pytest.mark.parametrize("rows", [1, 2, 16])
def test_sums_are_exact_on_odd_shapes(tokens, columns, rows):
    generator = torch.Generator().manual_seed(tokens + columns)
    x = torch.randn(tokens, columns, generator=generator)
    q = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)
    integers, steps = quantize_rows(x)
    wanted = (integers.long() @ q.t().long()).float() * steps[:, None] * 0.5
    for _ in range(3):  # uninitialised memory differs from call to call
        assert torch.equal(int8_linear(x, q, torch.full((rows,), 0.5)), wanted)


@pytest.fixture(params=["integers", "floats"])
def products(request, monkeypatch):
    """How sums are made where the processor multiplies integers, and where it does not."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: request.param == "integers")


@pytest.mark.parametrize("columns", [EXACT - 1, EXACT, EXACT + 1, 3 * EXACT])
@pytest.mark.parametrize("value", [-127, -128])
def test_the_largest_sums_are_exact_either_way(products, value, columns):
    q = torch.full((3, columns), value, dtype=torch.int8)
    x = torch.full((2, columns), float(value))
    x[:, 0] = -127.5  # makes the step 1
    integers, steps = quantize_rows(x)
    wanted = (integers.long() @ q.t().long()).float() * steps[:, None]
    assert wanted.max() >= 127 * 127 * columns
    assert torch.equal(int8_linear(x, q, torch.ones(3)), wanted)


def with_outliers():
    """Inputs of which a few are ten times as large as the rest, and a layer."""
    torch.manual_seed(0)
    x = torch.randn(4, 5, 64)
    x[2, 3, 5], x[0, 1, 9], x[0, 1, 5] = 60.0, -45.0, 70.0
    return x, nn.Linear(64, 32, bias=False).weight.detach()


def test_outliers_are_added_in_floating_point_and_the_rest_is_rounded_without_them():
    x, weight = with_outliers()
    q, scales = quantize_rows(weight)
    large = x.abs() >= 6
    expected = int8_linear(x.masked_fill(large, 0), q, scales) + (x * large) @ (q * scales[:, None]).T
    torch.testing.assert_close(int8_linear(x, q, scales, outliers=6.0), expected)
    exact = int8_weight_linear(x, q, scales)
    errors = [(int8_linear(x, q, scales, **how) - exact)[0, 1].norm() for how in ({}, {"outliers": 6.0})]
    assert errors[1] < 0.2 * errors[0]


def test_where_nothing_is_as_large_nothing_changes():
    q, scales = quantize_rows(torch.randn(9, 16))
    x = torch.randn(3, 16).clamp(-2, 2)
    assert torch.equal(int8_linear(x, q, scales, outliers=6.0), int8_linear(x, q, scales))


def test_an_outlier_of_another_token_does_not_change_a_token():
    x, weight = with_outliers()
    q, scales = quantize_rows(weight)
    alone = int8_linear(x[0, 2], q, scales, outliers=6.0)
    torch.testing.assert_close(int8_linear(x, q, scales, outliers=6.0)[0, 2], alone, rtol=1e-6, atol=1e-6)


def of_bitsandbytes(x, weight, threshold):
    """What LLM.int8() of bitsandbytes makes of a weight, its codes and largest magnitudes by row."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    rows, cols = weight.shape
    layer = bitsandbytes.nn.Linear8bitLt(cols, rows, bias=False, has_fp16_weights=False, threshold=threshold)
    layer.load_state_dict({"weight": weight})
    layer = layer.to("cpu").eval()
    with torch.no_grad():
        found = layer(x)
    stored = layer.state_dict()
    return found, stored["weight"], stored["SCB"]


@pytest.mark.filterwarnings("ignore")  # its own
def test_outliers_come_as_near_as_those_of_bitsandbytes():
    x, weight = with_outliers()
    exact = x @ weight.T
    distance = (of_bitsandbytes(x, weight, 6.0)[0] - exact).norm()
    q, scales = quantize_rows(weight)
    assert (int8_linear(x, q, scales, outliers=6.0) - exact).norm() < 1.2 * distance
    assert (int8_linear(x, q, scales) - exact).norm() > 2 * distance


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("outliers", [None, 6.0])
def test_every_value_is_that_of_bitsandbytes_to_a_step_of_rounding(outliers):
    """Theirs has 127 steps to the largest magnitude where torchao's, and ours, has 127.5; of one token their outlier columns are ours."""
    x, weight = with_outliers()
    if outliers:  # which nothing reads, so that only the room that they leave to other inputs tells
        x = x[0, 1:2].masked_fill(x[0, 1:2].abs() >= outliers, 1e3)
        weight = weight.masked_fill(x >= outliers, 0)
    else:
        x = x[1]
    theirs, codes, largest = of_bitsandbytes(x, weight, outliers or 0.0)
    q, scales = quantize_rows(weight)
    assert (q.int() - codes.int()).abs().max() <= 1
    torch.testing.assert_close(127.5 * scales, largest, rtol=1e-3, atol=0)
    rounded = x.masked_fill(x.abs() >= outliers, 0) if outliers else x
    step = rounded.abs().amax(1, keepdim=True) / 127
    bound = step * weight.abs().sum(1) + scales * rounded.abs().sum(1, keepdim=True)
    assert ((int8_linear(x, q, scales, outliers=outliers) - theirs).abs() <= bound).all()
    if outliers:  # and the bound is one that a product without outliers does not keep to
        assert ((int8_linear(x, q, scales) - theirs).abs() > bound).any()


def test_the_gradient_passes_outliers_too():
    x, weight = with_outliers()
    q, scales = quantize_rows(weight)
    x = x.requires_grad_()
    int8_linear(x, q, scales, outliers=6.0).sum().backward()
    expected = (q * scales[:, None]).sum(0).expand_as(x)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)
