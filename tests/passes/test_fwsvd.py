"""`FWSVD` against its formula, and the plain SVD it is compared with."""

import pytest
import torch

import stackcomp as sc
from stackcomp import data, nn
from stackcomp.core.errors import UnreachableRatio
from stackcomp.training import TaskLoss
from tests import toys
from tests.passes.test_conformance import apply

BLOCKS = "encoder.layer.*"


def fisher(model, task, tokenizer, parameter):
    """Squared gradients of one example at a time, meaned."""
    encoded = task.encode(tokenizer, "train")
    collate, loss = data.Collator(tokenizer), TaskLoss(task=task)
    total = torch.zeros_like(parameter)
    for row in encoded.to_list():
        (gradient,) = torch.autograd.grad(loss(model, collate([row])), [parameter])
        total += gradient.square()
    return total / encoded.num_rows


def test_factors_are_those_of_the_formula(model, tokenizer, tmp_path):
    id_ = "encoder.layer.1.intermediate.dense"
    handle = nn.weights(model)[id_]
    weight = handle.dense().clone()
    importance = fisher(model, toys.classification_task(), tokenizer, handle.parameter).sum(1)
    findings = apply(sc.FWSVD(ratio=2.0, only=id_), model, tokenizer, tmp_path)
    rank = 32 * 16 // (2 * (32 + 16))
    assert findings == {"layers": {id_: f"rank {rank}"}}
    root = importance.sqrt()
    u, s, v = torch.linalg.svd(root[:, None] * weight, full_matrices=False)
    wanted = (u[:, :rank] * s[:rank] @ v[:rank]) / root[:, None]
    torch.testing.assert_close(nn.weights(model)[id_].dense(), wanted, rtol=1e-3, atol=1e-4)
    assert nn.weights(model)[id_].spec.matrices["basis"].rows == rank


def test_rows_of_conv1d_are_outputs(tokenizer, tmp_path):
    model, task = toys.gpt2_lm(), toys.language_task()
    id_ = "h.0.mlp.c_fc"
    handle = nn.weights(model)[id_]
    weight = handle.dense().clone()
    importance = fisher(model, task, tokenizer, handle.parameter).sum(0)
    assert importance.shape == (weight.shape[0],)
    apply(sc.FWSVD(ratio=2.0, only=id_), model, tokenizer, tmp_path, task=task)
    found = nn.weights(model)[id_]
    rank = found.spec.matrices["basis"].rows
    u, s, v = torch.linalg.svd(importance.sqrt()[:, None] * weight, full_matrices=False)
    wanted = (u[:, :rank] * s[:rank] @ v[:rank]) / importance.sqrt()[:, None]
    torch.testing.assert_close(found.dense(), wanted, rtol=1e-3, atol=1e-3)


def test_batches_average_before_squaring_and_the_model_is_left_alone(model, tokenizer):
    task = toys.classification_task()
    handles = {"classifier": nn.weights(model)["classifier"]}
    collate, rows = data.Collator(tokenizer), task.encode(tokenizer, "train").to_list()[:4]
    loss = TaskLoss(task=task)
    (gradient,) = torch.autograd.grad(loss(model, collate(rows)), [handles["classifier"].parameter])
    flags, digest = [part.requires_grad for part in model.parameters()], nn.weights_digest(model)
    found = data.row_importance(model.train(), handles, [collate(rows)], loss)
    torch.testing.assert_close(found["classifier"], gradient.square().sum(1))
    assert model.training
    assert [part.requires_grad for part in model.parameters()] == flags
    assert nn.weights_digest(model) == digest
    assert all(part.grad is None for part in model.parameters())


def test_a_layer_that_the_loss_does_not_reach_gets_the_plain_svd(tokenizer, tmp_path):
    model = toys.make("bert", "AutoModelForMaskedLM", tie_word_embeddings=False)
    id_ = "encoder.layer.0.intermediate.dense"
    weight = nn.weights(model)[id_].dense().clone()
    with torch.no_grad():  # nothing of this layer is read
        model.bert.encoder.layer[0].output.dense.weight.zero_()
    apply(sc.FWSVD(ratio=2.0, only=id_), model, tokenizer, tmp_path, task=toys.language_task())
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(nn.weights(model)[id_].dense(), u[:, :5] * s[:5] @ v[:5], rtol=1e-4, atol=1e-4)


def test_small_layers_are_left_dense_and_a_ratio_for_none_is_refused(model, tokenizer, tmp_path):
    findings = apply(sc.FWSVD(only=(BLOCKS, "classifier")), model, tokenizer, tmp_path)
    assert "too small" in findings["layers"]["classifier"]
    assert not nn.weights(model)["classifier"].spec.factored
    with pytest.raises(UnreachableRatio, match=r"ratio=50 leaves no rank.*the largest is 10\.67"):
        sc.check(sc.FWSVD(ratio=50.0, only=BLOCKS), toys.bert_classifier())


@pytest.mark.parametrize("only", [BLOCKS, (BLOCKS, "classifier")])
@pytest.mark.parametrize("ratio", [1.3, 2.0, 2.7])
def test_plain_svd_has_one_ratio_for_every_layer(ratio, only, tokenizer, tmp_path):
    model = toys.make("bert", "AutoModelForSequenceClassification", hidden_size=64, intermediate_size=128)
    dense = {id_: handle.dense().clone() for id_, handle in nn.weights(model).items()}
    apply(sc.LowRank(ratio=ratio, data_aware=False, spread=1.0, only=only), model, tokenizer, tmp_path)
    for id_, handle in nn.weights(model).items():
        if id_.startswith("encoder"):
            rows, cols = handle.spec.rows, handle.spec.cols
            rank = handle.spec.matrices["basis"].rows
            uniform = int(rows * cols / (ratio * (rows + cols)))
            # a small layer that stays dense is made up for by all
            assert rank == uniform or (only != BLOCKS and uniform - 1 <= rank < uniform)
            u, s, v = torch.linalg.svd(dense[id_], full_matrices=False)
            torch.testing.assert_close(
                handle.dense(), u[:, :rank] * s[:rank] @ v[:rank], rtol=1e-4, atol=1e-4
            )
    assert nn.weights(model)["classifier"].spec.factored is (only != BLOCKS and ratio < 1.9)
