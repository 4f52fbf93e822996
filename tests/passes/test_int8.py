"""`Int8Weights` and `Int8Dynamic`: parity with torchao, and their reach into factors."""

import copy

import pytest
import torch

import stackcomp as sc
from stackcomp import checkpoint, nn
from stackcomp.core.errors import SettingError
from tests import toys
from tests.passes.test_conformance import apply

BLOCKS = "encoder.layer.*"


@pytest.mark.filterwarnings("ignore")  # torchao's own
@pytest.mark.parametrize(
    ("step", "config"),
    [(sc.Int8Weights(), "Int8WeightOnlyConfig"), (sc.Int8Dynamic(), "Int8DynamicActivationInt8WeightConfig")],
)
def test_a_whole_model_agrees_with_torchao(step, config, tokenizer, tmp_path):
    from torchao import quantization

    model = toys.bert_classifier()
    theirs = copy.deepcopy(model)
    quantization.quantize_(theirs, getattr(quantization, config)())
    apply(step, model, tokenizer, tmp_path)
    batch = toys.batch(tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, theirs(**batch).logits, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    "first", [sc.DenseSparse(ratio=1.5, only=BLOCKS), sc.LowRank(ratio=1.5, only=BLOCKS)]
)
@pytest.mark.parametrize("second", [sc.Int8Weights(only=BLOCKS), sc.Int8Dynamic(only=BLOCKS)])
def test_both_factors_are_reached_and_the_error_is_half_a_step(first, second, tokenizer, tmp_path):
    model = toys.bert_classifier()
    apply(first, model, tokenizer, tmp_path)
    before = {id_: handle.dense().clone() for id_, handle in nn.weights(model).items()}
    kept = {
        id_: matrix.mask().clone()
        for id_, handle in nn.weights(model).items()
        if handle.spec.factored
        for matrix in [handle.modules[0].matrices["coefficients"]]
    }
    apply(second, model, tokenizer, tmp_path)
    for id_, handle in nn.weights(model).items():
        if handle.spec.factored:
            assert {matrix.coding for matrix in handle.spec.matrices.values()} == {"int8"}
            assert torch.equal(handle.modules[0].matrices["coefficients"].mask(), kept[id_])
            assert (handle.dense() - before[id_]).norm() < 0.03 * before[id_].norm()


def test_pruned_zeros_stay_zero(tokenizer, tmp_path):
    model = toys.bert_classifier()
    apply(sc.MagnitudePrune(sparsity=0.6, only=BLOCKS), model, tokenizer, tmp_path)
    zeros = {id_: handle.dense() == 0 for id_, handle in nn.weights(model).items()}
    apply(sc.Int8Weights(only=BLOCKS), model, tokenizer, tmp_path)
    for id_, handle in nn.weights(model).items():
        assert (handle.dense()[zeros[id_]] == 0).all()


@pytest.mark.parametrize("first", [None, sc.DenseSparse(ratio=1.5, only=BLOCKS)], ids=str)
def test_outliers_are_stored_as_a_setting_and_reload(first, tokenizer, tmp_path):
    model = toys.bert_classifier()
    if first is not None:
        apply(first, model, tokenizer, tmp_path)
    plain = copy.deepcopy(model)
    apply(sc.Int8Dynamic(only=BLOCKS, outliers=1.5), model, tokenizer, tmp_path)
    apply(sc.Int8Dynamic(only=BLOCKS), plain, tokenizer, tmp_path)
    checkpoint.save(model, tmp_path / "some")
    checkpoint.save(plain, tmp_path / "all")
    sizes = [checkpoint.components(tmp_path / name) for name in ("some", "all")]
    assert sizes[0] == sizes[1]
    batch = toys.batch(tokenizer)
    with torch.no_grad():
        logits = model(**batch).logits
        assert torch.equal(checkpoint.load(tmp_path / "some")(**batch).logits, logits)
        assert not torch.equal(plain(**batch).logits, logits)


@pytest.mark.parametrize("outliers", [0.0, -1.0, float("nan"), True, "6"])
def test_outliers_out_of_range_are_refused(outliers):
    with pytest.raises(SettingError, match="outliers"):
        sc.Int8Dynamic(outliers=outliers)


def test_embeddings_are_rounded_when_named(tokenizer, tmp_path):
    model = toys.bert_classifier()
    apply(sc.Int8Weights(only="embeddings.word_embeddings"), model, tokenizer, tmp_path)
    spec = nn.weights(model)["embeddings.word_embeddings"].spec
    assert spec.matrices["weight"].coding == "int8"
    assert spec.total_bytes == spec.rows * spec.cols + 4 * spec.rows
