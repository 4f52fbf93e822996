"""`GPTQ`: less error in outputs than plain rounding at the same bytes, for every stored form."""

import copy
from functools import cache

import pytest
import torch

import stackcomp as sc
from stackcomp import checkpoint, nn, ops
from stackcomp.core.errors import SettingError
from stackcomp.data import Calibration
from tests import toys
from tests.passes.test_conformance import apply

BLOCKS = "encoder.layer.*"
FIRST = [
    None,
    sc.DenseSparse(ratio=1.3, blocks=2, only=BLOCKS),
    sc.LowRank(ratio=1.3, only=BLOCKS),
    sc.SparseLowRank(ratio=1.3, only=BLOCKS),
    sc.MagnitudePrune(sparsity=0.6, only=BLOCKS),
    sc.MagnitudePrune(sparsity="2:4", only=BLOCKS),
]


def plain(bits):
    return sc.Int8Weights(only=BLOCKS) if bits == 8 else sc.LowBitWeights(bits=bits, group=8, only=BLOCKS)


def calibrated(bits):
    return sc.GPTQ(bits=bits, group=None if bits == 8 else 8, only=BLOCKS)


@cache
def compressed(first, scratch):
    """The toy after `first`, to be copied: its weights, and the moments of what flows into them."""
    model = toys.bert_classifier()
    if first is not None:
        apply(first, model, toys.tokenizer(), scratch)
    before = {id_: handle.dense().clone() for id_, handle in nn.weights(model).items()}
    return model, before, moments(model, toys.tokenizer())


def moments(model, tokenizer):
    handles = {id_: h for id_, h in nn.weights(model).items() if id_.startswith("encoder")}
    text = Calibration(toys.classification_task().texts("train", 1024), tokenizer)
    found = text.second_moments(model, {id_: handle.modules for id_, handle in handles.items()})
    return {id_: moment.average for id_, moment in found.items()}


def output_errors(model, before, metrics):
    """Squared error of each layer's outputs, as a share of the outputs."""
    found = []
    for id_, moment in metrics.items():
        weight, error = before[id_], nn.weights(model)[id_].dense() - before[id_]
        found.append(float(torch.trace(error @ moment @ error.T) / torch.trace(weight @ moment @ weight.T)))
    return torch.tensor(found)


@pytest.mark.filterwarnings("ignore::stackcomp.core.errors.TooLittleCalibration")
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1.6, 1])
@pytest.mark.parametrize("first", FIRST, ids=str)
def test_outputs_change_less_than_by_plain_rounding_in_the_same_form(
    first, bits, tokenizer, tmp_path, tmp_path_factory
):
    made, before, metrics = compressed(first, tmp_path_factory.getbasetemp())
    model, rounded = copy.deepcopy(made), copy.deepcopy(made)
    apply(plain(bits), rounded, tokenizer, tmp_path)
    apply(calibrated(bits), model, tokenizer, tmp_path)
    for id_ in metrics:
        ours, theirs = nn.weights(model)[id_], nn.weights(rounded)[id_]
        assert ours.spec == theirs.spec
        for part, matrix in ours.modules[0].matrices.items():
            assert torch.equal(matrix.mask(), theirs.modules[0].matrices[part].mask())
    found, nearest = (output_errors(each, before, metrics) for each in (model, rounded))
    assert (found <= 1.5 * nearest).all()
    assert found.mean() < 0.7 * nearest.mean()


@pytest.mark.parametrize("bits", [8, 2, 1.6, 1])
@pytest.mark.parametrize("first", [sc.MagnitudePrune(sparsity=0.6, only=BLOCKS), sc.Wanda(only=BLOCKS)])
def test_pruned_zeros_stay_zero(first, bits, tokenizer, tmp_path):
    model = toys.bert_classifier()
    apply(first, model, tokenizer, tmp_path)
    zeros = {id_: handle.dense() == 0 for id_, handle in nn.weights(model).items()}
    apply(calibrated(bits), model, tokenizer, tmp_path)
    for id_, handle in nn.weights(model).items():
        if id_.startswith("encoder"):
            assert (handle.dense()[zeros[id_]] == 0).all()


@pytest.mark.parametrize("bits", [8, 3, 1.6])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoder_is_rounded_and_reloads(family, bits, tokenizer, tmp_path):
    model = toys.language_model(family)
    apply(sc.GPTQ(bits=bits), model, tokenizer, tmp_path, task=toys.language_task())
    checkpoint.save(model, tmp_path / "saved")
    batch = toys.batch(tokenizer)
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "saved")(**batch).logits, model(**batch).logits)


def test_an_embedding_is_refused_before_any_text_is_read():
    with pytest.raises(SettingError, match=r"embeddings\.word_embeddings is an embedding.*LowBitWeights"):
        sc.check(sc.GPTQ(only=("embeddings.word_embeddings", BLOCKS)), toys.bert_classifier())


@pytest.mark.parametrize(
    "settings", [{"bits": 5}, {"group": 0}, {"group": 8, "bits": 8}, {"damping": 0.0}, {"samples": 0}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        sc.GPTQ(**settings)


@pytest.mark.filterwarnings("ignore::stackcomp.core.errors.TooLittleCalibration")
def test_scales_weigh_errors_by_what_they_cost_once_others_make_up_for_them(tokenizer, tmp_path):
    model, id_ = toys.bert_classifier(), "encoder.layer.0.output.dense"
    weight, moment = nn.weights(model)[id_].dense().clone(), moments(model, tokenizer)[id_]
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment))
    costs = (1 / torch.linalg.inv(damped).diagonal()).expand_as(weight)
    _, scales = ops.quantize_groups(weight, "int2", 8, weights=costs)
    apply(sc.GPTQ(bits=2, group=8, only=id_), model, tokenizer, tmp_path)
    found = nn.weights(model)[id_].modules[0].matrices["weight"].scales.detach()
    torch.testing.assert_close(found, scales.flatten().float(), rtol=1e-3, atol=1e-4)
