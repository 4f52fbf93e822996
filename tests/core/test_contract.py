"""The static walk, on passes made up for the purpose: some of them wrong."""

from dataclasses import dataclass, replace

import pytest

from stackcomp.core import contract
from stackcomp.core.contract import Contract, legal, legal_order, predict, verify
from stackcomp.core.errors import ContractBroken, NothingToCompress, PipelineRefused
from stackcomp.core.facts import Fact, facts
from stackcomp.core.matrices import MatrixSpec
from stackcomp.core.passes import Pass
from stackcomp.core.pipeline import Pipeline
from stackcomp.core.plan import Plan, form
from stackcomp.core.spec import WeightSpec


class Quiet(Pass):
    paper = "none"

    def apply(self, model, context):
        return {}


@dataclass(frozen=True, kw_only=True, repr=False)
class Round(Quiet):
    @property
    def contract(self):
        return Contract(
            requires=facts(Fact.FLOAT), adds=facts(Fact.INT8), removes=facts(Fact.FLOAT, Fact.TRAINABLE)
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Split(Quiet):
    ratio: float = 2.0

    @property
    def contract(self):
        factor = facts(Fact.FLOAT, Fact.TRAINABLE, Fact.FACTOR)
        return Contract(
            requires=facts(Fact.FLOAT, Fact.DENSE),
            forbids=facts(Fact.FACTOR),
            becomes=({"basis": factor | {Fact.DENSE}, "coefficients": factor | {Fact.SPARSE}},),
            may_leave=True,
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Train(Quiet):
    steps: int = 1

    @property
    def contract(self):
        return Contract(trains=True)


def plan(*paths):
    return Plan.of(
        WeightSpec(
            id=path,
            kind="linear",
            rows=4,
            cols=4,
            paths=(path,),
            matrices={"weight": MatrixSpec(rows=4, cols=4)},
        )
        for path in paths
    )


MODEL = plan("layer.0", "layer.1", "head")


def test_each_plan_follows_from_the_one_before():
    plans = predict((Split(only="layer.*"), Train(), Round()), MODEL)
    assert len(plans) == 4
    assert plans[2] == plans[1]
    assert len(plans[1]["layer.0"].forms) == 2  # factored, or too small to gain
    assert plans[1]["head"] == MODEL["head"]
    assert all(
        Fact.INT8 in words for weight in plans[3].weights for parts in weight.forms for _, words in parts
    )


def test_a_refusal_names_step_layers_fact_culprit_and_a_legal_order():
    with pytest.raises(PipelineRefused) as caught:
        predict((Train(), Round(skip="head"), Split(ratio=3.0)), MODEL)
    message = str(caught.value)
    for said in (
        "step 3",
        "Split(ratio=3.0)",
        "'float'",
        "layer.0, layer.1",
        "since step 2, Round",
        "took it away",
    ):
        assert said in message
    assert message.endswith("a legal order: Train() -> Split(ratio=3.0) -> Round(skip='head')")


def test_a_refusal_without_a_legal_order_says_so():
    with pytest.raises(PipelineRefused, match="no legal order of these passes was found"):
        predict((Round(), Round()), MODEL)


def test_many_passes_without_a_legal_order_are_refused_soon(monkeypatch):
    """All orders of ten passes would be some ten million steps."""
    assert legal_order((Round(), *(Train(steps=count) for count in range(1, 9)), Round()), MODEL) is None
    monkeypatch.setattr(contract, "TRIED", 2)
    assert legal_order((Round(), Train(), Split()), MODEL) is None  # there is one, beyond so few steps


def test_what_may_be_true_is_refused_as_well():
    assert not legal((Split(), Split()), MODEL)
    assert legal((Split(only="layer.0"), Split(only="layer.1")), MODEL)


def test_a_forbidden_fact_in_the_model_as_it_came_is_blamed_on_it():
    with pytest.raises(PipelineRefused, match="in the model as it came"):
        predict((Round(),), predict((Round(),), MODEL)[-1])


def test_legal_order_keeps_the_declared_order_where_it_can():
    assert legal_order((Round(), Train(), Split()), MODEL) == (Train(), Split(), Round())
    assert legal_order((Split(), Train(), Round()), MODEL) == (Split(), Train(), Round())


def test_a_step_that_selects_nothing_is_refused():
    with pytest.raises(NothingToCompress, match="selects no weight"):
        predict((Round(only="head", skip="head"),), MODEL)


def test_verify_accepts_a_predicted_form_and_names_the_pass_otherwise():
    predicted = predict((Split(),), MODEL)[-1]
    verify(Split(), predicted, MODEL)  # all left as they were, which the contract allows
    wrong = replace(MODEL.weights[0], forms=frozenset({form({"weight": facts(Fact.INT8)})}))
    with pytest.raises(ContractBroken, match=r"Split broke its contract at layer\.0.*int8"):
        verify(Split(), predicted, Plan((wrong, *MODEL.weights[1:])))
    with pytest.raises(ContractBroken, match=r"layer\.0"):
        verify(Split(), predicted, Plan(MODEL.weights[1:]))


def test_a_nested_pipeline_is_judged_as_its_passes():
    nested = Pipeline(Pipeline(Train(), Split()), Round())
    assert predict(nested.flat(), MODEL) == predict((Train(), Split(), Round()), MODEL)


def test_the_contract_reads_as_one_line():
    assert str(Round().contract) == "requires float; adds int8; removes float, trainable"
    assert "may leave a weight as it was" in str(Split().contract)
