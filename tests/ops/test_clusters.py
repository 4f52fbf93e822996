"""K-means in one dimension: nearest levels, falling error, and parity with the best of all partitions."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackcomp.core.errors import SettingError
from stackcomp.ops import cluster, clusters, round_groups

BITS = st.integers(1, 4)
SEEDS = st.integers(0, 10_000)
KINDS = ["normal", "heavy", "few", "wide"]


def drawn(kind, books, n, seed):
    """Lines of weights of some kind."""
    chance = torch.Generator().manual_seed(seed)
    values = torch.randn(books, n, generator=chance)
    match kind:
        case "heavy":
            return values**3
        case "few":
            return values.mul(2).round()
        case "wide":
            return values.masked_fill(torch.rand(books, n, generator=chance) < 0.02, 300.0)
    return values


def shared(values, bits, **how):
    """The values as they are read again, by a loop over lines."""
    codes, levels = cluster(values, bits, **how)
    return torch.stack([line[code.long()] for line, code in zip(levels.float(), codes, strict=True)])


def error(values, found):
    return (values - found).double().square().sum(1)


def best(values, k):
    """Least squared error of k levels for one line: by dynamic programming over all cuts of the sorted values."""
    x = values.double().sort().values
    sums, squares = (torch.nn.functional.pad(part.cumsum(0), (1, 0)) for part in (x, x.square()))
    first, last = (torch.arange(len(x) + 1).view(shape) for shape in ((-1, 1), (1, -1)))
    count = (last - first).clamp(min=1)
    cost = (squares[last] - squares[first]) - (sums[last] - sums[first]).square() / count
    cost = torch.where(last >= first, cost, torch.inf)
    left = cost[0]
    for _ in range(k - 1):
        left = (left[:, None] + cost).amin(0)
    return left[-1]


@settings(max_examples=20, deadline=None)
@given(kind=st.sampled_from(KINDS), bits=BITS, books=st.integers(1, 3), n=st.integers(1, 90), seed=SEEDS)
def test_codes_are_those_of_the_nearest_level(kind, bits, books, n, seed):
    values = drawn(kind, books, n, seed)
    codes, levels = cluster(values, bits)
    assert (codes.dtype, levels.dtype) == (torch.uint8, torch.float16)
    assert (codes.shape, levels.shape) == (values.shape, (books, 2**bits))
    assert (levels.diff(dim=1) >= 0).all()
    distances = (values[..., None] - levels.float()[:, None]).abs()
    assert torch.equal(distances.gather(2, codes.long()[..., None]).squeeze(2), distances.amin(2))
    again = cluster(values, bits)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], levels)


@settings(max_examples=20, deadline=None)
@given(kind=st.sampled_from(KINDS), bits=BITS, n=st.integers(1, 200), seed=SEEDS)
def test_no_round_raises_the_error(kind, bits, n, seed):
    values = drawn(kind, 2, n, seed)
    errors = [error(values, shared(values, bits, level_dtype=torch.float32, rounds=r)) for r in range(4)]
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-5) + 1e-9).all()


@settings(max_examples=20, deadline=None)
@given(kind=st.sampled_from(KINDS), bits=st.sampled_from([2, 3, 4]), n=st.integers(1, 300), seed=SEEDS)
def test_free_levels_are_no_worse_than_evenly_spaced_ones(kind, bits, n, seed):
    values = drawn(kind, 2, n, seed)
    evenly = error(values, round_groups(values, f"int{bits}", n))
    assert (error(values, shared(values, bits)) <= evenly * 1.001 + 1e-6 * values.square().sum(1)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "more"), [(60, 1 + 1e-4), (300, 1.05)])
def test_it_is_as_good_as_the_best_partition(kind, bits, n, more):
    """Exactly where every cut is a candidate."""
    values = drawn(kind, 4, n, 7)
    found = error(values, shared(values, bits, level_dtype=torch.float32))
    least = torch.stack([best(line, 2**bits) for line in values])
    slack = 1e-9 * values.double().square().sum(1)
    assert (found >= least * (1 - 1e-4) - slack).all()
    assert (found <= more * least + slack).all()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-100, 100, width=16), min_size=1, max_size=8), st.integers(1, 40), SEEDS)
def test_values_no_more_than_levels_are_kept(pool, n, seed):
    chance = torch.Generator().manual_seed(seed)
    values = torch.tensor(pool)[torch.randint(0, len(pool), (2, n), generator=chance)]
    # two values that are nearer than this cost less apart than sums of squares can tell
    assert (shared(values, 3) - values).abs().max() <= 1e-7 * values.abs().max()


def test_constant_and_empty_lines():
    assert torch.equal(shared(torch.full((2, 9), -0.75), 2), torch.full((2, 9), -0.75))
    assert torch.equal(shared(torch.zeros(2, 9), 2), torch.zeros(2, 9))
    codes, levels = cluster(torch.empty(1, 0), 3)
    assert codes.shape == (1, 0)
    assert not levels.any()


def test_every_line_is_clustered_by_itself():
    values = drawn("heavy", 5, 64, 3)
    alone = torch.cat([shared(line[None], 3) for line in values])
    assert torch.equal(shared(values, 3), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_level_is_the_sum_over_its_members(dtype):
    codes, levels = cluster(drawn("normal", 2, 4000, 1), 2)
    levels = levels.to(dtype).requires_grad_()
    book = torch.arange(2)[:, None]
    assert torch.equal(clusters.look_up(levels, codes, book)[1], levels[1][codes[1].long()])
    clusters.look_up(levels, codes, book).sum().backward()
    members = torch.stack([line.bincount(minlength=4) for line in codes])
    assert torch.equal(levels.grad, members.to(dtype))


@pytest.mark.parametrize(
    ("settings", "said"), [({"bits": 9}, "bits=9"), ({"bits": 2, "rounds": -1}, "rounds=-1")]
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(SettingError, match=said):
        cluster(torch.zeros(1, 4), **settings)
