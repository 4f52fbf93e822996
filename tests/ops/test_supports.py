import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackcomp.core.errors import CheckpointError
from stackcomp.core.matrices import Fixed, Free
from stackcomp.ops import pack_fixed, pack_free, unpack_fixed, unpack_free


def supports(rows, blocks, b, s, seed=0):
    scores = torch.rand(rows, blocks, b, generator=torch.Generator().manual_seed(seed))
    return scores.argsort(-1)[..., :s].sort(-1).values


@given(st.data(), st.integers(1, 6), st.integers(1, 4), st.integers(1, 90), st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_round_trip_in_exactly_the_bytes_promised(data, rows, blocks, b, seed):
    s = data.draw(st.integers(1, b))
    indices = supports(rows, blocks, b, s, seed)
    layout = Fixed(block=b, nonzeros=s)
    packed = pack_fixed(indices, b)
    assert packed.dtype == torch.uint8
    assert packed.shape == (layout.support_bytes(rows, blocks * b),)
    assert torch.equal(unpack_fixed(packed, layout, rows, blocks), indices)


@pytest.mark.parametrize(
    ("b", "s"),
    [(256, 32), (64, 32), (66, 33), (67, 33), (300, 150), (1000, 3), (61, 60), (1111, 455), (1423, 424)],
)
def test_round_trip_on_both_sides_of_a_machine_word(b, s):
    indices = supports(9, 2, b, s)  # the last two beyond what a double holds
    indices[0, 0] = torch.arange(s)  # the lowest rank
    indices[1, 0] = torch.arange(b - s, b)  # and the highest
    packed = pack_fixed(indices, b)
    assert torch.equal(unpack_fixed(packed, Fixed(block=b, nonzeros=s), 9, 2), indices)


def test_rank_is_that_of_the_combinatorial_number_system():
    for s in (1, 2, 3):
        subsets = sorted(combinations(range(5), s), key=lambda subset: subset[::-1])
        for rank, subset in enumerate(subsets):
            packed = pack_fixed(torch.tensor([[subset]]), 5)
            assert packed.tolist() == [rank]


def test_small_ranks_share_a_word():
    assert Fixed(block=4, nonzeros=2).ranks_per_word == 24
    assert pack_fixed(supports(24, 8, 4, 2), 4).numel() == 63  # 192 ranks in 8 words of 63 bits


def test_close_to_the_entropy():
    rows, blocks, b, s = 300, 4, 64, 16
    bits = 8 * pack_fixed(supports(rows, blocks, b, s), b).numel()
    assert bits <= (math.log2(math.comb(b, s)) + 1) * rows * blocks + 8


def test_a_full_support_takes_nothing():
    indices = torch.arange(7).repeat(3, 2, 1)
    packed = pack_fixed(indices, 7)
    assert packed.numel() == 0
    assert torch.equal(unpack_fixed(packed, Fixed(block=7, nonzeros=7), 3, 2), indices)


@pytest.mark.parametrize("bad", [[1, 1], [2, 1], [-1, 0], [0, 4]])
def test_indices_that_are_no_support_are_refused(bad):
    with pytest.raises(ValueError, match="ascend"):
        pack_fixed(torch.tensor([[bad]]), 4)


@pytest.mark.parametrize(("b", "s"), [(6, 3), (128, 40)])
def test_bytes_that_stand_for_no_support_are_refused(b, s):
    layout = Fixed(block=b, nonzeros=s)
    packed = pack_fixed(supports(1, 1, b, s), b)
    with pytest.raises(CheckpointError, match="no support"):
        unpack_fixed(torch.full_like(packed, 255), layout, 1, 1)
    with pytest.raises(CheckpointError, match="bytes"):
        unpack_fixed(packed[:-1], layout, 1, 1)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_bitmap_round_trip(rows, cols, seed):
    mask = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < 0.4
    packed = pack_free(mask)
    kept = int(mask.sum())
    assert packed.numel() == Free(nonzeros=kept).support_bytes(rows, cols)
    assert torch.equal(unpack_free(packed, kept, rows, cols), mask)
    with pytest.raises(CheckpointError, match="expected"):
        unpack_free(packed, kept + 1, rows, cols)
