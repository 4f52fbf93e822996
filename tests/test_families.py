"""What is read from headers must be what is found in the loaded model, family by family, before and after compression."""

import pytest
import torch

import stackcomp as sc
from stackcomp import checkpoint
from stackcomp.core import headers
from stackcomp.core.families import FAMILIES
from stackcomp.manager import plan_of
from tests import toys
from tests.passes.test_conformance import apply


def shown(plan):
    return {
        weight.id: (weight.kind, weight.rows, weight.cols, weight.paths, weight.forms)
        for weight in plan.weights
    }


@pytest.mark.parametrize("family", toys.FAMILIES)
@pytest.mark.parametrize("head", ["base", "classifier", "language"])
def test_headers_tell_the_same_as_the_model(family, head, tmp_path):
    make = {"base": toys.make, "classifier": toys.classifier, "language": toys.language_model}[head]
    model = make(family)
    model.save_pretrained(tmp_path / "model")
    assert shown(headers.plan_of(tmp_path / "model")) == shown(plan_of(model))


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_headers_tell_the_same_of_a_compressed_model(family, tmp_path):
    model = toys.classifier(family)
    blocks = FAMILIES[family].blocks
    apply(sc.LowRank(ratio=1.5, only=blocks), model, toys.tokenizer(), tmp_path)
    apply(sc.Int8Weights(only=blocks), model, toys.tokenizer(), tmp_path)
    checkpoint.save(model, tmp_path / "saved")
    assert shown(headers.plan_of(tmp_path / "saved")) == shown(plan_of(model))
    with pytest.raises(sc.errors.PipelineRefused, match="in the model as it came"):
        sc.check(sc.DenseSparse(only=blocks), tmp_path / "saved")


@pytest.mark.parametrize("family", toys.FAMILIES)
@pytest.mark.parametrize(
    "step", [sc.DenseSparse(ratio=1.4), sc.MagnitudePrune(), sc.Int8Dynamic(), sc.LowBitWeights()]
)
def test_every_family_compresses_and_reloads(family, step, tmp_path):
    model, tokenizer = toys.classifier(family), toys.tokenizer()
    apply(step, model, tokenizer, tmp_path)
    checkpoint.save(model, tmp_path / "saved")
    batch = toys.batch(tokenizer)
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "saved")(**batch).logits, model(**batch).logits)
