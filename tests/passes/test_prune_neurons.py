"""`PruneNeurons`: neurons that do nothing go first, and what is left is an ordinary narrower model, or one of ours where no config can say
its widths."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from scipy import stats

import stackcomp as sc
from stackcomp import checkpoint, data, nn, training
from stackcomp.core import headers
from stackcomp.core.context import Context
from stackcomp.core.contract import predict
from stackcomp.core.errors import SettingError, UnsupportedModel
from stackcomp.core.families import FAMILIES, feed_forward_of
from stackcomp.manager import plan_of
from tests import toys
from tests.passes.test_conformance import apply, manager

NEURONS = {"gpt2": 64}


def logits(model, tokenizer):
    with torch.no_grad():
        return model(**toys.batch(tokenizer)).logits


def readers(model, family):
    """The weights that neurons are read by, a layer each."""
    blocks, part = FAMILIES[family].blocks, FAMILIES[family].feed_forward
    return [nn.weights(model)[blocks.replace("*", f"{layer}.{part.out_of}")] for layer in range(2)]


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_neurons_that_nothing_reads_go_and_change_nothing(family, tokenizer, tmp_path):
    model = toys.classifier(family)
    count = NEURONS.get(family, 32)
    with torch.no_grad():
        for layer, handle in enumerate(readers(model, family)):
            handle.oriented(handle.parameter)[:, layer::2] = 0  # others in each layer
    whole = logits(model, tokenizer)
    before = plan_of(model)
    apply(sc.PruneNeurons(keep=0.5), model, tokenizer, tmp_path)
    torch.testing.assert_close(logits(model, tokenizer), whole, atol=1e-6, rtol=1e-6)
    assert all(handle.spec.cols == count // 2 for handle in readers(model, family))
    found = predict((sc.PruneNeurons(keep=0.5),), before)[-1]
    assert tuple(replace(weight, origin=weight.id) for weight in found.weights) == plan_of(model).weights
    checkpoint.save(model, tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert getattr(plain.config, FAMILIES[family].feed_forward.size) == count // 2
    assert torch.equal(logits(plain, tokenizer), logits(model, tokenizer))
    assert {weight.id: weight for weight in headers.plan_of(tmp_path / "saved").weights} == {
        weight.id: weight for weight in plan_of(model).weights
    }


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_importance_ranks_neurons_as_the_loss_does(family, tokenizer, tmp_path):
    model, task = toys.classifier(family), toys.classification_task()
    with torch.no_grad():  # a little of each neuron is what the first order is right for
        for handle in readers(model, family):
            handle.parameter.mul_(0.1)
    modules = {handle.spec.id: handle.modules for handle in readers(model, family)}
    loss = training.TaskLoss(task=task)
    context = Context(targets=(), seed=0, scratch=tmp_path, task=task, tokenizer=tokenizer)

    def batches(size):
        return list(data.labelled_batches(context, model, 24, batch_size=size, label=""))

    found = data.input_importance(model, modules, batches(8), loss)
    one_by_one = data.input_importance(model, modules, batches(1), loss)
    singles = batches(1)
    for handle in readers(model, family):
        id_ = handle.spec.id
        torch.testing.assert_close(found[id_], one_by_one[id_], rtol=1e-3, atol=1e-6)
        weight = handle.oriented(handle.parameter)
        changes = []
        with torch.no_grad():
            whole = [loss(model, dict(batch)) for batch in singles]
            for neuron in range(weight.shape[1]):
                kept = weight[:, neuron].clone()
                weight[:, neuron] = 0
                changes.append(
                    sum(abs(loss(model, dict(b)) - w) for b, w in zip(singles, whole, strict=True)).item()
                )
                weight[:, neuron] = kept
        assert stats.spearmanr(found[id_], changes).statistic > 0.9


def test_layers_that_share_their_weights_keep_the_same_neurons(tokenizer, tmp_path):
    pipeline = sc.Pipeline(sc.ShareLayers(only="encoder.layer.*"), sc.PruneNeurons(keep=0.25))
    result = manager(tmp_path / "out", tokenizer).run(toys.bert_classifier(), pipeline)
    (into,) = [
        h for h in nn.weights(result.model).values() if "encoder.layer.1.intermediate.dense" in h.spec.paths
    ]
    assert (into.spec.rows, len(into.spec.paths)) == (8, 2)
    part = sc.Pipeline(sc.ShareLayers(only="*.output.dense"), sc.PruneNeurons())
    with pytest.raises(UnsupportedModel, match=r"encoder\.layer\.0\.output\.dense: layers \[0, 1\] share it"):
        sc.check(part, toys.bert_classifier())


def test_all_that_follows_sees_the_narrower_weights(tokenizer, tmp_path):
    pipeline = sc.Pipeline(sc.PruneNeurons(keep=0.3), sc.LowBitWeights(group=8, only="encoder.layer.*"))
    result = manager(tmp_path / "out", tokenizer).run(toys.bert_classifier(), pipeline)
    assert result.model.config.intermediate_size == 10
    assert nn.weights(result.model)["encoder.layer.1.output.dense"].spec.cols == 10
    findings = result.ledger.rows[1].findings
    assert ({*findings["kept"].values()}, {*findings["of"].values()}) == ({10}, {32})
    assert all(0.3 < share < 1 for share in findings["share_of_importance"].values())


def test_the_feed_forward_part_is_found_by_names():
    stack, part = feed_forward_of(["h.0.mlp.c_fc", "h.1.mlp.c_proj", "wte"])
    assert (stack.count, part.size) == (2, "n_inner")
    with pytest.raises(UnsupportedModel, match="no feed-forward part"):
        feed_forward_of(["h.0.attn.c_attn"])


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 0.0},
        {"keep": 1.5},
        {"keep": (0.5, 0.0)},
        {"keep": "half"},
        {"samples": 0},
        {"batch_size": 0},
        {"only": "*.output.dense"},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        sc.PruneNeurons(**settings)


@pytest.mark.parametrize("kind", ["GPTNeo", "OpenAIGPT"])
def test_a_width_that_the_config_does_not_say_stands_beside_it(kind, tokenizer, tmp_path):
    sizes = {
        "GPTNeo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]},
        "OpenAIGPT": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    }[kind]
    config = getattr(transformers, f"{kind}Config")(vocab_size=toys.VOCABULARY, pad_token_id=0, **sizes)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    apply(sc.PruneNeurons(keep=0.5, samples=8), model, tokenizer, tmp_path)
    assert model.transformer.h[0].mlp.c_proj.weight.numel() == 16 * 32
    checkpoint.save(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["neurons"] == [
        32,
        32,
    ]
    again = checkpoint.load(tmp_path / "saved")
    assert torch.equal(logits(again, tokenizer), logits(model, tokenizer))
