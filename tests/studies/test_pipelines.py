"""The studies of combinations under pipelines/studies, on a model small enough to be made here."""

import runpy
import sys
from pathlib import Path

import pytest

import stackcomp as sc
from stackcomp.passes import registered
from tests import toys

PIPELINES = Path(__file__).resolve().parents[2] / "pipelines" / "studies"
IMPORTED = ("minilm", "sst2_24x")  # by other files there


@pytest.fixture
def study(monkeypatch, tmp_path):
    """The study of a file, on a BERT of six layers."""
    toys.classifier("bert", num_hidden_layers=6).save_pretrained(tmp_path / "model")
    monkeypatch.setenv("STACKCOMP_MODEL", str(tmp_path / "model"))
    monkeypatch.syspath_prepend(str(PIPELINES))
    for name in IMPORTED:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield lambda name, kind="study": runpy.run_path(str(PIPELINES / f"{name}.py"))[kind]
    for name in IMPORTED:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("name", "entries"), [("encoder_stack_sts", 36), ("encoder_stack", 46)])
def test_every_subset_has_an_order_so_that_credit_can_be_shared(study, name, entries):
    found = study(name)
    assert len(found.entries) == entries
    combined = [one for one in found.entries if one.labels.get("passes") and one.seed == 0]
    assert len(combined) == 36
    assert len({frozenset(one.labels["passes"]) for one in combined}) == 2**4 - 1
    assert len(found.skipped) == 64 - 36
    assert all(sc.parse(repr(one.pipeline)).flat() == one.passes for one in combined)


def test_every_pipeline_of_the_trained_study_is_distilled_as_long(study):
    tuned, *others = study("encoder_stack").entries
    assert [item.name for item in tuned.passes] == ["FineTune"]
    for one in others:
        assert one.parent is tuned
        assert [item.steps for item in one.passes if item.contract.trains] == [150]
        assert one.passes[-1].name == "Distill"


def test_the_search_tries_orders_that_are_legal(study):
    found = study("sst2_24x", "search")
    strongest = [given[-1] if isinstance(given, list) else given for given in found.passes.values()]
    plan = sc.check(sc.Pipeline(*found.model.passes, *strongest), found.model.model)[-1]
    assert not any(
        sc.Fact.FLOAT in part
        for weight in plan.weights
        for form in weight.forms
        for _, part in form
        if weight.kind == "linear" and "layer" in weight.id
    )


def test_a_search_with_another_goal_tries_the_same_pipelines(study):
    one, other = study("sst2_24x", "search"), study("sst2_40x", "search")
    assert one.size_bytes / other.size_bytes == pytest.approx(40 / 24)
    assert (one.name, repr(one.passes), one.rungs) == (other.name, repr(other.passes), other.rungs)


def test_every_pass_is_in_the_catalogue(study):
    run = {item.name for entry in study("catalogue").entries for item in entry.passes}
    own = {name for name, cls in registered().items() if cls.__module__.startswith("stackcomp.")}
    assert own <= run


def test_single_techniques_are_selected_and_scored_on_different_splits(study):
    tuned, *others = study("sst2_single").entries
    assert all(one.parent is tuned and len(one.passes) == 1 for one in others)
    for selection, test in zip(others[::2], others[1::2], strict=True):
        assert (selection.split, test.split) == ("selection", "test")
        assert selection.passes == test.passes
