"""Shapley values: a case worked out by hand, their four axioms, and what is said where they are undefined."""

from math import exp, log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackcomp.core.errors import StudyRefused
from stackcomp.studies.analysis import Cells, attribution, interactions
from stackcomp.studies.analysis.attribution import coalitions, shapley_weights
from stackcomp.studies.study import Skipped
from tests.studies.analysis.made import row

PLAYERS = ("a", "b", "c", "d")
values = st.floats(-100, 100, allow_nan=False)


def shapley(players, game):
    """The value of every player; `game` gives that of every subset."""
    return {
        player: sum(weight * game[coalition] for coalition, weight in of.items())
        for player, of in shapley_weights(players).items()
    }


@st.composite
def games(draw, players=PLAYERS):
    """A value for every subset of 1 to 4 players."""
    count = draw(st.integers(1, len(players)))
    return {coalition: draw(values) for coalition in coalitions(players[:count])}


def everyone(game):
    return sorted(max(game, key=len))


@settings(deadline=None)
@given(games())
def test_the_values_sum_to_what_all_bring(game):
    players = everyone(game)
    assert sum(shapley(players, game).values()) == pytest.approx(
        game[frozenset(players)] - game[frozenset()], abs=1e-9
    )


@settings(deadline=None)
@given(games())
def test_two_players_that_bring_the_same_get_the_same(game):
    players = everyone(game)
    twin = {  # z stands for a: either of them brings what a brings, the other then nothing
        coalition: game[coalition - {"z"} | {"a"} if "z" in coalition else coalition]
        for coalition in coalitions([*players, "z"])
    }
    found = shapley([*players, "z"], twin)
    assert found["a"] == pytest.approx(found["z"], abs=1e-9)


@settings(deadline=None)
@given(games())
def test_a_player_that_brings_nothing_gets_nothing_and_takes_nothing(game):
    players = everyone(game)
    idle = {coalition: game[coalition - {"z"}] for coalition in coalitions([*players, "z"])}
    found = shapley([*players, "z"], idle)
    assert found.pop("z") == pytest.approx(0, abs=1e-9)
    assert found == pytest.approx(shapley(players, game), abs=1e-9)


@settings(deadline=None)
@given(st.data())
def test_the_values_of_a_sum_are_the_sums_of_the_values(data):
    one = data.draw(games())
    players = everyone(one)
    other = {coalition: data.draw(values) for coalition in one}
    both = {coalition: one[coalition] + other[coalition] for coalition in one}
    alone = shapley(players, one), shapley(players, other)
    assert shapley(players, both) == pytest.approx(
        {name: alone[0][name] + alone[1][name] for name in players}, abs=1e-9
    )


def test_the_glove_game():
    """One left glove, two right ones, a pair is worth 1: by hand 2/3, 1/6, 1/6."""
    game = {
        coalition: float("left" in coalition and len(coalition) > 1)
        for coalition in coalitions(["left", "r", "s"])
    }
    assert shapley(["left", "r", "s"], game) == pytest.approx({"left": 2 / 3, "r": 1 / 6, "s": 1 / 6})


# two techniques: halving and a quarter off; together 1000 -> 400 in one order, 1000 -> 360 in the other
ROWS = [
    row("half", size=500, score=79.0, latency=0.5),
    row("quarter", size=750, score=80.5, latency=1.0),
    row("half", "quarter", size=400, score=78.0, noise=0.4, latency=0.5),
    row("quarter", "half", size=360, score=77.0, noise=0.6, latency=0.25),
]


def test_a_stack_of_two_by_hand():
    cells = Cells.of(ROWS)
    found = attribution(cells, cells.choice(), "file")
    both = (log(1000 / 400) + log(1000 / 360)) / 2
    assert found.orders == 2
    assert found.total.value == pytest.approx(both)
    assert found.shares["half"].value == pytest.approx((log(2) + both - log(4 / 3)) / 2)
    assert found.without["half"].value == pytest.approx(both - log(4 / 3))
    assert found.total.half == 0
    score = attribution(cells, cells.choice(), "score")
    assert score.total.value == pytest.approx(-2.5)
    assert score.total.half == pytest.approx(
        0.5
    )  # both orders are scored on the same examples: the mean noise
    assert score.shares["half"].value == pytest.approx((-1.0 + (-2.5 - 0.5)) / 2)
    assert score.shares["half"].half == pytest.approx((0.5**2 * 3) ** 0.5 / 2)  # of half, quarter and both
    speed = attribution(cells, cells.choice(), "speed")
    assert exp(speed.total.value) == pytest.approx(8**0.5)
    assert speed.shares["quarter"].value == pytest.approx(log(8) / 2 / 2 - log(2) / 2)


def test_nothing_is_what_recovery_alone_leaves():
    cells = Cells.of([row(score=81.0), *ROWS])
    found = attribution(cells, cells.choice(), "score")
    assert found.total.value == pytest.approx(-3.5)
    assert sum(one.value for one in found.shares.values()) == pytest.approx(-3.5)


def test_a_missing_subset_leaves_it_undefined_and_says_which_and_why():
    cells = Cells.of(ROWS[:2])
    assert attribution(cells, cells.choice(), "file").undefined == "half with quarter: not run yet"
    why = "requires 'dense', which is missing on the weight of layer 0"
    illegal = [
        Skipped(passes=names, strengths=("", ""), refused="half", why=why)
        for names in (("half", "quarter"), ("quarter", "half"))
    ]
    assert attribution(Cells.of(ROWS[:2], illegal[:1]), cells.choice(), "file").undefined.endswith(
        "not run yet"
    )
    found = attribution(Cells.of(ROWS[:2], illegal), cells.choice(), "file")
    assert found.undefined == (
        "half with quarter: no order is legal: half requires 'dense', which is missing on the weight"
    )
    assert (found.total, found.shares) == (None, {})
    failed = {**ROWS[2], "error": {"type": "BadWeights", "message": "NaN"}}
    assert (
        "failed with BadWeights: NaN"
        in attribution(Cells.of([*ROWS[:2], failed]), cells.choice(), "file").undefined
    )


def test_a_subset_of_which_some_orders_have_not_finished_is_named():
    failed = {**ROWS[3], "error": {"type": "BadWeights", "message": "NaN"}}
    for cells in (
        Cells.of([*ROWS[:3], failed]),
        Cells.of(ROWS[:3], planned=[(("half", "quarter"), ("", "")), (("quarter", "half"), ("", ""))]),
    ):
        found = attribution(cells, cells.choice(), "file")
        assert (found.orders, found.partial) == (1, {"half with quarter": "1 of 2"})
    assert attribution(Cells.of(ROWS), Cells.of(ROWS).choice(), "file").partial == {}


def test_before_recovery_alone_has_finished_nothing_is_attributed():
    failed = {**row(), "error": {"type": "BadWeights", "message": "NaN"}}
    cells = Cells.of([failed, *ROWS])
    assert attribution(cells, cells.choice(), "file").undefined == "dense: failed with BadWeights: NaN"
    assert interactions(cells, cells.choice()) == []
    cells = Cells.of(ROWS, planned=[((), ())])
    assert attribution(cells, cells.choice(), "score").undefined == "dense: not run yet"
    assert cells.ran == cells.cells


def test_a_technique_that_failed_at_every_strength_says_so_and_one_that_never_ran_is_not_forgotten():
    error = {"error": {"type": "BadWeights", "message": "NaN"}}
    failed = [{**row(("bits", f"bits={bits}")), **error} for bits in (4, 8)]
    cells = Cells.of([ROWS[0], *failed])
    assert attribution(cells, cells.choice(), "file").undefined == "bits: failed with BadWeights: NaN"
    assert cells.awaited == ["bits bits=4", "bits bits=8"]
    cells = Cells.of(ROWS, planned=[(("other",), ("",))])
    assert attribution(cells, cells.choice(), "file").undefined == "other: not run yet"


def test_speed_that_was_not_measured_is_not_made_up():
    cells = Cells.of([row("half", size=500), *ROWS[1:]])
    assert attribution(cells, cells.choice(), "speed").undefined == "speed was not measured"


def test_each_technique_counts_at_the_strength_that_was_chosen():
    rows = [row(("half", "r=2"), size=500), row(("half", "r=4"), size=250)]
    cells = Cells.of(rows)
    assert cells.choice() == {"half": "r=2"}
    assert exp(attribution(cells, cells.choice(cells.cells[1]), "file").total.value) == pytest.approx(4)


def test_rows_that_cannot_be_compared_with_the_model_as_it_came_are_refused_by_name():
    with pytest.raises(StudyRefused, match="1 rows, 'b/0' the first of them, have no difference"):
        Cells.of([row("a"), row("b", difference=None, difference_noise=None)])
    with pytest.raises(StudyRefused, match="no pipeline of a combination has finished"):
        Cells.of([row()])
