"""Layers of unlike widths: `keep` with a share for each layer, what follows such a pass, and what becomes of the widths on disk."""

import json
from dataclasses import replace

import pytest
import torch

import stackcomp as sc
from stackcomp import checkpoint, nn
from stackcomp.core import headers
from stackcomp.core.contract import predict
from stackcomp.core.errors import SettingError, StackcompError
from stackcomp.core.families import FAMILIES, head_features
from stackcomp.manager import plan_of
from tests import toys
from tests.passes.test_conformance import apply, manager

UNLIKE = (0.5, 1.0)  # of two layers
NARROWING = (sc.PruneNeurons, sc.PruneHeads)


def logits(model, tokenizer):
    with torch.no_grad():
        return model(**toys.batch(tokenizer)).logits


def part_of(pass_, family):
    known = FAMILIES[family]
    return known.feed_forward if pass_ is sc.PruneNeurons else known.attention


def out_of(model, pass_, family, layer):
    """The weight that reads the units of a layer."""
    return nn.weights(model)[FAMILIES[family].blocks.replace("*", f"{layer}.{part_of(pass_, family).out_of}")]


def pairs():
    """Passes and families whose layers may be unlike."""
    return [(p, f) for p in NARROWING for f in toys.FAMILIES if not getattr(part_of(p, f), "bias", None)]


@pytest.mark.parametrize(("pass_", "family"), pairs())
def test_each_layer_keeps_its_share_and_computes_the_same_once_reloaded(pass_, family, tokenizer, tmp_path):
    model, narrow = toys.classifier(family), pass_(keep=UNLIKE)
    first = out_of(model, pass_, family, 0)
    features = head_features(model.config.to_dict()) if pass_ is sc.PruneHeads else 1
    units = first.spec.cols // features
    with torch.no_grad():  # nothing reads every second unit of the first layer
        columns = first.oriented(first.parameter).unflatten(1, (units, features))
        columns[:, ::2] = 0
    whole, before = logits(model, tokenizer), plan_of(model)
    apply(narrow, model, tokenizer, tmp_path)
    torch.testing.assert_close(logits(model, tokenizer), whole, atol=1e-6, rtol=1e-6)
    left = [out_of(model, pass_, family, layer).spec.cols // features for layer in range(2)]
    assert left == [units // 2, units]
    found = predict((narrow,), before)[-1]
    assert replace(found, weights=tuple(replace(w, origin=w.id) for w in found.weights)) == plan_of(model)
    checkpoint.save(model, tmp_path / "saved")
    said = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert said["neurons" if pass_ is sc.PruneNeurons else "heads"] == left
    assert torch.equal(logits(checkpoint.load(tmp_path / "saved"), tokenizer), logits(model, tokenizer))
    assert {*headers.plan_of(tmp_path / "saved").weights} == {*plan_of(model).weights}


@pytest.mark.parametrize("pass_", NARROWING)
def test_layers_that_are_alike_again_need_nothing_beside_their_config(pass_, tokenizer, tmp_path):
    model = toys.classifier("llama", num_attention_heads=4, num_key_value_heads=4)
    apply(pass_(keep=UNLIKE), model, tokenizer, tmp_path)
    apply(pass_(keep=(1.0, 0.5)), model, tokenizer, tmp_path)
    checkpoint.save(model, tmp_path / "saved")
    said = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in said
    assert (said["intermediate_size"], said["num_attention_heads"]) == (
        (16, 4) if pass_ is sc.PruneNeurons else (32, 2)
    )
    assert torch.equal(logits(checkpoint.load(tmp_path / "saved"), tokenizer), logits(model, tokenizer))


@pytest.mark.parametrize("left", [0, 1])
def test_what_follows_sees_each_layer_as_it_is(left, tokenizer, tmp_path):
    pipeline = sc.Pipeline(
        sc.PruneNeurons(keep=UNLIKE),
        sc.PruneHeads(keep=(1.0, 0.5)),
        sc.LowRank(ratio=1.2, only="*.attention", data_aware=False),
        sc.LowBitWeights(group=4, only="encoder.layer.*"),
        sc.DropLayers(which=(left,)),
        sc.EntropyCode(),
    )
    result = manager(tmp_path / "out", tokenizer).run(toys.bert_classifier(), pipeline)
    layer = result.model.bert.encoder.layer[0]
    assert layer.output.dense.in_features == (16, 32)[left]
    assert layer.attention.self.num_attention_heads == (2, 1)[left]
    again = checkpoint.load(tmp_path / "out")
    assert torch.equal(logits(again, tokenizer), logits(result.model, tokenizer))
    nn.unpack(again)
    checkpoint.save(again, tmp_path / "unpacked")
    said = json.loads((tmp_path / "unpacked" / "config.json").read_text()).get("quantization_config")
    assert said is None if left == 0 else (said["weights"], said["neurons"], said["heads"]) == ({}, None, [1])
    torch.testing.assert_close(
        logits(checkpoint.load(tmp_path / "unpacked"), tokenizer), logits(again, tokenizer)
    )


def test_layers_of_unlike_widths_share_nothing_of_it(tokenizer, tmp_path):
    pipeline = sc.Pipeline(sc.PruneNeurons(keep=UNLIKE), sc.ShareLayers(only="encoder.layer.*"))
    with pytest.raises(StackcompError, match=r"encoder\.layer\.1"):
        sc.check(pipeline, toys.bert_classifier())


@pytest.mark.parametrize("pass_", NARROWING)
def test_shares_that_do_not_fit_the_layers_are_refused(pass_):
    model = toys.bert_classifier()
    with pytest.raises(SettingError, match="has 3 shares for 2 layers"):
        sc.check(pass_(keep=(0.5, 0.5, 0.5)), model)
    shared = sc.Pipeline(sc.ShareLayers(only="encoder.layer.*"), pass_(keep=UNLIKE))
    with pytest.raises(SettingError, match=r"layers \[0, 1\] share encoder\.layer\.0.*one share"):
        sc.check(shared, model)
    assert pass_(keep=[0.5, 1]) == pass_(keep=(0.5, 1))
    assert not pass_(keep=(1.0, 1.0)).contract.needs


def test_one_bias_by_head_needs_as_many_heads_in_all_layers():
    with pytest.raises(SettingError, match=r"encoder\.relative_attention_bias: give one share"):
        sc.check(sc.PruneHeads(keep=UNLIKE), toys.classifier("mpnet"))
