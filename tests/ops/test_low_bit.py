"""Group-wise rounding and its packing: parity with loops over groups, what rounding twice leaves, and bytes."""

from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackcomp.core.errors import SettingError
from stackcomp.core.matrices import CODEBOOKS, VALUE_BITS, packed_bytes
from stackcomp.ops import dequantize_groups, low_bit, pack, quantize_groups, round_groups, unpack

LEVELS = {
    "int4": torch.arange(-8, 8) + 0.25,
    "int3": torch.arange(-4, 4) + 0.25,
    "int2": torch.arange(-2, 2) + 0.25,
    "ternary": torch.tensor([-1.0, 0.0, 1.0]),
    "binary": torch.tensor([-0.5, 0.5]),
    "nf4": low_bit.GRIDS["nf4"].table,  # checked below
}
CODINGS = tuple(LEVELS)
coding_of = pytest.mark.parametrize("coding", CODINGS)
integers_of = pytest.mark.parametrize("coding", ["int4", "int3", "int2"])
exact_of = pytest.mark.parametrize("coding", ["ternary", "binary"])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(values, rounded, weights=1.0):
    return (weights * (values - rounded).square()).sum(-1)


@given(st.sampled_from([*CODINGS, *CODEBOOKS.values()]), st.integers(0, 70), st.integers(0, 5), st.data())
def test_packing_is_exact_and_as_small_as_it_says(coding, count, start, data):
    codes_drawn = st.integers(0, 2 if coding == "ternary" else 2 ** int(VALUE_BITS[coding]) - 1)
    drawn = data.draw(st.lists(codes_drawn, min_size=count + start, max_size=count + start))
    codes = torch.tensor(drawn, dtype=torch.uint8)[start:]
    packed = pack(codes, coding)
    bits = Fraction(8, 5) if coding == "ternary" else VALUE_BITS[coding]
    assert len(packed) == packed_bytes(count, VALUE_BITS[coding]) == -(-count * bits // 8)
    assert torch.equal(unpack(packed, coding, count), codes)
    places = torch.arange(count).flip(0)
    assert torch.equal(low_bit.take(packed, coding, places), codes.flip(0))


@pytest.mark.parametrize("coding", ["int4", "int3", "int2", "nf4", "binary", *CODEBOOKS.values()])
def test_bits_stand_where_the_docstring_says(coding):
    bits = int(VALUE_BITS[coding])
    levels = 2**bits
    codes = torch.randint(0, levels, (21,), dtype=torch.uint8)
    stream = int.from_bytes(bytes(pack(codes, coding).tolist()), "little")
    assert [stream >> i * bits & (levels - 1) for i in range(21)] == codes.tolist()


def test_ternary_digits_stand_where_the_docstring_says():
    codes = torch.randint(0, 3, (21,), dtype=torch.uint8)
    packed = pack(codes, "ternary").tolist()
    assert [packed[i // 5] // 3 ** (i % 5) % 3 for i in range(21)] == codes.tolist()


@pytest.mark.parametrize("coding", [*CODINGS, *CODEBOOKS.values()])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 61, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_values_are_looked_up_as_codes_are_unpacked(coding, count, dtype):
    number = 3 if coding == "ternary" else 2 ** int(VALUE_BITS[coding])
    codes = torch.randint(0, number, (count,), dtype=torch.uint8)
    values = randn(number).to(dtype)
    packed = pack(codes, coding)
    assert torch.equal(unpack(packed, coding, count), codes)
    assert torch.equal(low_bit.look_up(packed, coding, count, values), values[codes.long()])
    learned = values.clone().requires_grad_()
    found = low_bit.look_up(packed, coding, count, learned)
    assert torch.equal(found, values[codes.long()])
    found.sum().backward()
    if dtype != torch.bfloat16:  # which counts to 256
        assert torch.equal(learned.grad, torch.bincount(codes.long(), minlength=number).to(dtype))


@pytest.mark.parametrize("count", [10**9, 10**16 + 5])
def test_many_values_are_counted_exactly(count):
    assert packed_bytes(5 * count, 1.6) == count
    assert packed_bytes(5 * count + 1, 1.6) == count + 1


@coding_of
@pytest.mark.parametrize("length", [32, 40, 5])
def test_codes_are_the_nearest_levels_of_each_group(coding, length):
    """A loop over groups and values, with the scales that were found."""
    values = randn(3, length)
    codes, scales = quantize_groups(values, coding, 16)
    assert scales.shape == (3, -(-length // 16))
    assert scales.dtype == torch.float16
    rounded = dequantize_groups(codes, scales.float(), coding, 16)
    for row in range(3):
        for place in range(length):
            levels = LEVELS[coding] * scales[row, place // 16].float()
            value = values[row, place]
            assert rounded[row, place] == levels[codes[row, place].long()]
            assert (rounded[row, place] - value).abs() <= (levels - value).abs().min() + 1e-6


@integers_of
@pytest.mark.parametrize("weighted", [False, True])
def test_the_search_is_about_as_good_as_a_long_one_and_never_worse_than_the_largest_value(coding, weighted):
    bits = VALUE_BITS[coding]
    values = randn(300, 32)
    weights = randn(300, 32, seed=1).square() if weighted else None
    counted = 1.0 if weights is None else weights
    found = error(values, round_groups(values, coding, 32, weights=weights), counted)
    longer = torch.stack(
        [
            error(values, nearest(values, values.abs().amax(1, keepdim=True) * sign / step, bits), counted)
            for sign in (-1, 1)
            for step in torch.linspace(2 ** (bits - 1) * 0.4, 2 ** (bits - 1) * 2, 300)
        ]
    ).amin(0)
    assert found.sum() <= 1.03 * longer.sum()
    largest = values.gather(1, values.abs().argmax(1, keepdim=True))
    unclipped = error(values, nearest(values, largest / (0.25 - 2 ** (bits - 1)), bits), counted)
    assert (found <= 1.001 * unclipped).all()
    assert found.sum() < 0.97 * unclipped.sum()
    if weighted:
        assert found.sum() < error(values, round_groups(values, coding, 32), counted).sum()


def nearest(values, scales, bits):
    """Values on the nearest levels of scales that are kept in full."""
    half = 2 ** (bits - 1)
    return ((values / scales - 0.25).round().clamp(-half, half - 1) + 0.25) * scales


@exact_of
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("spread", [1e-12, 1.0, 1e12])
def test_ternary_and_binary_are_the_best_of_all_codes(coding, weighted, spread):
    """Every choice of codes, each with its least-squares scale."""
    values = randn(200, 6) * spread
    weights = randn(200, 6, seed=1).square() if weighted else torch.ones(200, 6)
    rounded = round_groups(
        values, coding, 6, scale_dtype=torch.float32, weights=weights if weighted else None
    )
    places = torch.tensor(list(product(LEVELS[coding].tolist(), repeat=6)), dtype=torch.float64)
    values, weights = values.double() / spread, weights.double()
    cross, square = (values * weights) @ places.T, weights @ places.square().T
    best = (weights * values.square()).sum(1) - (cross.square() / square.clamp(min=1e-30)).amax(1)
    torch.testing.assert_close(error(values, rounded.double() / spread, weights), best, rtol=1e-5, atol=1e-6)


def test_the_scale_of_binary_values_is_their_mean_magnitude():
    values = randn(7, 40)
    rounded = round_groups(values, "binary", 40, scale_dtype=torch.float32)
    torch.testing.assert_close(rounded, values.sign() * values.abs().mean(1, keepdim=True))


def test_the_levels_of_nf4_are_the_published_ones():
    """Appendix E of QLoRA."""
    negative = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]
    positive = [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    torch.testing.assert_close(LEVELS["nf4"], torch.tensor(negative + positive), rtol=0, atol=5e-7)


def test_nf4_agrees_with_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    values = 0.05 * randn(64, 192)
    codes, scales = quantize_groups(values, "nf4", 64, scale_dtype=torch.float32)
    packed, state = functional.quantize_4bit(values, blocksize=64, quant_type="nf4")
    assert torch.equal(scales.flatten(), state.absmax)
    theirs = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).view(codes.shape)
    assert torch.equal(codes, theirs)
    rounded = dequantize_groups(codes, scales, "nf4", 64)
    torch.testing.assert_close(rounded, functional.dequantize_4bit(packed, state), rtol=1e-6, atol=1e-7)


def test_more_bits_and_smaller_groups_leave_less_error():
    values = randn(64, 128)
    errors = [error(values, round_groups(values, coding, 32)).mean() / 128 for coding in CODINGS]
    expected = torch.tensor([0.0065, 0.0261, 0.0978, 0.178, 0.353, 0.0076])
    assert torch.allclose(torch.stack(errors), expected, rtol=0.05)
    for coding in ("int3", "ternary", "binary"):
        by_group = [error(values, round_groups(values, coding, group)).mean() for group in (8, 32, 128)]
        assert by_group == sorted(by_group)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(CODINGS),
    st.integers(1, 40),
    st.integers(1, 33),
    st.integers(1, 12),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.integers(0, 99),
)
def test_rounding_again_changes_nothing(coding, group, length, tries, dtype, seed):
    values = 0.05 * randn(5, length, seed=seed)
    once = round_groups(values, coding, group, scale_dtype=dtype, tries=tries)
    assert torch.equal(round_groups(once, coding, group, scale_dtype=dtype), once)
    assert torch.equal(round_groups(once, coding, group, scale_dtype=dtype, tries=1), once)


@coding_of
def test_groups_of_zeros_and_of_one_value_are_exact(coding):
    values = torch.cat([torch.zeros(2, 8), torch.full((1, 8), -0.75), torch.eye(1, 8)])
    rounded = round_groups(values, coding, 8)
    assert torch.equal(rounded[:2], values[:2])
    assert torch.allclose(rounded[2], values[2], rtol=1e-3)
    assert torch.isfinite(rounded).all()
    assert round_groups(torch.empty(1, 0), coding, 8).shape == (1, 0)


@coding_of
def test_other_dtypes_come_back_as_they_were_and_carry_no_gradient(coding):
    values = randn(4, 8).bfloat16().requires_grad_()
    rounded = round_groups(values, coding, 8, weights=torch.zeros(4, 8))
    assert rounded.dtype == torch.bfloat16
    assert not rounded.requires_grad
    assert torch.isfinite(rounded).all()


@coding_of
@pytest.mark.parametrize("length", [16, 19])
def test_refitted_scales_are_the_least_squares_ones(coding, length):
    values, codes = randn(3, length), torch.randint(0, len(LEVELS[coding]), (3, length), dtype=torch.uint8)
    codes[:, ::8] = len(LEVELS[coding]) - 1  # a group of zeros has no best scale
    scales = low_bit.refit_scales(values, low_bit.levels(codes, coding, torch.float32), 8)
    assert scales.shape == (3, -(-length // 8))

    def left(scales):
        return (values - dequantize_groups(codes, scales, coding, 8)).square().sum()

    for part in scales.view(-1):
        for change in (1e-2, -1e-2):
            least = left(scales)
            part += change
            assert left(scales) > least
            part -= change


def test_scales_as_they_are_stored_keep_their_gradient():
    scales = torch.tensor([1.0001, 1e6, -3e-9], requires_grad=True)
    stored = low_bit.stored_scales(scales, torch.float16)
    assert stored.tolist() == [1.0, 65504.0, 0.0]
    stored.sum().backward()
    assert torch.equal(scales.grad, torch.ones(3))


@pytest.mark.parametrize(
    ("coding", "group", "tries", "said"),
    [("int8", 8, 1, "coding='int8'"), ("int4", 0, 1, "group=0"), ("int4", 8, 0, "tries=0")],
)
def test_settings_out_of_range_are_refused(coding, group, tries, said):
    with pytest.raises(SettingError, match=said):
        round_groups(torch.zeros(2, 8), coding, group, tries=tries)
