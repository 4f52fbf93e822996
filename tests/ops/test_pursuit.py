"""Sparse coding by matrix products: the same answers as each row's own equations, and never a worse code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackcomp.ops import pursuit
from stackcomp.ops.sparse_coding import factor_supports, gather, omp, scatter, solve


def gain(gram: torch.Tensor, correlations: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    return pursuit.gain(correlations, pursuit.unexplained(gram, correlations, code), code)


def problem(rows: int, atoms: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.nn.functional.normalize(torch.randn(atoms, width, generator=generator), dim=1)
    target = torch.randn(rows, width, generator=generator)
    return dictionary @ dictionary.T, target @ dictionary.T


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), groups=st.sampled_from([1, 2, 4]), kept=st.integers(1, 3))
def test_descending_far_enough_solves_least_squares_on_the_support(seed, groups, kept):
    gram, correlations = problem(6, 12, 20, seed)
    score = torch.rand(1, 6, 12, generator=torch.Generator().manual_seed(seed))
    mask = pursuit.strongest(score, kept, 12 // groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pursuit, "ENOUGH", -1.0)
        code = pursuit.descend(gram[None], correlations[None], torch.zeros(1, 6, 12), mask, 40)[0]
    support = mask[0].unflatten(1, (groups, -1)).nonzero()[:, 2].view(6, groups, kept)
    exact = solve(factor_supports(gram, support), gather(correlations, support))
    torch.testing.assert_close(code, scatter(support, exact, 12 // groups), rtol=1e-3, atol=1e-3)
    assert (code[~mask[0]] == 0).all()


@pytest.mark.parametrize("group", [6, 12])
def test_an_exchange_keeps_the_count_and_never_loses(group: int):
    gram, correlations = (part[None] for part in problem(40, 12, 8, 3))
    inverse = torch.linalg.inv(gram + 1e-4 * torch.eye(12))
    code, mask = pursuit.first_code(gram, inverse, correlations, nonzeros=2, group=group, steps=8)
    before = gain(gram, correlations, code)
    for _ in range(4):
        code, mask = pursuit.exchange(
            gram, correlations, code, mask, nonzeros=2, group=group, count=1, steps=8
        )
        after = gain(gram, correlations, code)
        assert (after >= before - 1e-6).all()
        assert (mask.unflatten(2, (-1, group)).sum(3) == 2).all()
        assert (code[~mask] == 0).all()
        before = after


@pytest.mark.parametrize("group", [6, 12])
def test_an_exchange_narrows_rows_that_have_more_and_only_those_may_lose(group: int):
    gram, correlations = (part[None] for part in problem(40, 12, 16, 3))
    inverse = torch.linalg.inv(gram + 1e-4 * torch.eye(12))
    start = {"group": group, "steps": 8}
    wide, wide_mask = pursuit.first_code(gram, inverse, correlations, nonzeros=4, **start)
    narrow, narrow_mask = pursuit.first_code(gram, inverse, correlations, nonzeros=2, **start)
    code, mask = (
        torch.cat([wide[:, :20], narrow[:, 20:]], 1),
        torch.cat([wide_mask[:, :20], narrow_mask[:, 20:]], 1),
    )
    before = gain(gram, correlations, code)
    code, mask = pursuit.exchange(gram, correlations, code, mask, nonzeros=2, count=1, **start)
    after = gain(gram, correlations, code)
    assert (mask.unflatten(2, (-1, group)).sum(3) == 2).all()
    assert (after < before)[0, :20].any()
    assert (after >= before - 1e-6)[0, 20:].all()


def test_it_finds_codes_as_good_as_matching_pursuit():
    gram, correlations = problem(400, 32, 48, 5)
    support, values = omp(gram, correlations, 8)
    greedy = gain(gram[None], correlations[None], scatter(support, values, 32)[None]).mean()
    inverse = torch.linalg.inv(gram + 1e-4 * torch.eye(32))[None]
    code, mask = pursuit.first_code(gram[None], inverse, correlations[None], nonzeros=8, group=32, steps=8)
    for _ in range(3):
        code, mask = pursuit.exchange(
            gram[None], correlations[None], code, mask, nonzeros=8, group=32, count=2, steps=8
        )
    assert gain(gram[None], correlations[None], code).mean() > 0.995 * greedy


def test_a_converged_row_stays_where_it_is():
    gram, correlations = torch.eye(4)[None], torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])
    mask = torch.tensor([[[True, False, False, True]]])
    code = pursuit.descend(gram, correlations, torch.zeros(1, 1, 4), mask, 50)
    torch.testing.assert_close(code, torch.tensor([[[1.0, 0.0, 0.0, 2.0]]]))


def test_a_descent_ends_where_steps_gain_little():
    gram, correlations = torch.eye(4)[None], torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])
    everywhere = torch.ones(1, 1, 4, dtype=torch.bool)
    twice = pursuit.descend(gram, correlations, torch.zeros(1, 1, 4), everywhere, 2)
    often = pursuit.descend(gram, correlations, torch.zeros(1, 1, 4), everywhere, 10**9)
    assert torch.equal(twice, often)
