"""`SmoothQuant`: the model computes the same, the outliers are gone, and what cannot be reached is named."""

import copy

import pytest
import torch
import transformers

import stackcomp as sc
from stackcomp import nn
from stackcomp.core.errors import NothingToCompress, SettingError, UnsupportedModel
from stackcomp.core.families import FAMILIES
from stackcomp.data import Calibration
from tests import toys
from tests.passes.test_conformance import apply

FOLDED = {
    "bert": ["attention.self.value"],
    "roberta": ["attention.self.value"],
    "distilbert": ["attention.v_lin"],
    "mpnet": ["attention.attn.v"],
    "gpt2": ["ln_1", "ln_2"],
    "llama": ["input_layernorm", "mlp.up_proj", "post_attention_layernorm", "self_attn.v_proj"],
}


def logits(model):
    with torch.no_grad():
        return model(**toys.batch(toys.tokenizer())).logits


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_the_model_computes_the_same_and_every_fold_is_used(family, tokenizer, tmp_path):
    model = toys.classifier(family)
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    found = apply(sc.SmoothQuant(), model, tokenizer, tmp_path)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    stack = FAMILIES[family].blocks.removesuffix(".*")
    assert sorted(found["folded"]) == sorted(f"{stack}.{i}.{name}" for i in (0, 1) for name in FOLDED[family])
    for source, readers in found["folded"].items():
        for path in (source, *readers):
            name = f"{nn.absolute(model, path)}.weight"
            assert not torch.allclose(model.state_dict()[name], weights[name], rtol=1e-2)


def test_grouped_heads_keep_their_values(tokenizer, tmp_path):
    model = toys.classifier("llama", num_key_value_heads=1)
    before = logits(model)
    found = apply(sc.SmoothQuant(), model, tokenizer, tmp_path)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert "layers.0.self_attn.o_proj" in found["left as they are"]
    assert "layers.0.input_layernorm" in found["folded"]


def test_inputs_and_columns_meet_halfway(tokenizer, tmp_path):
    """With a strength of one half both have the largest magnitude sqrt(max|x| max|W|), which is the point of the formula."""
    model = toys.classifier("gpt2")
    found = apply(sc.SmoothQuant(only="h.*"), model, tokenizer, tmp_path)
    handles = {readers[0]: nn.weights(model)[readers[0]] for readers in found["folded"].values()}
    text = Calibration(toys.classification_task().texts("train", 1024), tokenizer, max_length=16)
    inputs = text.largest_inputs(model, {id_: handle.modules for id_, handle in handles.items()})
    for id_, handle in handles.items():
        torch.testing.assert_close(handle.dense().abs().amax(0), inputs[id_], rtol=1e-3, atol=1e-3)


def with_outliers():
    """The toy decoder, computing as before, with two channels of every norm a hundred times as large."""
    model = toys.classifier("llama")
    large = torch.ones(16)
    large[[3, 7]] = 0.01
    for layer in (0, 1):
        block = f"layers.{layer}"
        attention = [f"{block}.self_attn.{name}_proj" for name in "qkv"]
        feed_forward = [f"{block}.mlp.{name}_proj" for name in ("gate", "up")]
        nn.surgery.rescale(model, f"{block}.input_layernorm", attention, large)
        nn.surgery.rescale(model, f"{block}.post_attention_layernorm", feed_forward, large)
    return model


def test_rounded_inputs_are_nearer_to_the_model_as_it_was(tokenizer, tmp_path):
    before = logits(toys.classifier("llama"))
    errors = []
    for steps in ([], [sc.SmoothQuant(only="layers.*")]):
        model = with_outliers()
        torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)
        for step in (*steps, sc.Int8Dynamic(only="layers.*")):
            apply(step, model, tokenizer, tmp_path)
        errors.append(float((logits(model) - before).norm()))
    assert errors[1] < 0.2 * errors[0]


def test_what_is_not_reached_is_said(tokenizer, tmp_path):
    model = toys.classifier("bert")
    found = apply(sc.SmoothQuant(), model, tokenizer, tmp_path)
    left = set(found["left as they are"])
    assert {"encoder.layer.0.intermediate.dense", "encoder.layer.1.attention.self.query"} <= left
    assert "encoder.layer.0.attention.output.dense" not in left


def test_a_source_that_is_not_selected_is_not_touched(tokenizer, tmp_path):
    model = toys.classifier("llama")
    before = copy.deepcopy(model.state_dict())
    step = sc.SmoothQuant(only="layers.*", skip=("layers.0.mlp.up_proj", "layers.0.self_attn.q_proj"))
    found = apply(step, model, tokenizer, tmp_path)
    assert not {"layers.0.mlp.up_proj", "layers.0.input_layernorm"} & set(found["folded"])
    for path in ("layers.0.mlp.up_proj", "layers.0.input_layernorm", "layers.0.self_attn.q_proj"):
        name = f"{nn.absolute(model, path)}.weight"
        assert torch.equal(model.state_dict()[name], before[name])


def test_weights_and_models_that_cannot_be_reached_are_refused(tokenizer, tmp_path):
    with pytest.raises(NothingToCompress, match=r"none of the 1 selected weights \(pooler\.dense\)"):
        sc.check(sc.SmoothQuant(only="pooler.dense"), toys.classifier("bert"))
    shared = toys.classifier("llama")
    apply(sc.ShareLayers(), shared, tokenizer, tmp_path)
    with pytest.raises(NothingToCompress, match="that share no weights"):
        sc.check(sc.SmoothQuant(), shared)
    with pytest.raises(
        NothingToCompress, match="none of the 2 selected weights"
    ):  # what reads, without what is read
        sc.check(sc.SmoothQuant(only="*.attention.output.dense"), toys.classifier("bert"))
    with pytest.raises(SettingError, match=r"strength=1\.5"):
        sc.SmoothQuant(strength=1.5)
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    unknown = transformers.ElectraForSequenceClassification(
        transformers.ElectraConfig(vocab_size=toys.VOCABULARY, embedding_size=16, **config)
    )
    with pytest.raises(UnsupportedModel, match="model_type='electra' is not in the table"):
        apply(sc.SmoothQuant(only="encoder.*"), unknown, tokenizer, tmp_path)
