"""`PruneHeads`: heads that say nothing go first, and what is left computes the same, reloads, and goes on."""

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
from stackcomp.core.errors import CheckpointError, SettingError, UnsupportedModel
from stackcomp.core.families import FAMILIES, attention_of, head_features
from stackcomp.manager import plan_of
from tests import toys
from tests.passes.test_conformance import apply, manager

SIZE = 8  # features of a head of the toys
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}  # heads of 4 features, two by two


def logits(model, tokenizer):
    with torch.no_grad():
        return model(**toys.batch(tokenizer)).logits


def readers(model, family):
    """The weights that heads are read by, a layer each."""
    blocks, part = FAMILIES[family].blocks, FAMILIES[family].attention
    return [nn.weights(model)[blocks.replace("*", f"{layer}.{part.out_of}")] for layer in range(2)]


def silence(handle, first, count=SIZE):
    """Let nothing read these inputs of a weight."""
    with torch.no_grad():
        handle.oriented(handle.parameter)[:, first : first + count] = 0


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_heads_that_nothing_reads_go_and_change_nothing(family, tokenizer, tmp_path):
    model, part = toys.classifier(family), FAMILIES[family].attention
    for layer, handle in enumerate(readers(model, family)):
        silence(handle, 0 if part.bias else layer * SIZE)  # another in each layer
    whole, before = logits(model, tokenizer), plan_of(model)
    size = model.num_parameters()
    apply(sc.PruneHeads(keep=0.5), model, tokenizer, tmp_path)
    torch.testing.assert_close(logits(model, tokenizer), whole, atol=1e-6, rtol=1e-6)
    assert all(handle.spec.cols == SIZE for handle in readers(model, family))
    assert model.num_parameters() < size
    found = predict((sc.PruneHeads(keep=0.5),), before)[-1]
    after = plan_of(model)
    assert replace(found, weights=tuple(replace(w, origin=w.id) for w in found.weights)) == after
    checkpoint.save(model, tmp_path / "saved")
    for reloaded in (
        checkpoint.load(tmp_path / "saved"),
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved"),
    ):
        assert torch.equal(logits(reloaded, tokenizer), logits(model, tokenizer))
        assert plan_of(reloaded) == after
    saved = headers.plan_of(tmp_path / "saved")
    assert {weight.id: weight for weight in saved.weights} == {weight.id: weight for weight in after.weights}
    assert saved.head_features == after.head_features == SIZE
    pooler = {"add_pooling_layer": False} if family in ("roberta", "mpnet") else {}
    base = transformers.AutoModel.from_pretrained(tmp_path / "saved", **pooler)
    assert base.num_parameters() < size


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_importance_ranks_heads_as_the_loss_does(family, tokenizer, tmp_path):
    settings = {"bert": {"num_attention_heads": 8}, "gpt2": {}, "llama": {**GROUPED, "head_dim": 8}}[family]
    model, task = toys.classifier(family, **settings), toys.classification_task()
    features = head_features(model.config.to_dict())
    with torch.no_grad():  # a little of each head is what the first order is right for
        for handle in readers(model, family):
            handle.parameter.mul_(0.05)
    modules = {handle.spec.id: handle.modules for handle in readers(model, family)}
    loss = training.TaskLoss(task=task)
    context = Context(targets=(), seed=0, scratch=tmp_path, task=task, tokenizer=tokenizer)

    def batches(size):
        return list(data.labelled_batches(context, model, 24, batch_size=size, label=""))

    found = data.input_importance(model, modules, batches(8), loss, together=features)
    singles = batches(1)
    for handle in readers(model, family):
        weight = handle.oriented(handle.parameter)
        changes = []
        with torch.no_grad():
            whole = [loss(model, dict(batch)) for batch in singles]
            for first in range(0, weight.shape[1], features):
                kept = weight[:, first : first + features].clone()
                silence(handle, first, features)
                changed = zip(singles, whole, strict=True)
                changes.append(sum(abs(loss(model, dict(b)) - w) for b, w in changed).item() / len(singles))
                weight[:, first : first + features] = kept
        scores = found[handle.spec.id]
        assert len(scores) == len(changes) == weight.shape[1] // features
        torch.testing.assert_close(scores, torch.tensor(changes), rtol=0.3, atol=1e-4)
        if len(scores) > 2:
            assert stats.spearmanr(scores, changes).statistic > 0.9


@pytest.mark.parametrize(("family", "settings"), [("llama", GROUPED), ("gpt2", {})])
def test_generation_goes_on_as_before(family, settings, tokenizer, tmp_path):
    model = toys.language_model(family, **settings)
    features = head_features(model.config.to_dict())
    for layer, handle in enumerate(readers(model, family)):
        silence(handle, layer * features, features)
    given = {**tokenizer(["the film is"], return_tensors="pt"), "max_new_tokens": 8, "do_sample": False}
    before = model.generate(**given)
    apply(sc.PruneHeads(keep=0.5), model, tokenizer, tmp_path, task=toys.language_task())
    assert torch.equal(model.generate(**given), before)
    checkpoint.save(model, tmp_path / "saved")
    assert torch.equal(checkpoint.load(tmp_path / "saved").generate(**given), before)


def test_groups_that_share_keys_and_values_go_whole_and_the_config_says_so(tokenizer, tmp_path):
    model = toys.classifier("llama", **GROUPED)
    apply(sc.PruneHeads(), model, tokenizer, tmp_path)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (8, 16)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (4, 16)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)
    checkpoint.save(model, tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_a_number_that_the_config_does_not_allow_stands_beside_it(tokenizer, tmp_path):
    model = toys.classifier("llama", num_attention_heads=4, num_key_value_heads=4)
    apply(sc.PruneHeads(keep=0.75), model, tokenizer, tmp_path)
    assert model.config.num_attention_heads == 4  # Llama's width must be a multiple of it
    checkpoint.save(model, tmp_path / "saved")
    assert model.config.quantization_config.heads == [3, 3]
    again = checkpoint.load(tmp_path / "saved")
    assert torch.equal(logits(again, tokenizer), logits(model, tokenizer))
    apply(sc.PruneHeads(keep=0.7), again, tokenizer, tmp_path)
    checkpoint.save(again, tmp_path / "again")
    assert again.config.num_attention_heads == 2
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert torch.equal(logits(checkpoint.load(tmp_path / "again"), tokenizer), logits(again, tokenizer))


def test_all_that_follows_sees_the_narrower_weights(tokenizer, tmp_path):
    model = toys.classifier("bert", num_attention_heads=4)
    pipeline = sc.Pipeline(
        sc.PruneHeads(keep=0.7),
        sc.PruneHeads(keep=0.7),
        sc.LowRank(ratio=1.2, only="*.attention", data_aware=False),
        sc.LowBitWeights(group=4, only="encoder.layer.*"),
        sc.DropLayers(keep=1),
    )
    result = manager(tmp_path / "out", tokenizer).run(model, pipeline)
    assert nn.weights(result.model)["encoder.layer.0.attention.output.dense"].spec.cols == 8
    said = [(row.findings["kept"].values(), row.findings["of"].values()) for row in result.ledger.rows[1:3]]
    assert [({*kept}, {*of}) for kept, of in said] == [({3}, {4}), ({2}, {3})]
    assert all(0.5 < share <= 1 for share in result.ledger.rows[1].findings["share_of_importance"].values())
    whole = checkpoint.load(tmp_path / "out")
    assert torch.equal(logits(whole, tokenizer), logits(result.model, tokenizer))
    assert whole.bert.encoder.layer[0].attention.self.num_attention_heads == 2
    assert whole.bert.encoder.layer[0].attention.self.all_head_size == 8


def test_layers_that_share_their_weights_keep_the_same_heads(tokenizer, tmp_path):
    pipeline = sc.Pipeline(sc.ShareLayers(only="encoder.layer.*"), sc.PruneHeads())
    result = manager(tmp_path / "out", tokenizer).run(toys.bert_classifier(), pipeline)
    (into,) = [
        h for h in nn.weights(result.model).values() if "encoder.layer.1.attention.self.key" in h.spec.paths
    ]
    assert (into.spec.rows, len(into.spec.paths)) == (SIZE, 2)
    assert torch.equal(logits(checkpoint.load(tmp_path / "out"), tokenizer), logits(result.model, tokenizer))
    part = sc.Pipeline(sc.ShareLayers(only="*.query"), sc.PruneHeads())
    with pytest.raises(
        UnsupportedModel, match=r"layers \[0\] share it and do not share their attention\.self\.query"
    ):
        sc.check(part, toys.bert_classifier())


def test_cross_attention_is_left_alone(tokenizer, tmp_path):
    model = toys.make("gpt2", "AutoModelForCausalLM", add_cross_attention=True)
    apply(sc.PruneHeads(), model, tokenizer, tmp_path, task=toys.language_task())
    assert model.transformer.h[0].crossattention.c_attn.weight.shape == (16, 32)
    assert model.transformer.h[0].attn.c_attn.weight.shape == (16, 24)
    checkpoint.save(model, tmp_path / "saved")
    again = checkpoint.load(tmp_path / "saved")
    assert torch.equal(logits(again, tokenizer), logits(model, tokenizer))


def test_what_is_not_known_is_refused_before_any_compute(tokenizer, tmp_path):
    model = toys.bert_classifier()
    plan = plan_of(model)
    with pytest.raises(UnsupportedModel, match="how many heads the model has is not known"):
        sc.check(sc.PruneHeads(), replace(plan, head_features=None))
    with pytest.raises(UnsupportedModel, match="no attention part"):
        attention_of(["h.0.mlp.c_fc"])
    apply(sc.PruneHeads(), model, tokenizer, tmp_path)
    checkpoint.save(model, tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    for heads in (2, "11", [1], [2, 1], [3, 1], [0, 1], ["1", 1]):
        config["quantization_config"]["heads"] = heads
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError):
            type(model).from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    "settings", [{"keep": 0.0}, {"keep": 1.5}, {"samples": 0}, {"batch_size": 0}, {"skip": "*.query"}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        sc.PruneHeads(**settings)
