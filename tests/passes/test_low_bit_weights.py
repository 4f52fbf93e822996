"""`LowBitWeights`: its reach, the bytes of its files, and reloading."""

import math
from fractions import Fraction

import pytest
import torch

import stackcomp as sc
from stackcomp import checkpoint, nn
from stackcomp.core.errors import SettingError
from stackcomp.core.headers import plan_of as plan_of_folder
from stackcomp.manager import plan_of
from stackcomp.metrics.cost import bytes_of_file
from tests import toys
from tests.passes.coded import BLOCKS, FIRST, WORDS, coded
from tests.passes.test_conformance import apply

CODINGS = {4: "int4", 3: "int3", 2: "int2", 1.6: "ternary", 1: "binary"}


def rounded(first, bits, group, tokenizer, tmp_path):
    """The toy, compressed by `first` and rounded; its weights before they were rounded."""
    step = sc.LowBitWeights(bits=bits, group=group, only=(BLOCKS, WORDS))
    return coded(first, step, tokenizer, tmp_path)


@pytest.mark.parametrize("bits", CODINGS)
@pytest.mark.parametrize("first", FIRST, ids=str)
def test_the_file_is_as_small_as_the_bits_say_and_reloads_exactly(first, bits, tokenizer, tmp_path):
    model, before = rounded(first, bits, 8, tokenizer, tmp_path)
    checkpoint.save(model, tmp_path / "saved", tokenizer=tokenizer)
    sizes = bytes_of_file(tmp_path / "saved" / "model.safetensors")
    for id_, handle in nn.weights(model).items():
        name = nn.absolute(model, id_)
        for part, matrix in handle.spec.matrices.items():
            if CODINGS[bits] in handle.spec.parts()[part]:
                stored = {key: size for key, size in sizes.items() if key.startswith(f"{name}.{part}.")}
                lines, length = matrix.lines
                assert stored.pop(f"{name}.{part}.values") == math.ceil(
                    lines * length * Fraction(str(bits)) / 8
                )
                assert stored.pop(f"{name}.{part}.scales") == 2 * lines * -(-length // 8)
                assert sum(stored.values()) == matrix.index_bytes
        if id_.startswith("encoder"):
            assert all(CODINGS[bits] in facts for facts in handle.spec.parts().values())
            assert ((handle.dense() != 0) <= (before[id_] != 0)).all()
            limit = {4: 0.2, 3: 0.4, 2: 0.9, 1.6: 0.6, 1: 0.7}[bits]
            if bits >= 2 or not handle.spec.factored:
                assert (handle.dense() - before[id_]).norm() < limit * before[id_].norm()
    batch = toys.batch(tokenizer)
    reloaded = checkpoint.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, model(**batch).logits)
    assert nn.weights_digest(reloaded) == nn.weights_digest(model)
    assert reloaded.dtype == torch.float32
    read, made = plan_of_folder(tmp_path / "saved"), plan_of(model)
    assert {weight.id: weight for weight in read.weights} == {weight.id: weight for weight in made.weights}


@pytest.mark.parametrize("bits", [4, 3, 2, 1])
def test_a_value_takes_its_bits_and_its_share_of_a_scale(bits, tokenizer, tmp_path):
    model, _ = rounded(None, bits, 8, tokenizer, tmp_path)
    checkpoint.save(model, tmp_path / "saved")
    sizes = bytes_of_file(tmp_path / "saved" / "model.safetensors")
    layer = sum(size for name, size in sizes.items() if ".layer.0.output.dense.weight." in name)
    assert 8 * layer / (16 * 32) == bits + 16 / 8


def test_five_ternary_values_take_a_byte(tokenizer, tmp_path):
    model, _ = rounded(None, 1.6, 8, tokenizer, tmp_path)
    checkpoint.save(model, tmp_path / "saved")
    sizes = bytes_of_file(tmp_path / "saved" / "model.safetensors")
    layer = sum(size for name, size in sizes.items() if ".layer.0.output.dense.weight." in name)
    assert layer == -(-16 * 32 // 5) + 2 * 16 * 32 // 8


@pytest.mark.parametrize(("bits", "levels"), [(1.6, 3), (1, 2)])
def test_a_group_has_two_opposite_values_and_zero(bits, levels, tokenizer, tmp_path):
    model, _ = rounded(None, bits, 8, tokenizer, tmp_path)
    groups = nn.weights(model)["encoder.layer.0.output.dense"].dense().view(-1, 8)
    assert max(len(group.unique()) for group in groups) == levels
    assert max(len(group.abs().unique()) for group in groups) == levels - 1


def test_pruned_zeros_stay_zero(tokenizer, tmp_path):
    model, before = rounded(sc.MagnitudePrune(sparsity=0.6, only=BLOCKS), 2, 8, tokenizer, tmp_path)
    for id_, handle in nn.weights(model).items():
        if id_.startswith("encoder"):
            assert torch.equal(handle.dense() == 0, before[id_] == 0)


def test_a_model_in_bfloat16_keeps_its_scales_so_and_loads_in_another_dtype(tokenizer, tmp_path):
    model = toys.bert_classifier().to(torch.bfloat16)
    apply(sc.LowBitWeights(group=8, only=(BLOCKS, WORDS)), model, tokenizer, tmp_path)
    codings = {
        matrix.scale_coding
        for handle in nn.weights(model).values()
        for matrix in handle.spec.matrices.values()
        if matrix.packed
    }
    assert codings == {"bfloat16"}
    checkpoint.save(model, tmp_path / "saved")
    wide = type(model).from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    checkpoint.save(wide, tmp_path / "again")
    name = "bert.encoder.layer.0.output.dense.weight"
    first, second = (bytes_of_file(tmp_path / folder / "model.safetensors") for folder in ("saved", "again"))
    for part in ("values", "scales"):
        assert first[f"{name}.{part}"] == second[f"{name}.{part}"]
    small, large = (nn.weights(m)["encoder.layer.0.output.dense"].dense() for m in (model, wide))
    assert torch.allclose(small.float(), large, rtol=0.01)


@pytest.mark.parametrize("settings", [{"bits": 8}, {"bits": 5}, {"bits": 1.58}, {"group": 0}, {"group": 2.5}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        sc.LowBitWeights(**settings)
