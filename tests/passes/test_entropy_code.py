"""`EntropyCode`: a smaller file that holds the same bits."""

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import stackcomp as sc
from stackcomp import checkpoint, nn
from stackcomp.core import coding, headers, manifest
from stackcomp.core.errors import CheckpointError, SettingError
from stackcomp.manager import plan_of
from tests import toys
from tests.passes.test_conformance import apply, manager

BLOCKS = "encoder.layer.*"


def wide():
    """A toy large enough to be worth coding."""
    return toys.classifier("bert", hidden_size=64, intermediate_size=256)


def skewed(count, dtype):
    """Values as weights have them, as bytes."""
    return (40 * np.random.default_rng(0).standard_normal(count)).astype(dtype).tobytes()


@given(raw=st.binary(max_size=300), planes=st.sampled_from([1, 2, 3, 4, 8]))
def test_any_bytes_come_back(raw, planes):
    assert coding.decode(coding._pack(coding._split(raw, planes)), planes, len(raw)) == raw


@pytest.mark.parametrize(("dtype", "most"), [("float32", 0.9), ("float16", 0.92), ("int8", 0.95)])
def test_what_weights_look_like_gets_smaller(dtype, most):
    raw = skewed(20_001, dtype)
    planes, coded = coding.encode(raw, np.dtype(dtype).itemsize)
    assert planes == np.dtype(dtype).itemsize
    assert len(coded) < most * len(raw)
    assert coding.decode(coded, planes, len(raw)) == raw
    with pytest.raises(CheckpointError, match="does not hold"):
        coding.decode(coded, planes, len(raw) - 1)


def test_noise_stays_as_it_is():
    assert coding.encode(np.random.default_rng(0).bytes(5000), 1) is None


@pytest.mark.parametrize(
    "before",
    [
        sc.Int8Weights(),
        sc.LowBitWeights(
            bits=3, group=5, only=(BLOCKS, "*word_embeddings")
        ),  # sizes that are no multiple of a value's
        sc.ClusterWeights(bits=4),
        sc.MagnitudePrune(sparsity=0.9),
        sc.DenseSparse(ratio=1.4, data_aware=False, only=BLOCKS),
        sc.ShareLayers(only=BLOCKS),
        sc.PruneVocabulary(),
    ],
)
def test_the_file_is_smaller_and_holds_the_same(before, tokenizer, tmp_path):
    result = manager(tmp_path / "out", tokenizer).run(wide(), sc.Pipeline(before, sc.EntropyCode()))
    _, first, second = sorted((tmp_path / "out" / "steps").iterdir())
    assert result.ledger.rows[2].size_bytes < result.ledger.rows[1].size_bytes
    assert result.ledger.rows[2].size_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert nn.weights_digest(checkpoint.load(second)) == nn.weights_digest(checkpoint.load(first))
    plain = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert nn.weights_digest(plain) == nn.weights_digest(result.model)
    assert {weight.id: weight for weight in headers.plan_of(second).weights} == {
        weight.id: weight for weight in headers.plan_of(first).weights
    }


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_tied_weights_are_written_once(family, tmp_path):
    model = toys.language_model(family)
    model.save_pretrained(tmp_path / "plain")
    nn.code(model)
    checkpoint.save(model, tmp_path / "coded")
    plain, coded = (
        headers.read_header(tmp_path / name / "model.safetensors")[0] for name in ("plain", "coded")
    )
    assert coded.keys() - {coding.LISTING} == plain.keys()
    again = checkpoint.load(tmp_path / "coded")
    assert nn.weights_digest(again) == nn.weights_digest(model)
    assert plan_of(again) == plan_of(model)


def test_a_file_stays_coded_whatever_follows(tokenizer, tmp_path):
    pipeline = sc.Pipeline(sc.EntropyCode(), sc.Int8Weights(), sc.FineTune(steps=1, batch_size=4))
    manager(tmp_path / "out", tokenizer).run(wide(), pipeline)
    header, _ = headers.read_header(tmp_path / "out" / "model.safetensors")
    values = header["bert.encoder.layer.0.output.dense.weight.values"]
    assert (values["dtype"], values["shape"]) == ("I8", [64, 256])
    assert values["planes"] == 1


def test_a_model_in_several_files_is_read_as_one(tokenizer, tmp_path):
    model = wide()
    nn.quantize(model, "encoder.layer.0.output.dense", dynamic=False)
    nn.code(model)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    listing = [coding.LISTING in headers.read_header(file)[0] for file in files]
    assert len(files) > 2
    assert sum(listing) == 1
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    batch = toys.batch(tokenizer)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert {*headers.plan_of(tmp_path).weights} == {*plan_of(model).weights}


def test_it_loads_in_another_dtype(tokenizer, tmp_path):
    model = wide()
    apply(sc.EntropyCode(), model, tokenizer, tmp_path)
    checkpoint.save(model, tmp_path / "saved")
    half = type(model).from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert nn.weights_digest(half) == nn.weights_digest(model.to(torch.bfloat16))


def test_damage_is_found_without_the_manifest_too(tmp_path):
    model = wide()
    nn.code(model)
    checkpoint.save(model, tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    name = "bert.encoder.layer.0.output.dense.weight"
    header, start = headers.read_header(path)
    content = bytearray(path.read_bytes())
    first = start + header[name]["data_offsets"][0]
    content[first : first + 40] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        checkpoint.load(tmp_path / "saved")
    (tmp_path / "saved" / manifest.NAME).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        type(model).from_pretrained(tmp_path / "saved")


def test_it_takes_no_globs():
    with pytest.raises(SettingError, match="only="):
        sc.EntropyCode(only=BLOCKS)
