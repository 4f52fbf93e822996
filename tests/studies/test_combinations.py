"""Which pipelines a study of combinations has: all legal ones, each beginning once, all with the same recovery."""

import itertools

import pytest

import stackcomp as sc
from stackcomp.core import contract, headers
from stackcomp.core.errors import SettingError, StudyRefused
from stackcomp.studies.forecast import forecast
from tests import toys
from tests.studies.counted import entry

APART = {
    "prune": sc.MagnitudePrune(only="*.attention"),
    "inner": sc.Int8Weights(only="*.intermediate"),
    "outer": sc.Int8Weights(only="encoder.layer.*[0-9].output"),
    "words": sc.LowBitWeights(only="embeddings.word_embeddings"),
}
TUNE = sc.FineTune(steps=2)


def made(folder, passes, **settings):
    return sc.combinations(
        name="toy", model=folder, task=toys.classification_task(), passes=passes, **settings
    )


def names(study):
    return [entry.key.removesuffix("/0") for entry in study.entries]


def test_all_orders_of_four_are_sixty_four_runs_and_not_one_hundred_and_ninety_six(folder):
    found = made(folder, APART)
    assert len(found.entries) == 64
    assert found.skipped == ()
    ahead = forecast(found.entries, (), [])
    assert (sum(ahead.passes.values()), ahead.saved) == (64, 132)
    place = {key: index for index, key in enumerate(names(found))}
    assert all(place[key.rpartition(" > ")[0]] < place[key] for key in place if " > " in key)


def test_one_pass_under_two_names_is_refused_by_the_later_name(folder):
    item = sc.Int8Weights()
    found = made(folder, {"first": item, "second": item})
    assert {one.passes: one.refused for one in found.skipped} == {
        ("first", "second"): "second",
        ("second", "first"): "first",
    }


def test_what_is_run_is_what_the_contracts_allow_and_what_is_not_has_their_words(folder):
    passes = {
        "factors": sc.LowRank(data_aware=False),
        "prune": sc.MagnitudePrune(),
        "int8": sc.Int8Weights(),
    }
    found, plan = made(folder, passes), headers.plan_of(folder)
    orders = [order for size in (1, 2, 3) for order in itertools.permutations(passes, size)]
    legal = {order for order in orders if contract.legal([passes[name] for name in order], plan)}
    assert {tuple(one.labels["passes"]) for one in found.entries} == legal
    assert {one.passes for one in found.skipped} == set(orders) - legal
    assert ("factors", "prune", "int8") in legal
    skipped = {one.passes: one for one in found.skipped}
    assert skipped["int8", "prune"].refused == "prune"
    assert skipped["int8", "prune"].reason == "prune requires 'float', which is missing on the weight"
    assert "since step 1, Int8Weights, took it away" in skipped["int8", "prune"].why
    assert skipped["prune", "factors", "int8"].refused == "factors"
    assert f"{len(found.skipped)} illegal pipelines are left out" in found.left_out()


@pytest.mark.parametrize(
    ("useless", "said"),
    [
        (sc.STF(), "works on parts that are"),
        (sc.MagnitudePrune(only="nothing.*"), r"only='nothing\.\*' matches no layer"),
    ],
)
def test_a_technique_that_no_contract_ever_allows_is_refused_with_its_words(folder, useless, said):
    with pytest.raises(StudyRefused, match=f"'odd' is in no legal pipeline; alone: odd .*{said}"):
        made(folder, {"odd": useless, "int8": sc.Int8Weights()})
    with pytest.raises(StudyRefused, match=said):
        made(folder, {"odd": useless})


def test_every_pipeline_has_the_same_recovery_whichever_way(folder):
    passes = {name: APART[name] for name in ("prune", "inner")}
    found = made(folder, passes, recovery=TUNE)
    assert names(found) == ["dense", "prune", "prune > inner", "inner", "inner > prune"]
    assert [[item.name for item in one.passes] for one in found.entries][2] == [
        "MagnitudePrune",
        "Int8Weights",
        "FineTune",
    ]
    assert all([*one.passes].count(TUNE) == 1 == one.passes[::-1].index(TUNE) + 1 for one in found.entries)
    found = made(folder, passes, recovery=TUNE, recover="each")
    assert all([*one.passes].count(TUNE) == 2 for one in found.entries)
    assert [item.name for item in found.entries[2].passes] == [
        "MagnitudePrune",
        "FineTune",
        "Int8Weights",
        "FineTune",
    ]
    assert found.entries[0].labels["passes"] == []


def test_strengths_are_told_apart_by_what_differs_and_never_stacked_on_themselves(folder):
    passes = {
        "prune": [sc.MagnitudePrune(sparsity=share, only="*.attention") for share in (0.3, 0.5)],
        "inner": APART["inner"],
    }
    found = made(folder, passes)
    assert names(found)[:3] == ["prune sparsity=0.3", "prune sparsity=0.3 > inner", "prune sparsity=0.5"]
    assert found.entries[1].labels == {"passes": ["prune", "inner"], "strengths": ["sparsity=0.3", ""]}
    assert len(found.entries) == 2 + 1 + 2 * 2


def test_seeds_follow_one_another_and_a_model_that_is_made_comes_first(folder):
    tuned = entry("tuned", folder, TUNE)
    found = made(tuned, {"int8": sc.Int8Weights()}, seeds=(0, 3))
    assert [one.key for one in found.entries] == ["tuned", "int8/0", "int8/3"]
    assert found.entries[2].seed == 3
    assert found.entries[2].parent is tuned
    found.check()


def test_some_pipelines_have_further_seeds(folder):
    passes = {name: APART[name] for name in ("prune", "words")}
    found = made(folder, passes, recovery=TUNE, again={"dense": (1, 2), "words > prune": (2, 0)})
    keys = [one.key for one in found.entries]
    assert keys[5:] == ["dense/1", "dense/2", "words > prune/2"]
    assert all(key.endswith("/0") for key in keys[:5])
    assert found.entries[-1].pipeline == found.entries[keys.index("words > prune/0")].pipeline
    with pytest.raises(SettingError, match="no legal pipeline of the study is named 'prune/0'"):
        made(folder, passes, again={"prune/0": (1,)})
    with pytest.raises(SettingError, match="3 is no sequence of seeds of 'prune'"):
        made(folder, passes, again={"prune": 3})


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ({}, "holds no technique"),
        ({"a > b": sc.Int8Weights()}, "'a > b' is no name"),
        ({"dense": sc.Int8Weights()}, "the model without a technique"),
        ({"-": sc.Int8Weights()}, "leaves out"),
        ({"a": []}, "give a pass"),
        ({"a": [sc.Int8Weights]}, "give a pass"),
        ({"a": 3}, "'a' is 3: give a pass"),
        ({1: sc.Int8Weights()}, "1 is no name"),
        ({"a": [sc.Int8Weights(), sc.LowRank()]}, "not one pass with different settings"),
        ({"a": [sc.Int8Weights(), sc.Int8Weights()]}, "not one pass with different settings"),
    ],
)
def test_wrong_declarations_are_refused(folder, passes, said):
    with pytest.raises(SettingError, match=said):
        made(folder, passes)
    with pytest.raises(SettingError, match="recover='often'"):
        made(folder, APART, recovery=TUNE, recover="often")
