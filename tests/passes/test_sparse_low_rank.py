"""`SparseLowRank`: a weight stored as a sum, in the bytes that were asked for, and what later passes make of it."""

import pytest
import torch

import stackcomp as sc
from stackcomp import checkpoint, nn
from stackcomp.core.errors import SettingError, UnreachableRatio
from stackcomp.core.facts import Fact
from tests import toys
from tests.passes.test_conformance import apply
from tests.passes.test_gptq import moments, output_errors

BLOCKS = "encoder.layer.*"
PARTS = {"weight", "basis", "coefficients"}


def sums(model):
    return {id_: handle for id_, handle in nn.weights(model).items() if set(handle.spec.matrices) == PARTS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank_ratio", [0.2, 0.6])
@pytest.mark.parametrize("ratio", [1.1, 1.5, 2.0])
def test_every_layer_keeps_the_ratio_with_all_bytes_counted(ratio, rank_ratio, dtype, tokenizer, tmp_path):
    model = toys.classifier("bert", hidden_size=32, intermediate_size=96).to(dtype)
    step = sc.SparseLowRank(ratio=ratio, rank_ratio=rank_ratio, iterations=2, only=BLOCKS)
    findings = apply(step, model, tokenizer, tmp_path)
    found = sums(model)
    assert len(found) == 12 == len(findings["layers"])
    for id_, handle in found.items():
        spec, bytes_ = handle.spec, dtype.itemsize
        assert 0 <= spec.dense_count * bytes_ / ratio - spec.total_bytes < bytes_
        rank, kept = spec.matrices["basis"].rows, spec.matrices["weight"].layout.nonzeros
        assert findings["layers"][id_] == f"rank {rank}, and {kept} of {spec.dense_count} entries"
        of_rank = rank * (spec.rows + spec.cols)
        assert 0 <= rank_ratio * (of_rank + kept) - of_rank < spec.rows + spec.cols
        assert spec.parts() == {
            "weight": {Fact.FLOAT, Fact.SPARSE, Fact.TRAINABLE},
            "basis": {Fact.FLOAT, Fact.DENSE, Fact.TRAINABLE, Fact.FACTOR},
            "coefficients": {Fact.FLOAT, Fact.DENSE, Fact.TRAINABLE, Fact.FACTOR},
        }


def test_outputs_change_less_than_by_pruning_or_low_rank_at_the_same_bytes(tokenizer, tmp_path):
    """Of weights that have both a few directions and a few large entries."""
    chance = torch.Generator().manual_seed(1)
    errors = {}
    for step in (
        sc.SparseLowRank(ratio=3.0, rank_ratio=0.5, only=BLOCKS),
        sc.MagnitudePrune(sparsity=1 - (1 / 3 - 1 / 32), only=BLOCKS),
        sc.LowRank(ratio=3.0, spread=1.0, sensitivity=False, only=BLOCKS),
    ):
        model = toys.classifier("bert", hidden_size=32, intermediate_size=96)
        with torch.no_grad():
            for id_, handle in nn.weights(model).items():
                if id_.startswith("encoder"):
                    n, m = handle.spec.rows, handle.spec.cols
                    smooth = torch.randn(n, 2, generator=chance) @ torch.randn(2, m, generator=chance)
                    spikes = torch.randn(n, m, generator=chance) * (torch.rand(n, m, generator=chance) < 0.1)
                    noise = torch.randn(n, m, generator=chance)
                    handle.parameter.copy_(0.1 * smooth + spikes + 0.02 * noise)
        before = {id_: handle.dense().clone() for id_, handle in nn.weights(model).items()}
        metrics = moments(model, tokenizer)
        apply(step, model, tokenizer, tmp_path)
        errors[step.name] = output_errors(model, before, metrics).mean()
    assert errors["SparseLowRank"] < 0.5 * min(errors["MagnitudePrune"], errors["LowRank"])


@pytest.mark.parametrize(
    ("family", "then"),
    [
        ("bert", None),
        ("gpt2", sc.Int8Weights()),
        ("llama", sc.LowBitWeights(bits=4, group=8)),
        ("bert", sc.Int8Dynamic(only=BLOCKS)),
        ("bert", sc.GPTQ(bits=3, group=8, only=BLOCKS)),
        ("bert", sc.QuantizationAware(bits=4, group=8, steps=3, batch_size=4, only=BLOCKS)),
        ("bert", sc.EntropyCode()),
        ("bert", sc.DropLayers(keep=1)),
    ],
    ids=str,
)
def test_it_stacks_and_reloads(family, then, tokenizer, tmp_path):
    model = toys.classifier(family)
    blocks = sc.core.families.FAMILIES[family].blocks
    apply(sc.SparseLowRank(ratio=1.4, only=blocks), model, tokenizer, tmp_path)
    before = sums(model)
    dense = {id_: handle.dense().clone() for id_, handle in before.items()}
    if then is not None:
        apply(then, model, tokenizer, tmp_path)
    after = sums(model)
    assert after
    rounds = Fact.FLOAT in then.contract.removes if then is not None else False
    for id_, handle in after.items():
        assert all((Fact.FLOAT in words) is not rounds for words in handle.spec.parts().values())
        stored, were = handle.matrices["weight"], before[id_].matrices["weight"]
        if len(after) == len(before):
            assert torch.equal(stored.mask(), were.mask())
            assert (handle.dense() - dense[id_]).norm() < 0.25 * dense[id_].norm()
    model.eval()
    checkpoint.save(model, tmp_path / "saved")
    batch = toys.batch(tokenizer)
    with torch.no_grad():
        logits = model(**batch).logits
        assert torch.equal(checkpoint.load(tmp_path / "saved")(**batch).logits, logits)
        assert torch.equal(type(model).from_pretrained(tmp_path / "saved")(**batch).logits, logits)


def test_training_moves_all_three_and_leaves_the_support(model, tokenizer, tmp_path):
    apply(sc.SparseLowRank(ratio=1.4, only=BLOCKS), model, tokenizer, tmp_path)
    masks = {id_: handle.matrices["weight"].mask() for id_, handle in sums(model).items()}
    values = {
        (id_, part): matrix.values.detach().clone()
        for id_, handle in sums(model).items()
        for part, matrix in handle.matrices.items()
    }
    apply(sc.FineTune(steps=3, batch_size=4), model, tokenizer, tmp_path)
    assert all(
        torch.equal(handle.matrices["weight"].mask(), masks[id_]) for id_, handle in sums(model).items()
    )
    for (id_, part), were in values.items():
        assert not torch.equal(nn.weights(model)[id_].matrices[part].values, were), (id_, part)


def test_a_layer_too_small_to_gain_is_left_dense_and_the_findings_say_so(model, tokenizer, tmp_path):
    step = sc.SparseLowRank(ratio=2.0, only=(BLOCKS, "classifier"))
    findings = apply(step, model, tokenizer, tmp_path)
    assert findings["layers"]["classifier"] == "left dense: too small to gain"
    assert "weight" in nn.weights(model)["classifier"].spec.matrices
    assert not nn.weights(model)["classifier"].spec.factored


def test_the_largest_ratio_is_said_before_any_weight_is_read_and_can_be_reached(tokenizer, tmp_path):
    model = toys.bert_classifier()
    with pytest.raises(
        UnreachableRatio, match=r"ratio=50 leaves no rank to any of these 12.*the largest is 7\.88"
    ):
        sc.check(sc.SparseLowRank(ratio=50.0, only=BLOCKS), model)
    apply(sc.SparseLowRank(ratio=7.87, only=BLOCKS), model, tokenizer, tmp_path)
    assert {handle.spec.matrices["weight"].count for handle in sums(model).values()} == {1}
    halves = toys.bert_classifier().to(torch.bfloat16)  # beside which a bitmap weighs twice as much
    with pytest.raises(UnreachableRatio, match=r"the largest is 6\.32"):
        apply(sc.SparseLowRank(ratio=7.87, only=BLOCKS), halves, tokenizer, tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": 0.5},
        {"ratio": float("nan")},
        {"rank_ratio": -0.1},
        {"rank_ratio": 1.1},
        {"rank_ratio": "half"},
        {"iterations": 0},
        {"iterations": 1.5},
        {"samples": 0},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(SettingError, match=f"{next(iter(settings))}="):
        sc.SparseLowRank(**settings)


def test_embeddings_and_rows_of_a_sum_are_refused(tokenizer, tmp_path):
    with pytest.raises(SettingError, match=r"word_embeddings is an embedding.*FactorizeEmbeddings"):
        sc.check(sc.SparseLowRank(only="embeddings.word_embeddings"), toys.bert_classifier())
    model = toys.language_model("llama", tie_word_embeddings=False)
    apply(sc.SparseLowRank(ratio=1.2, only="lm_head"), model, tokenizer, tmp_path, task=toys.language_task())
    assert [*sums(model)] == ["lm_head"]
    with pytest.raises(SettingError, match="rows of a matrix that is free"):
        nn.keep_words(model, range(10))
