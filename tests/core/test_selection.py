import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackcomp.core.errors import SelectionEmpty
from stackcomp.core.selection import matches, nearest, select

PATHS = [("encoder.layer.0.query",), ("encoder.layer.10.query",), ("classifier",), ("wte", "lm_head")]
LINEAR = [True, True, True, False]


def chosen(only=None, skip=None):
    return select(PATHS, only=only, skip=skip, default=LINEAR)


def test_star_crosses_dots_and_a_module_includes_its_children():
    assert chosen(only="encoder.*") == [True, True, False, False]


def test_a_matched_module_does_not_match_a_longer_name():
    assert matches("encoder.layer.1.query", ("encoder.layer.1",))
    assert not matches("encoder.layer.10.query", ("encoder.layer.1",))


def test_default_takes_what_is_marked_and_skip_takes_away():
    assert chosen() == LINEAR
    assert chosen(skip="classifier") == [True, True, False, False]
    assert chosen(only=("classifier", "encoder"), skip="encoder.layer.0") == [False, True, True, False]


def test_a_shared_weight_is_selected_and_skipped_by_any_of_its_paths():
    assert chosen(only="lm_head") == [False, False, False, True]
    assert chosen(only="*", skip="wte") == [True, True, True, False]


@pytest.mark.parametrize("setting", ["only", "skip"])
def test_a_glob_that_matches_nothing_says_the_nearest_paths(setting):
    with pytest.raises(SelectionEmpty, match=rf"{setting}='encoder.layer.0.qery'.*encoder.layer.[*].query"):
        chosen(**{setting: "encoder.layer.0.qery"})


@given(st.lists(st.text("ab.*", min_size=1, max_size=6), min_size=1), st.text("ab.", min_size=1, max_size=8))
def test_more_globs_never_select_less(globs, path):
    assert matches(path, globs) >= matches(path, globs[:1])


def test_nearest_never_repeats_a_name():
    assert nearest("query", ["query", "query", "key"], 3) == "query, key"
