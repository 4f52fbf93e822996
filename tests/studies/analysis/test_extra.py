"""Extra compression, interactions and the front, on rows whose figures can be worked out on paper."""

from math import log

import pytest

from stackcomp.core.errors import StudyRefused
from stackcomp.studies.analysis import Cells, extra, interactions, pareto
from stackcomp.studies.analysis.cells import estimate
from tests.studies.analysis.made import row

ROWS = [
    row("a", size=600, score=79.5, noise=0.1),
    row("b", size=800, score=79.9, noise=0.1),
    row("a", "b", size=400, score=79.4, noise=0.1, embeddings=50),
    row("b", "a", size=390, score=75.0, noise=0.1),
]


def test_the_smallest_single_against_the_smallest_stack_that_reach_the_floor():
    found = extra(Cells.of(ROWS), 79.0)
    assert (found.single.name, found.stack.name) == ("a", "a > b")
    assert found.value == pytest.approx(600 / 400 - 1)
    assert found.interval == pytest.approx((0.5, 0.5))
    assert found.drawn == pytest.approx(1.0)
    assert found.ceiling == pytest.approx(600 / 50 - 1)  # embeddings of the stack stay
    assert found.predicted == pytest.approx((1000 / 600) * (1000 / 800))
    assert found.found == pytest.approx(1000 / 400)


def test_it_says_how_sure_it_is_with_one_seed_too_and_counts_the_seeds_that_both_have():
    one = extra(Cells.of(ROWS), 79.0)
    assert one.sure == "one seed; the same in every draw of the scores"
    wide = extra(Cells.of([row("a", size=600, score=79.05, noise=1.0), *ROWS[1:]]), 79.0)
    assert wide.sure == "one seed; 95% interval +50% to +100%"
    more = [row("a", size=600, score=79.5, noise=0.1, seed=seed) for seed in (0, 1, 2)]
    assert extra(Cells.of([*more, ROWS[2]]), 79.0).seeds == 1
    apart = [row("a", "b", size=400, score=79.4, noise=0.1, seed=seed) for seed in (3, 4)]
    assert extra(Cells.of([*more, *apart]), 79.0).sure.startswith("no seed in common; ")
    both = [*more, *(row("a", "b", size=400, score=79.4, noise=0.1, seed=seed) for seed in (1, 2))]
    assert extra(Cells.of(both), 79.0).sure == "the same in every draw of the scores"


def test_the_encoder_is_everything_but_the_embeddings():
    found = extra(Cells.of(ROWS), 79.0, "encoder")
    assert found.value == pytest.approx((600 - 100) / (400 - 50) - 1)
    assert found.predicted == pytest.approx((900 / 500) * (900 / 700))
    assert found.ceiling is None


def test_noise_widens_the_interval_and_a_choice_that_noise_turns_over_is_in_it():
    rows = [row("a", size=600, score=79.05, noise=1.0), row("b", size=800, score=79.9, noise=0.0), ROWS[2]]
    found = extra(Cells.of(rows), 79.0)
    assert found.interval == pytest.approx((0.5, 1.0))  # 800 / 400 where `a` falls below the floor
    assert found.value == pytest.approx(0.5)
    rows = [ROWS[0], row("a", "b", size=400, score=79.0, noise=1.0)]
    assert extra(Cells.of(rows), 79.0).drawn == pytest.approx(0.5, abs=0.05)


def test_orders_that_left_the_same_file_are_one_chance_and_no_more():
    """Half of the draws let the stack reach the floor, however many orders made it; were they apart, three in four would."""

    def drawn(*digests):
        orders = ("a", "b"), ("b", "a")
        stacks = [
            row(*order, size=400, score=79.0, noise=1.0, file_sha256=digest)
            for order, digest in zip(orders, digests, strict=True)
        ]
        return extra(Cells.of([ROWS[0], *stacks]), 79.0).drawn

    assert drawn("one", "one") == pytest.approx(0.5, abs=0.05)
    for apart in (("one", "other"), (None, None)):
        assert drawn(*apart) == pytest.approx(0.75, abs=0.05)


def test_a_floor_that_nothing_reaches_names_the_best_and_the_gap():
    cells = Cells.of(ROWS)
    found = extra(cells, 79.95)
    assert (found.value, found.single, found.stack) == (None, None, None)
    assert [cell.name for cell in found.nearest] == ["b", "a > b"]
    assert cells.misses(found.nearest[1], 79.95) == pytest.approx(0.55)
    found = extra(cells, 79.6)
    assert found.value is None
    assert found.single.name == "b"


def test_lower_is_better_for_perplexity():
    rows = [
        {**one, "metric": "perplexity"}
        for one in (row("a", size=600, score=82.0), row("a", "b", size=300, score=85.0))
    ]
    for one in rows:
        one["steps"][0]["metric"] = "perplexity"
    cells = Cells.of(rows)
    assert extra(cells, 86.0).value == pytest.approx(1.0)
    assert extra(cells, 84.0).stack is None
    assert [cell.name for cell in pareto(cells)] == ["dense", "a", "a > b"]


def test_an_interaction_is_what_the_product_misses():
    cells = Cells.of(ROWS)
    (found,) = interactions(cells, cells.choice())
    assert found.orders == 2
    together = (log(1000 / 400) + log(1000 / 390)) / 2
    assert found.file.value == pytest.approx(together - log(1000 / 600) - log(1000 / 800))
    assert found.score.value == pytest.approx(((-0.6) + (-5.0)) / 2 + 0.5 + 0.1)
    assert found.score.half == pytest.approx((3 * 0.1**2) ** 0.5)
    assert interactions(Cells.of(ROWS[1:]), cells.choice()) == []
    recovered = Cells.of([row(score=81.0, noise=0.0), *ROWS])
    (after,) = interactions(recovered, cells.choice())
    assert after.score.value == pytest.approx(found.score.value + 1.0)


def test_independent_techniques_do_not_interact():
    rows = [row("a", size=500), row("b", size=250), row("a", "b", size=125)]
    cells = Cells.of(rows)
    (found,) = interactions(cells, cells.choice())
    assert found.file.value == pytest.approx(0)


def test_the_front_holds_what_nothing_beats_in_both():
    assert [cell.name for cell in pareto(Cells.of(ROWS))] == ["dense", "b", "a", "a > b", "b > a"]
    better = row(size=990, score=81.0)
    assert pareto(Cells.of([better, *ROWS]))[0].name == "recovery alone"
    beaten = row("c", size=650, score=79.5)
    assert "c" not in [cell.name for cell in pareto(Cells.of([*ROWS, beaten]))]


def test_seeds_are_one_cell_with_their_spread():
    rows = [row("a", seed=seed, score=score, noise=0.3) for seed, score in enumerate((79.0, 79.4, 79.8))]
    (cell,) = Cells.of(rows).cells
    assert cell.score == pytest.approx(79.4)
    assert cell.change.half == pytest.approx((0.3**2 + (4.303 * 0.4 / 3**0.5) ** 2) ** 0.5, rel=1e-3)
    assert estimate([1.0], [0.2]).half == pytest.approx(0.2)


def test_rows_that_cannot_be_compared_and_no_rows_are_refused():
    with pytest.raises(StudyRefused, match="more than one task"):
        Cells.of([ROWS[0], {**ROWS[1], "task": "other"}])
    for rows in ([], [{**ROWS[0], "error": {}}], [{**ROWS[0], "labels": {}}], [row()]):
        with pytest.raises(StudyRefused, match="run the study first"):
            Cells.of(rows)
