"""Plans read from headers must equal plans of loaded models, family by family: tests/nn checks that; here,
what can go wrong."""

import json
import struct

import pytest

from stackcomp.core import headers
from stackcomp.core.errors import CheckpointError, UnsupportedModel


def write(folder, tensors, config):
    folder.mkdir(exist_ok=True)
    entries, at = {}, 0
    for name, shape in tensors.items():
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
TENSORS = {
    "transformer.wte.weight": [50, 8],
    "transformer.wpe.weight": [6, 8],
    "transformer.h.0.attn.c_attn.weight": [8, 24],
    "transformer.h.0.ln_1.weight": [8],
}


def test_conv1d_is_turned_and_a_tied_head_is_the_embedding(tmp_path):
    plan = headers.plan_of(write(tmp_path / "m", TENSORS, GPT2))
    assert [(w.id, w.kind, w.rows, w.cols, w.paths) for w in plan.weights] == [
        ("wte", "embedding", 50, 8, ("wte", "lm_head")),
        ("wpe", "embedding", 6, 8, ("wpe",)),
        ("h.0.attn.c_attn", "linear", 24, 8, ("h.0.attn.c_attn",)),
    ]
    untied = headers.plan_of(write(tmp_path / "m", TENSORS, {**GPT2, "tie_word_embeddings": False}))
    assert untied["wte"].paths == ("wte",)


def test_an_unknown_family_names_the_known_ones(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"'bart'.*bert"):
        headers.plan_of(write(tmp_path / "m", TENSORS, {"model_type": "bart"}))


def test_an_empty_folder_says_what_is_needed(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"config\.json and \*\.safetensors"):
        headers.plan_of(tmp_path)


@pytest.mark.parametrize("keep", [4, 20, -1])
def test_a_file_cut_short_is_refused(tmp_path, keep):
    path = write(tmp_path / "m", TENSORS, GPT2) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cut short|header says"):
        headers.plan_of(tmp_path / "m")


def test_a_damaged_header_or_config_is_refused(tmp_path):
    folder = write(tmp_path / "m", TENSORS, GPT2)
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:8] + b"!" + raw[9:])
    with pytest.raises(CheckpointError, match="damaged"):
        headers.plan_of(folder)
    for damaged in ("{", "[]"):
        (folder / "config.json").write_text(damaged)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            headers.plan_of(folder)
    (folder / "config.json").write_text('{"model_type": null}')
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(UnsupportedModel, match="model_type=''"):
        headers.plan_of(folder)


@pytest.mark.parametrize(
    "text", ["[]", '{"a": 1}', '{"a": {}}', '{"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}']
)
def test_a_header_of_another_shape_is_damaged(tmp_path, text):
    folder = write(tmp_path / "m", TENSORS, GPT2)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text.encode())
    with pytest.raises(CheckpointError, match="damaged safetensors header"):
        headers.plan_of(folder)


@pytest.mark.parametrize(
    "said", [[], {"weights": []}, {}, {"weights": {"a": 1}}, {"weights": {}, "shared": 1}]
)
def test_a_config_that_does_not_say_how_weights_are_stored_is_damaged(tmp_path, said):
    ours = {"quant_method": "stackcomp", **said} if isinstance(said, dict) else [said]
    folder = write(tmp_path / "m", TENSORS, {**GPT2, "quantization_config": ours})
    with pytest.raises(CheckpointError):
        headers.plan_of(folder)


@pytest.mark.parametrize("kind", headers.PLAIN_KINDS)
def test_a_plain_model_of_each_family_has_blocks_and_an_embedding(kind):
    plan = headers.plain(kind)
    assert plan.weights[0].kind == "embedding"
    assert len(plan.select(only=headers.FAMILIES[kind].blocks, skip=None)) >= 8
