"""`DropLayers`: an ordinary smaller model, and everything that reads names after it."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers

import stackcomp as sc
from stackcomp import checkpoint, nn
from stackcomp.core import headers
from stackcomp.core.contract import legal_order, predict
from stackcomp.core.errors import PipelineRefused, SelectionEmpty, SettingError, UnsupportedModel
from stackcomp.core.plan import Plan
from stackcomp.data import Calibration
from stackcomp.manager import plan_of
from tests import toys
from tests.passes.test_conformance import apply, manager

BLOCKS = "encoder.layer.*"
DEPTH = 4


def deep(family, **settings):
    """A toy of four layers."""
    name = {"gpt2": "n_layer", "distilbert": "n_layers"}.get(family, "num_hidden_layers")
    config = toys._config(family)
    setattr(config, name, DEPTH)
    for key, value in settings.items():
        setattr(config, key, value)
    return from_config(config, "AutoModelForSequenceClassification")


def from_config(config, head):
    torch.manual_seed(0)
    model = getattr(transformers, head).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def found(plan):
    """The plan as one would find it in a model: names have no history."""
    return replace(plan, weights=tuple(replace(weight, origin=weight.id) for weight in plan.weights))


def logits(model, tokenizer):
    with torch.no_grad():
        return model(**toys.batch(tokenizer)).logits


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_keeping_all_changes_nothing(family, tokenizer, tmp_path):
    model = deep(family)
    before, digest, config = logits(model, tokenizer), nn.weights_digest(model), model.config.to_dict()
    apply(sc.DropLayers(keep=DEPTH), model, tokenizer, tmp_path)
    assert torch.equal(logits(model, tokenizer), before)
    assert nn.weights_digest(model) == digest
    assert model.config.to_dict() == config


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_the_result_is_an_ordinary_smaller_model(family, tokenizer, tmp_path):
    model, step = deep(family), sc.DropLayers(which=(0, 3))
    whole = {name: part.clone() for name, part in model.state_dict().items()}
    before = plan_of(model)
    predicted = predict((step,), before)[-1]
    apply(step, model, tokenizer, tmp_path)
    assert found(predicted) == plan_of(model)
    assert model.config.num_hidden_layers == 2
    checkpoint.save(model, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in config
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again, tokenizer), logits(model, tokenizer))
    assert found(predicted).weights == plan_of(again).weights
    assert {weight.id: weight for weight in headers.plan_of(tmp_path / "saved").weights} == {
        weight.id: weight for weight in found(predicted).weights
    }
    stack = headers.FAMILIES[family].blocks.removesuffix(".*")
    for name, part in again.state_dict().items():
        assert torch.equal(part, whole[name.replace(f"{stack}.1.", f"{stack}.3.")])


def test_it_loads_where_stackcomp_is_not_known(tokenizer, tmp_path):
    model = deep("bert")
    result = manager(tmp_path / "out", tokenizer).run(model, sc.DropLayers(keep=1))
    torch.save((toys.batch(tokenizer), logits(result.model, tokenizer)), tmp_path / "wanted.pt")
    code = (
        "import sys, torch, transformers\n"
        f"batch, wanted = torch.load({str(tmp_path / 'wanted.pt')!r})\n"
        f"model = transformers.AutoModelForSequenceClassification.from_pretrained({str(tmp_path / 'out')!r})\n"
        "assert 'stackcomp' not in sys.modules and model.config.num_hidden_layers == 1\n"
        "assert torch.equal(model(**batch).logits, wanted)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_first_layers_compute_what_they_did(tokenizer, tmp_path):
    model = from_config(transformers.BertConfig(**toys._ENCODER | {"num_hidden_layers": DEPTH}), "AutoModel")
    batch = toys.batch(tokenizer)
    with torch.no_grad():
        wanted = model(**batch, output_hidden_states=True).hidden_states
        apply(sc.DropLayers(keep=3, which="first"), model, tokenizer, tmp_path)
        kept = model(**batch, output_hidden_states=True).hidden_states
    assert len(kept) == 4
    assert all(torch.equal(one, other) for one, other in zip(kept, wanted, strict=False))


def test_which_layers_stay():
    assert sc.DropLayers(keep=6).kept(12) == (1, 3, 5, 7, 9, 11)
    assert sc.DropLayers(keep=4).kept(6) == (1, 2, 3, 5)
    assert sc.DropLayers(keep=3, which="first").kept(12) == (0, 1, 2)
    assert sc.DropLayers(keep=3, which="last").kept(12) == (9, 10, 11)
    assert sc.DropLayers().kept(5) == (1, 2, 4)
    assert sc.DropLayers(which=[0, 5]).kept(6) == (0, 5)
    for count in range(1, 33):
        for keep in range(1, count + 1):
            kept = sc.DropLayers(keep=keep).kept(count)
            assert len(set(kept)) == keep
            assert list(kept) == sorted(kept)
            assert kept[-1] == count - 1


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_decoders_generate_with_their_cache_and_keep_each_layer_its_attention(kind, tokenizer, tmp_path):
    sizes = {**toys._ENCODER, "num_hidden_layers": DEPTH, "num_key_value_heads": 2, "bos_token_id": 2}
    config = (
        transformers.LlamaConfig(**sizes)
        if kind == "llama"
        else transformers.Qwen2Config(
            **sizes, use_sliding_window=True, sliding_window=3, max_window_layers=2, eos_token_id=3
        )
    )
    model = from_config(config, "AutoModelForCausalLM")
    types = getattr(model.config, "layer_types", None)
    apply(sc.DropLayers(which=(1, 2, 3)), model, tokenizer, tmp_path, task=toys.language_task())
    if kind == "qwen2":
        assert types[1] != types[2]
        assert model.config.layer_types == types[1:]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    ids = toys.batch(tokenizer)["input_ids"][:1]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        wanted = model.generate(ids, use_cache=True, **settings)
        assert torch.equal(model.generate(ids, use_cache=False, **settings), wanted)
        checkpoint.save(model, tmp_path / "saved")
        again = checkpoint.load(tmp_path / "saved")
        assert torch.equal(again.generate(ids, use_cache=True, **settings), wanted)
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "other",
    [
        sc.DenseSparse(ratio=1.3, only=BLOCKS, data_aware=False),
        sc.Int8Weights(only=BLOCKS),
        sc.MagnitudePrune(sparsity="2:4", only="encoder.layer.3"),
    ],
)
def test_compressed_layers_survive_renumbering(other, tokenizer, tmp_path):
    model, drop = deep("bert"), sc.DropLayers(which=(1, 3))
    result = manager(tmp_path / "out", tokenizer).run(model, sc.Pipeline(other, drop))
    before = checkpoint.load(next((tmp_path / "out" / "steps").glob("01-*")))
    for id_, handle in nn.weights(result.model).items():
        old = id_.replace("layer.1.", "layer.3.").replace("layer.0.", "layer.1.")
        assert torch.equal(handle.dense(), nn.weights(before)[old].dense())
        assert handle.spec.matrices == nn.weights(before)[old].spec.matrices
    again = checkpoint.load(tmp_path / "out", "AutoModelForSequenceClassification")
    assert torch.equal(logits(again, tokenizer), logits(result.model, tokenizer))


def test_the_ledger_counts_what_was_dropped(tokenizer, tmp_path):
    model = deep("bert")
    layer = sum(
        handle.spec.total_bytes
        for id_, handle in nn.weights(model).items()
        if id_.startswith("encoder.layer.0.")
    )
    pipeline = sc.Pipeline(
        sc.Int8Weights(only="encoder.layer.0"), sc.DropLayers(keep=2), sc.Int8Weights(only="encoder.layer.0")
    )
    rows = manager(tmp_path / "out", tokenizer).run(model, pipeline).ledger.rows
    small = sum(
        handle.spec.total_bytes
        for id_, handle in nn.weights(
            checkpoint.load(next((tmp_path / "out" / "steps").glob("03-*")))
        ).items()
        if id_.startswith("encoder.layer.0.")
    )
    assert small < layer / 2
    assert [row.layer_bytes for row in rows] == [
        4 * layer,
        3 * layer + small,
        2 * layer,
        layer + small,
    ]
    sizes = [row.size_bytes for row in rows]
    assert sizes == sorted(sizes, reverse=True)


def test_depth_alone_is_the_encoders_compression(tokenizer, tmp_path):
    rows = manager(tmp_path / "out", tokenizer).run(deep("bert"), sc.DropLayers(keep=2)).ledger.rows
    assert rows[0].layer_bytes == 2 * rows[1].layer_bytes
    whole = sum(
        handle.spec.total_bytes
        for id_, handle in nn.weights(deep("bert")).items()
        if id_.startswith("encoder.layer")
    )
    assert rows[0].layer_bytes == whole


def test_a_resumed_run_and_a_pipeline_that_shares_its_start_agree(tokenizer, tmp_path):
    model = deep("bert")
    first = manager(tmp_path / "out", tokenizer).run(model, sc.DropLayers(keep=2))
    longer = sc.Pipeline(sc.DropLayers(keep=2), sc.Int8Weights(only="encoder.layer.1"))
    rows = manager(tmp_path / "out", tokenizer).run(model, longer, resume=True).ledger.rows
    assert rows[1].fingerprint == first.ledger.rows[1].fingerprint
    assert rows[1].layer_bytes == first.ledger.rows[1].layer_bytes


def test_a_student_of_fewer_layers_learns_from_its_teacher(tokenizer, tmp_path):
    model = deep("bert")
    pipeline = sc.Pipeline(
        sc.DropLayers(keep=2), sc.Distill(epochs=8, learning_rate=3e-3, batch_size=8, only=BLOCKS)
    )
    result = manager(tmp_path / "out", tokenizer).run(model, pipeline)
    start = checkpoint.load(next((tmp_path / "out" / "steps").glob("01-*")))
    wanted = logits(model, tokenizer)
    assert (logits(result.model, tokenizer) - wanted).norm() < (logits(start, tokenizer) - wanted).norm()


def test_later_passes_speak_of_the_new_numbers(tokenizer):
    model, drop = deep("bert"), sc.DropLayers(which=(0, 3))
    plans = sc.check(sc.Pipeline(drop, sc.Int8Weights(only="encoder.layer.1")), model)
    assert {weight.origin for weight in plans[-1].weights if weight.id.startswith("encoder.layer.1.")} == {
        weight.id for weight in plans[0].weights if weight.id.startswith("encoder.layer.3.")
    }
    with pytest.raises(SelectionEmpty, match=r"encoder\.layer\.3"):
        sc.check(sc.Pipeline(drop, sc.Int8Weights(only="encoder.layer.3")), model)


def test_a_refusal_finds_the_culprit_across_numbers(tokenizer):
    model, drop = deep("bert"), sc.DropLayers(which=(0, 3))
    rounding = sc.Int8Weights(only="encoder.layer.3")
    with pytest.raises(PipelineRefused) as caught:
        sc.check(sc.Pipeline(rounding, drop, sc.LowRank(only="encoder.layer.1")), model)
    assert "since step 1, Int8Weights, took it away" in str(caught.value)
    # layer 3 is gone where rounding could come last, but then layer 1 is another one
    order = legal_order((rounding, drop, sc.LowRank(only="encoder.layer.1")), plan_of(model))
    assert order == (rounding, sc.LowRank(only="encoder.layer.1"), drop)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keep": 0}, "keep=0"),
        ({"which": "odd"}, "which='odd'"),
        ({"which": (3, 1)}, r"which=\(3, 1\)"),
        ({"which": ()}, r"which=\(\)"),
        ({"which": (-1, 2)}, "which=-1"),
        ({"keep": 3, "which": (0, 1)}, "keep=3 and which="),
        ({"only": "encoder.*"}, "only='encoder"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(SettingError, match=said):
        sc.DropLayers(**settings)


def test_what_does_not_fit_the_model_is_refused_before_any_compute(model):
    with pytest.raises(SettingError, match="keep=3 of 2 layers: give at most 2"):
        sc.check(sc.DropLayers(keep=3), model)
    with pytest.raises(SettingError, match="names layer 2 of 2: give 0 to 1"):
        sc.check(sc.DropLayers(which=(0, 2)), model)
    sc.check(sc.DropLayers(keep=6))
    odd = Plan(tuple(replace(w, id=f"odd.{w.id}", paths=(f"odd.{w.id}",)) for w in plan_of(model).weights))
    with pytest.raises(UnsupportedModel, match="families"):
        predict((sc.DropLayers(),), odd)


def test_layers_that_compute_with_their_number_are_refused(tokenizer, tmp_path):
    model = deep("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UnsupportedModel, match="scale_attn_by_inverse_layer_idx"):
        apply(sc.DropLayers(keep=2), model, tokenizer, tmp_path)


def quieter(model, *places):
    """The model with layers that change next to nothing: what they add to the residual stream is small beside it."""
    with torch.no_grad():
        for place in places:
            layer = model.bert.encoder.layer[place]
            for part in (layer.attention.output.dense, layer.output.dense):
                part.weight.mul_(1e-4)
                part.bias.zero_()
            for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
                norm.weight.fill_(1.0)
                norm.bias.zero_()
    return model


def test_by_influence_the_layers_that_change_least_go(tokenizer, tmp_path):
    model = quieter(deep("bert"), 1, 2)
    step = sc.DropLayers(keep=2, which="influence", samples=8)
    whole = {name: part.clone() for name, part in model.state_dict().items()}
    predicted = sc.check(step, model)[-1]
    result = manager(tmp_path / "out", tokenizer).run(model, step)
    found = result.ledger.rows[1].findings
    assert found["kept"] == [0, 3]
    assert max(found["influence"][1:3]) < min(found["influence"][0], found["influence"][3])
    assert {weight.id for weight in predicted.weights} == {
        weight.id for weight in plan_of(result.model).weights
    }
    for name, part in result.model.state_dict().items():
        assert torch.equal(part, whole[name.replace("layer.1.", "layer.3.")])


def test_influence_is_what_the_hidden_states_say(tokenizer):
    model = deep("bert")
    texts = ["a good film", "the plot was not very bad and the actor"]
    calibration = Calibration(texts, tokenizer)
    states = []
    for text in texts:
        with torch.no_grad():
            states.append(
                model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
            )
    for place, share in enumerate(calibration.influence(model, [*model.bert.encoder.layer])):
        alike = torch.cat(
            [torch.cosine_similarity(each[place][0], each[place + 1][0], dim=-1) for each in states]
        )
        assert share == pytest.approx(1 - alike.mean().item(), abs=1e-5)


def test_what_follows_knows_which_layers_stayed(tokenizer, tmp_path):
    """STF starts from the dense weight of the very layer, whichever the run has kept."""
    model = quieter(deep("bert"), 1, 2)
    pipeline = sc.Pipeline(
        sc.DropLayers(keep=2, which="influence", samples=8), sc.DenseSparse(ratio=1.5, only=BLOCKS, samples=8)
    )
    learned = sc.STF(only=BLOCKS, latent="dense", steps=1, learning_rate=1e-12, samples=8, every=1)
    named = sc.Pipeline(sc.DropLayers(which=(0, 3)), *pipeline.steps[1:], learned)
    results = [
        manager(tmp_path / name, tokenizer).run(model, pipeline)
        for name, pipeline in (("found", sc.Pipeline(*pipeline.steps, learned)), ("named", named))
    ]
    digests = [nn.weights_digest(result.model) for result in results]
    assert digests[0] == digests[1]


def test_by_influence_layers_must_be_alike(tokenizer):
    model, drop = deep("bert"), sc.DropLayers(keep=2, which="influence")
    with pytest.raises(SettingError, match=r"encoder\.layer\.1\.\S+ is not stored as encoder\.layer\.0"):
        sc.check(sc.Pipeline(sc.Int8Weights(only="encoder.layer.0"), drop), model)
    with pytest.raises(SettingError, match="belongs to several layers"):
        sc.check(sc.Pipeline(sc.ShareLayers(group=2), drop), model)
    sc.check(sc.Pipeline(sc.Int8Weights(only=BLOCKS), drop), model)


SIZES = {
    "vocab_size": toys.VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
DECODER = SIZES | {"num_key_value_heads": 1, "bos_token_id": 2, "eos_token_id": 3}


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("SmolLM3", DECODER | {"no_rope_layer_interval": 2}, "no_rope_layers"),
        ("Longformer", SIZES | {"attention_window": [4, 4, 8, 8]}, "attention_window"),
    ],
)
def test_what_a_config_says_of_each_layer_goes_with_it(kind, settings, told, tokenizer, tmp_path):
    model = from_config(getattr(transformers, f"{kind}Config")(**settings), "AutoModel")
    before = getattr(model.config, told)
    apply(sc.DropLayers(which=(0, 3)), model, tokenizer, tmp_path)
    assert getattr(model.config, told) == [before[0], before[3]]
    checkpoint.save(model, tmp_path / "saved")
    again, inputs = checkpoint.load(tmp_path / "saved"), toys.batch(tokenizer)
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("ModernBert", SIZES | {"global_attn_every_n_layers": 3}, "layers.1: its place decides"),
        ("Esm", SIZES | {"position_embedding_type": "rotary", "mask_token_id": 4}, "a part for each layer"),
        ("Qwen3Moe", DECODER | {"num_experts": 2, "mlp_only_layers": [0]}, "layers.1: its place decides"),
        (
            "GPTNeo",
            {"vocab_size": 9, "hidden_size": 16, "num_layers": DEPTH, "num_heads": 2}
            | {"attention_types": [[["global", "local"], 2]], "max_position_embeddings": 16},
            "h.1: its place decides",
        ),
    ],
)
def test_layers_that_are_what_their_place_makes_them_are_refused(kind, settings, said, tokenizer, tmp_path):
    model = from_config(getattr(transformers, f"{kind}Config")(**settings), "AutoModel")
    before, digest = model.config.to_dict(), nn.weights_digest(model)
    with pytest.raises(UnsupportedModel, match=said):
        apply(sc.DropLayers(which=(1, 3)), model, tokenizer, tmp_path)
    assert model.config.to_dict() == before
    assert nn.weights_digest(model) == digest


def test_layers_that_pad_their_text_have_no_influence_to_compare(tokenizer, tmp_path):
    model = from_config(transformers.LongformerConfig(**SIZES, attention_window=8), "AutoModel")
    with pytest.raises(UnsupportedModel, match="which='even'"):
        apply(sc.DropLayers(which="influence", keep=2), model, tokenizer, tmp_path)
