"""Which pipelines are compared for the order of two techniques, and the sentence that says what came out."""

import pytest

from stackcomp.studies.analysis import Cells, orders
from stackcomp.studies.study import Skipped
from tests.studies.analysis.made import row


def test_only_pipelines_that_differ_in_one_swap_of_neighbours_are_compared():
    rows = [
        row("a", "b", score=79.0, size=500, noise=0.3),
        row("b", "a", score=77.0, size=500, noise=0.4),
        row("a", "b", "c", score=78.0, size=400, noise=0.3),
        row("b", "a", "c", score=75.0, size=440, noise=0.4),
        row("a", "c", "b", score=60.0),  # not beside each other: no pair for a and b
        row("b", "c", "a", score=50.0),
    ]
    found = {(one.first, one.second): one for one in orders(Cells.of(rows))}
    ab = found["a", "b"]
    assert ab.pairs == 2
    assert ab.score.value == pytest.approx((2.0 + 3.0) / 2)
    assert ab.score.half == pytest.approx(0.5)
    assert (
        ab.words
        == "a before b changes the score by +2.50 ± 0.50 points against the other order; the file is 4.7% smaller."
    )
    assert found["b", "c"].pairs == 1  # a > b > c beside a > c > b


def test_what_is_within_the_noise_says_so():
    rows = [row("a", "b", score=79.0, noise=0.5), row("b", "a", score=78.6, noise=0.5)]
    (found,) = orders(Cells.of(rows))
    assert found.words == (
        "a before b or after it: the difference, +0.40 ± 0.71 points, is within the noise; before it the file is as large."
    )


def test_strengths_go_with_their_techniques():
    rows = [
        row(("a", "r=2"), ("b", ""), score=79.0),
        row(("b", ""), ("a", "r=4"), score=70.0),
        row(("b", ""), ("a", "r=2"), score=78.0),
    ]
    (found,) = orders(Cells.of(rows))
    assert (found.pairs, found.score.value) == (1, pytest.approx(1.0))


def test_only_common_seeds_are_compared_and_their_spread_counts():
    rows = [row("a", "b", seed=seed, score=79.0 + seed, noise=0.0) for seed in range(3)]
    rows += [row("b", "a", seed=seed, score=78.0 + 2 * seed, noise=0.0) for seed in range(2)]
    (found,) = orders(Cells.of(rows))
    assert found.score.value == pytest.approx((1.0 + 0.0) / 2)
    assert found.score.half == pytest.approx(12.706 * 0.5**0.5 / 2**0.5, rel=1e-3)


def test_orders_without_a_common_seed_are_not_compared():
    (found,) = orders(Cells.of([row("a"), row("b"), row("a", "b", seed=0), row("b", "a", seed=1)]))
    assert (found.pairs, found.score) == (0, None)


def test_the_same_file_either_way_is_said():
    rows = [row("a", "b", file_sha256="1"), row("b", "a", file_sha256="1")]
    (found,) = orders(Cells.of(rows))
    assert found.words == "a and b leave the same file in either order, byte by byte."
    assert (found.score.value, found.score.half) == (0.0, 0.0)  # one model: nothing is left to chance
    rows[1]["file_sha256"] = "2"
    assert not orders(Cells.of(rows))[0].same
    assert not orders(Cells.of([row("a", "b"), row("b", "a")]))[0].same  # rows from before digests were kept


def test_pairs_that_cannot_be_compared_say_why():
    def refused(*names):
        return Skipped(
            passes=names,
            strengths=("", ""),
            refused=names[1],
            why="requires 'float', which is missing on the weight of x",
        )

    rows = [row("a"), row("b"), row("a", "b")]
    for skipped, said in (
        ((), "have finished"),
        (
            (refused("b", "a"),),
            "Only a before b is legal: after it, a requires 'float', which is missing on the weight.",
        ),
        ((refused("a", "b"),), "Only b before a is legal: after it, b requires"),
        ((refused("a", "b"), refused("b", "a")), "a and b cannot be combined: b requires"),
    ):
        (found,) = orders(Cells.of(rows, skipped))
        assert found.score is None
        assert said in found.words
