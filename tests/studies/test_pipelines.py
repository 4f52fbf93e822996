"""The studies of combinations under pipelines/studies, on a model small enough to be made here."""

import runpy
import sys
from pathlib import Path

import pytest

import stackcomp as sc
from tests import toys

PIPELINES = Path(__file__).resolve().parents[2] / "pipelines" / "studies"


@pytest.fixture
def study(monkeypatch, tmp_path):
    """The study of a file, on a BERT of six layers."""
    toys.classifier("bert", num_hidden_layers=6).save_pretrained(tmp_path / "model")
    monkeypatch.setenv("STACKCOMP_MODEL", str(tmp_path / "model"))
    monkeypatch.syspath_prepend(str(PIPELINES))
    monkeypatch.delitem(sys.modules, "minilm", raising=False)
    yield lambda name, kind="study": runpy.run_path(str(PIPELINES / f"{name}.py"))[kind]
    sys.modules.pop("minilm", None)


@pytest.mark.parametrize(("name", "entries"), [("encoder_stack_sts", 36), ("encoder_stack", 38)])
def test_every_subset_has_an_order_so_that_credit_can_be_shared(study, name, entries):
    found = study(name)
    assert len(found.entries) == entries
    combined = [one for one in found.entries if one.labels.get("passes")]
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
    found = study("smallest_sst2", "search")
    strongest = [given[-1] if isinstance(given, list) else given for given in found.passes.values()]
    plan = sc.check(sc.Pipeline(*found.model.passes, *strongest), found.model.model)[-1]
    assert not any(
        sc.Fact.FLOAT in part
        for weight in plan.weights
        for form in weight.forms
        for _, part in form
        if weight.kind == "linear" and "layer" in weight.id
    )
