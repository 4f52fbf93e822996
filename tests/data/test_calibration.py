"""Calibration: real tokens only, one run for all layers, and the model left as it was."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from stackcomp.core.errors import DataError, TooLittleCalibration, UnsupportedModel
from stackcomp.data import Calibration

TEXTS = [
    "the film was very good",
    "bad plot",
    "a good actor and a bad film",
    "not the film",
    "very very bad actor",
] * 3


def bert(seed: int = 0) -> BertModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=32,
    )
    return BertModel(config).train()


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}


def test_moments_are_those_of_each_text_alone(tokenizer) -> None:
    model = bert()
    wanted = {name: module for name, module in linears(model).items() if "pooler" not in name}
    found = Calibration(TEXTS, tokenizer, batch_size=4).second_moments(model, wanted)
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in wanted}
    hooks = [
        module.register_forward_pre_hook(lambda _, x, name=name: inputs[name].append(x[0][0].detach()))
        for name, module in wanted.items()
    ]
    model.eval()
    for text in TEXTS:  # one at a time, so nothing is padded
        model(**tokenizer(text, return_tensors="pt"))
    for hook in hooks:
        hook.remove()
    for name, moment in found.items():
        x = torch.cat(inputs[name])
        assert moment.count == len(x)
        torch.testing.assert_close(moment.total, x.T @ x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moment.mean, x.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moment.average, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_layers_with_one_input_share_one_moment(tokenizer) -> None:
    model = bert()
    found = Calibration(TEXTS, tokenizer).second_moments(model, linears(model))
    attention = "encoder.layer.0.attention"
    assert found[f"{attention}.self.query"] is found[f"{attention}.self.value"]
    assert found[f"{attention}.self.query"] is not found[f"{attention}.output.dense"]
    assert found["pooler.dense"].count == len(TEXTS)


def test_inputs_of_all_modules_that_use_a_weight_are_taken_together(tokenizer) -> None:
    model = bert()
    calibration = Calibration(TEXTS, tokenizer, batch_size=4)
    first, second = (layer.output.dense for layer in model.encoder.layer)
    alone = calibration.second_moments(model, {"first": first, "second": second})
    found = calibration.second_moments(model, {"both": (first, second, first)})["both"]
    assert found.count == alone["first"].count + alone["second"].count
    torch.testing.assert_close(found.total, alone["first"].total + alone["second"].total)
    torch.testing.assert_close(found.mean, (alone["first"].mean + alone["second"].mean) / 2)


def test_one_layer_alone_gives_the_same_and_stops_early(tokenizer) -> None:
    model = bert()
    calibration = Calibration(TEXTS, tokenizer, batch_size=4)
    name = "encoder.layer.0.intermediate.dense"
    everything = calibration.second_moments(model, linears(model))[name]
    runs = []
    model.encoder.layer[1].register_forward_hook(lambda *_: runs.append(1))
    alone = calibration.second_moments(model, {name: linears(model)[name]})[name]
    assert torch.equal(alone.total, everything.total)
    assert len(runs) == 1  # the first batch, which counts the calls
    assert len(calibration) == 4


def test_the_model_is_left_as_it_was(tokenizer) -> None:
    model = bert()
    model.encoder.layer[1].eval()
    modes = [module.training for module in model.modules()]
    Calibration(TEXTS, tokenizer).second_moments(model, linears(model))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_conv1d_of_a_decoder(tokenizer) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=4, n_layer=1, n_head=2))
    found = Calibration(TEXTS, tokenizer, max_length=8).second_moments(
        model, {"fc": model.transformer.h[0].mlp.c_fc}
    )
    assert found["fc"].total.shape == (4, 4)
    encoded = tokenizer(TEXTS, truncation=True, max_length=8)
    assert found["fc"].count == sum(len(row) for row in encoded["input_ids"])


def test_too_little_text_warns_with_the_rank(tokenizer) -> None:
    model = bert()
    name = "encoder.layer.0.output.dense"
    with pytest.warns(TooLittleCalibration, match="3 calibration tokens for 12 input features"):
        found = Calibration(["film"], tokenizer).second_moments(model, {name: linears(model)[name]})
    assert torch.linalg.matrix_rank(found[name].total) <= 3


def test_no_text_and_unreached_layers_are_refused(tokenizer) -> None:
    with pytest.raises(DataError, match="needs text"):
        Calibration([], tokenizer)
    with pytest.raises(UnsupportedModel, match="stray: the model never runs"):
        Calibration(TEXTS, tokenizer).second_moments(bert(), {"stray": nn.Linear(8, 8)})


def test_texts_without_a_token_are_left_out(tokenizer) -> None:
    def bare(texts, **options):
        return tokenizer(texts, add_special_tokens=False, **options)

    bare.pad_token_id, bare.pad_token_type_id = tokenizer.pad_token_id, tokenizer.pad_token_type_id
    model = bert()
    found = [
        Calibration(texts, bare).second_moments(model, linears(model.encoder)).values()
        for texts in (TEXTS, [*TEXTS[:4], "", *TEXTS[4:]])
    ]
    assert all(torch.equal(a.total, b.total) for a, b in zip(*found, strict=True))
    with pytest.raises(DataError, match="its 2 texts are blank"):
        Calibration(["", ""], bare)
