"""`SparseGPT`: less error in outputs than the passes that leave kept values as they are. Parity with the formula: tests/ops."""

import copy

import pytest
import torch

import stackcomp as sc
from stackcomp import nn, ops
from stackcomp.core.errors import SettingError
from stackcomp.ops.second_order import BLOCK
from tests import toys
from tests.ops.test_second_order import output_error, problem
from tests.passes.test_conformance import apply
from tests.passes.test_gptq import moments, output_errors

BLOCKS = "encoder.layer.*"
SPARSITIES = [0.5, 0.75, "2:4", "1:8"]


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_outputs_change_less_than_by_wanda_and_by_magnitude_at_the_same_bytes(sparsity, tokenizer, tmp_path):
    model = toys.bert_classifier()
    before = {id_: handle.dense().clone() for id_, handle in nn.weights(model).items()}
    metrics = moments(model, tokenizer)
    errors, specs = {}, {}
    for method in (sc.SparseGPT, sc.Wanda, sc.MagnitudePrune):
        pruned = copy.deepcopy(model)
        apply(method(sparsity=sparsity, only=BLOCKS), pruned, tokenizer, tmp_path)
        errors[method.__name__] = output_errors(pruned, before, metrics)
        specs[method.__name__] = [nn.weights(pruned)[id_].spec for id_ in metrics]
    assert specs["SparseGPT"] == specs["Wanda"] == specs["MagnitudePrune"]
    assert (errors["SparseGPT"] < errors["MagnitudePrune"]).all()
    assert errors["SparseGPT"].mean() < 0.6 * errors["Wanda"].mean()


@pytest.mark.parametrize("groups", [None, (2, 4)])
def test_on_correlated_inputs_it_beats_the_masks_alone_and_keeps_its_share_of_every_block(groups):
    ratios = []
    for seed in range(8):
        weight, moment = problem(16, BLOCK + 40, seed)
        metric = ops.curvature(moment, damping=0.01)
        found, kept = ops.prune_columns(weight, metric, share=0.5, groups=groups)
        scores = weight.abs() * moment.diagonal().sqrt()
        mask = ops.highest_in_groups(scores, *(groups or (84, 168)))
        assert torch.equal(found != 0, kept)
        assert kept[:, :BLOCK].sum() == 8 * BLOCK
        assert kept[:, BLOCK:].sum() == 8 * 40
        ratios.append(output_error(weight, found, moment) / output_error(weight, weight * mask, moment))
    assert max(ratios) < 1.0
    assert sum(ratios) / len(ratios) < 0.8


def test_a_pattern_that_does_not_divide_the_block_of_the_sweep_is_kept():
    weight, moment = problem(4, 150)
    _, kept = ops.prune_columns(weight, ops.curvature(moment, damping=0.01), groups=(1, 3))
    assert (kept.unflatten(1, (50, 3)).sum(2) == 1).all()


@pytest.mark.parametrize("later", [sc.GPTQ(bits=3, only=BLOCKS), sc.Int8Weights(only=BLOCKS)], ids=str)
def test_rounding_afterwards_keeps_the_support(later, tokenizer, tmp_path):
    model = toys.bert_classifier()
    apply(sc.SparseGPT(sparsity="2:4", only=BLOCKS), model, tokenizer, tmp_path)
    masks = {
        id_: handle.modules[0].matrices["weight"].mask().clone()
        for id_, handle in nn.weights(model).items()
        if id_.startswith("encoder")
    }
    apply(later, model, tokenizer, tmp_path)
    for id_, mask in masks.items():
        assert torch.equal(nn.weights(model)[id_].modules[0].matrices["weight"].mask(), mask)


def test_an_embedding_and_settings_out_of_range_are_refused():
    with pytest.raises(SettingError, match=r"word_embeddings is an embedding.*MagnitudePrune"):
        sc.check(sc.SparseGPT(only="embeddings.word_embeddings"), toys.bert_classifier())
    with pytest.raises(SettingError, match="damping=0"):
        sc.SparseGPT(damping=0.0)
