"""`unpack`: ordinary models again, which compute what the compressed ones did."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn as layers
from transformers.pytorch_utils import Conv1D

import stackcomp as sc
from stackcomp import checkpoint, nn
from stackcomp.core.matrices import Dense
from stackcomp.nn.quantizer import compressed
from stackcomp.passes import registered
from tests import toys
from tests.passes.test_conformance import led, manager, quick

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def logits(model, tokenizer):
    with torch.no_grad():
        return model(**toys.batch(tokenizer)).logits


@pytest.mark.parametrize("name", sorted(registered()))
def test_every_pass_unpacks_into_a_plain_model_that_computes_the_same(name, tokenizer, tmp_path):
    model = toys.bert_classifier()
    result = manager(tmp_path / "out", tokenizer).run(model, led(quick(registered()[name]), model))
    wanted = logits(result.model, result.tokenizer)
    again = sc.unpack(result.model)
    assert again is result.model
    assert not any(isinstance(module, nn.CompressedLayer) for module in again.modules())
    found = logits(again, result.tokenizer)
    if name in ("Int8Dynamic", "SmoothQuant"):  # inputs are not rounded any more
        assert (found - wanted).abs().max() < 0.1
    else:
        torch.testing.assert_close(found, wanted, **CLOSE)
    checkpoint.save(again, tmp_path / "plain")
    reloaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(reloaded, result.tokenizer), found)
    ours = "quantization_config" in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert ours == (name == "PruneHeads")  # whose width no config can say


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_it_is_the_architecture_it_was_with_its_ties(family, tokenizer, tmp_path):
    head = "AutoModelForCausalLM" if family in ("gpt2", "llama") else "AutoModelForMaskedLM"
    model = toys.make(family, head)
    kinds = {name: type(module) for name, module in model.named_modules()}
    tied = dict(model.all_tied_weights_keys)
    for id_, handle in nn.weights(model).items():
        if handle.spec.kind == "embedding":
            nn.quantize(model, id_, coding="int4", group=8)
        else:
            nn.quantize(model, id_)
    wanted = logits(model, tokenizer)
    assert compressed(model)
    sc.unpack(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert model.all_tied_weights_keys == tied
    torch.testing.assert_close(logits(model, tokenizer), wanted, **CLOSE)
    model.save_pretrained(tmp_path / "plain")
    code = (
        "import sys, torch, transformers\n"
        f"batch, wanted = torch.load({str(tmp_path / 'wanted.pt')!r})\n"
        f"model = transformers.{head}.from_pretrained({str(tmp_path / 'plain')!r})\n"
        "assert 'stackcomp' not in sys.modules\n"
        "assert torch.equal(model(**batch).logits, wanted)\n"
    )
    torch.save((toys.batch(tokenizer), logits(model, tokenizer)), tmp_path / "wanted.pt")
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    assert (inner.weight is outer.weight) == bool(tied)


def test_factors_stay_where_they_are_cheaper(tokenizer, tmp_path):
    model = toys.bert_classifier()
    stack = sc.Pipeline(sc.LowRank(ratio=2.0, only="encoder.layer.*", samples=8), sc.LowBitWeights(bits=4))
    result = manager(tmp_path / "out", tokenizer).run(model, stack)
    wanted = logits(result.model, tokenizer)
    factored = [id_ for id_, handle in nn.weights(result.model).items() if handle.spec.factored]
    assert factored
    sc.unpack(result.model, factors=True)
    torch.testing.assert_close(logits(result.model, tokenizer), wanted, **CLOSE)
    for id_, handle in nn.weights(result.model).items():
        assert handle.spec.factored == (id_ in factored)
        for matrix in handle.spec.matrices.values():
            assert (matrix.coding, matrix.layout) == ("float32", Dense())
    checkpoint.save(result.model, tmp_path / "factors")
    assert torch.equal(
        logits(checkpoint.load(tmp_path / "factors"), tokenizer), logits(result.model, tokenizer)
    )


def test_factors_that_cost_more_than_the_weight_are_multiplied_out(tokenizer, tmp_path):
    model = toys.bert_classifier()
    step = sc.DenseSparse(atoms=16, nonzeros=2, blocks=1, only="encoder.layer.*", data_aware=False)
    result = manager(tmp_path / "out", tokenizer).run(model, step)
    wanted = logits(result.model, tokenizer)
    sc.unpack(result.model, factors=True)
    torch.testing.assert_close(logits(result.model, tokenizer), wanted, **CLOSE)
    assert not compressed(result.model)


def test_layers_that_shared_weights_get_their_own(tokenizer, tmp_path):
    model = toys.bert_classifier()
    stack = sc.Pipeline(sc.ShareLayers(group=2), sc.Int8Weights(only="encoder.layer.*"))
    result = manager(tmp_path / "out", tokenizer).run(model, stack)
    wanted = logits(result.model, tokenizer)
    sc.unpack(result.model)
    torch.testing.assert_close(logits(result.model, tokenizer), wanted, **CLOSE)
    first, second = (layer.output.dense.weight for layer in result.model.bert.encoder.layer)
    assert torch.equal(first, second)
    assert first is not second


def test_a_cast_and_training_go_on_as_with_any_model(
    tokenizer,
):
    model = toys.bert_classifier()
    nn.quantize(model, "encoder.layer.0.output.dense")
    sc.unpack(model).to(torch.bfloat16)
    assert {part.dtype for part in model.parameters()} == {torch.bfloat16}
    model = toys.bert_classifier()
    nn.quantize(model, "encoder.layer.0.output.dense")
    layer = sc.unpack(model).bert.encoder.layer[0].output.dense
    assert type(layer) is layers.Linear
    model(**toys.batch(tokenizer)).logits.sum().backward()
    assert layer.weight.grad is not None


def test_a_plain_model_is_left_alone(tokenizer):
    model = toys.make("gpt2", "AutoModelForCausalLM")
    before = {name: id(part) for name, part in model.named_parameters()}
    sc.unpack(model)
    assert {name: id(part) for name, part in model.named_parameters()} == before
    assert isinstance(model.transformer.h[0].mlp.c_fc, Conv1D)
