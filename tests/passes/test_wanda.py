"""`Wanda`: which entries stay, and that inputs count."""

import copy

import pytest
import torch

import stackcomp as sc
from stackcomp import nn
from stackcomp.core.errors import SettingError
from tests import toys
from tests.passes.test_conformance import apply
from tests.passes.test_gptq import moments, output_errors

BLOCKS = "encoder.layer.*"
SPARSITIES = [0.5, 0.75, "2:4", "1:8"]


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_each_row_keeps_the_highest_products_of_weight_and_input_norm(sparsity, tokenizer, tmp_path):
    """The paper's listing: scores |W| * ||X_j||, sorted within a row or a group; kept values are untouched."""
    model = toys.bert_classifier()
    before = {id_: handle.dense().clone() for id_, handle in nn.weights(model).items()}
    metrics = moments(model, tokenizer)
    apply(sc.Wanda(sparsity=sparsity, only=BLOCKS), model, tokenizer, tmp_path)
    for id_, moment in metrics.items():
        found, weight = nn.weights(model)[id_].dense(), before[id_]
        rows, cols = weight.shape
        kept, group = (2, 4) if sparsity == "2:4" else (1, 8) if sparsity == "1:8" else (None, cols)
        kept = kept or round(cols * (1 - sparsity))
        scores = (weight.abs() * moment.diagonal() ** 0.5).view(rows, -1, group)
        dropped = scores.argsort(dim=2)[:, :, : group - kept]
        expected = weight.clone().view(rows, -1, group).scatter(2, dropped, 0).view(rows, cols)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_outputs_change_less_than_by_magnitude_at_the_same_bytes(sparsity, tokenizer, tmp_path):
    model = toys.bert_classifier()
    before = {id_: handle.dense().clone() for id_, handle in nn.weights(model).items()}
    metrics = moments(model, tokenizer)
    other = copy.deepcopy(model)
    apply(sc.MagnitudePrune(sparsity=sparsity, only=BLOCKS), other, tokenizer, tmp_path)
    apply(sc.Wanda(sparsity=sparsity, only=BLOCKS), model, tokenizer, tmp_path)
    ours, theirs = (nn.weights(each) for each in (model, other))
    assert all(ours[id_].spec == theirs[id_].spec for id_ in metrics)
    assert output_errors(model, before, metrics).mean() < output_errors(other, before, metrics).mean()


def test_both_factors_of_a_low_rank_layer_are_pruned(tokenizer, tmp_path):
    model = toys.bert_classifier()
    apply(sc.LowRank(ratio=1.3, only=BLOCKS), model, tokenizer, tmp_path)
    apply(sc.Wanda(sparsity=0.5, only=BLOCKS), model, tokenizer, tmp_path)
    factored = [handle.spec for handle in nn.weights(model).values() if handle.spec.factored]
    assert factored
    for spec in factored:
        for matrix in spec.matrices.values():
            outputs = matrix.cols if spec.transposed else matrix.rows
            inputs = matrix.rows if spec.transposed else matrix.cols
            assert matrix.layout.nonzeros == outputs * round(inputs / 2)


def test_an_embedding_and_a_group_that_does_not_divide_are_refused():
    model = toys.bert_classifier()
    with pytest.raises(SettingError, match=r"word_embeddings is an embedding.*MagnitudePrune"):
        sc.check(sc.Wanda(only="embeddings.word_embeddings"), model)
    with pytest.raises(SettingError, match=r"3 does not divide the 16 inputs of encoder\.layer\.0"):
        sc.check(sc.Wanda(sparsity="1:3", only=BLOCKS), model)
    with pytest.raises(SettingError, match="samples=0"):
        sc.Wanda(samples=0)
