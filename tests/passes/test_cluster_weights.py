"""`ClusterWeights`: its reach, the bytes of its files, reloading, and what training leaves as it was."""

import math

import pytest
import torch
import transformers

import stackcomp as sc
from stackcomp import checkpoint, nn
from stackcomp.core.contract import legal
from stackcomp.core.errors import BadWeights, SettingError
from stackcomp.core.headers import plan_of as plan_of_folder
from stackcomp.manager import plan_of
from stackcomp.metrics.cost import bytes_of_file
from tests import toys
from tests.passes.coded import BLOCKS, FIRST, WORDS, coded
from tests.passes.test_conformance import apply, manager

LAYER = "encoder.layer.0.output.dense"


@pytest.mark.parametrize(("bits", "codebook"), [(2, "matrix"), (3, "row"), (5, "matrix")])
@pytest.mark.parametrize("first", FIRST, ids=str)
def test_the_file_holds_codes_and_codebooks_and_reloads_exactly(first, bits, codebook, tokenizer, tmp_path):
    step = sc.ClusterWeights(bits=bits, codebook=codebook, only=(BLOCKS, WORDS))
    model, before = coded(first, step, tokenizer, tmp_path)
    checkpoint.save(model, tmp_path / "saved", tokenizer=tokenizer)
    sizes = bytes_of_file(tmp_path / "saved" / "model.safetensors")
    for id_, handle in nn.weights(model).items():
        for part, words in handle.spec.parts().items():
            assert ("codebook" in words) == (id_.startswith("encoder") or id_ == WORDS)
            if "codebook" in words:
                lines, length = handle.spec.matrices[part].lines
                name = f"{nn.absolute(model, id_)}.{part}"
                assert sizes[f"{name}.values"] == math.ceil(lines * length * bits / 8)
                assert sizes[f"{name}.scales"] == 2 * 2**bits * (lines if codebook == "row" else 1)
        if bits > 2 or not handle.spec.factored:  # errors of two factors add up
            limit = {2: 0.5, 3: 0.3, 5: 0.15}[bits]
            assert (handle.dense() - before[id_]).norm() < limit * before[id_].norm()
        assert ((handle.dense() != 0) <= (before[id_] != 0)).all()
    batch = toys.batch(tokenizer)
    plain = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, model(**batch).logits)
    assert nn.weights_digest(checkpoint.load(tmp_path / "saved")) == nn.weights_digest(model)
    read, made = plan_of_folder(tmp_path / "saved"), plan_of(model)
    assert {weight.id: weight for weight in read.weights} == {weight.id: weight for weight in made.weights}


@pytest.mark.parametrize(("codebook", "most"), [("matrix", 16 * 32), ("row", 32)])
def test_as_many_values_are_left_as_the_codebook_has(codebook, most, tokenizer, tmp_path):
    model = toys.bert_classifier()
    apply(sc.ClusterWeights(bits=2, codebook=codebook, only=LAYER), model, tokenizer, tmp_path)
    runs = nn.weights(model)[LAYER].dense().reshape(-1, most)
    assert [len(run.unique()) for run in runs] == [4] * len(runs)


@pytest.mark.parametrize(
    "training", [sc.FineTune(steps=3, learning_rate=1e-2), sc.Distill(steps=3, learning_rate=1e-2)]
)
@pytest.mark.parametrize("first", [FIRST[0], FIRST[3]], ids=str)
def test_training_moves_shared_values_and_keeps_codes(first, training, tokenizer, tmp_path):
    model = toys.bert_classifier()
    if first is not None:
        apply(first, model, tokenizer, tmp_path)
    apply(sc.ClusterWeights(bits=3, only=BLOCKS), model, tokenizer, tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    zeros = nn.weights(model)[LAYER].dense() == 0
    apply(training, model, tokenizer, tmp_path)
    after = model.state_dict()
    shared = [name for name in after if name.endswith(".scales")]
    assert len(shared) == 12
    assert not any(torch.equal(after[name], before[name]) for name in shared)
    fixed = [name for name in after if name.endswith((".values", ".support"))]
    assert all(torch.equal(after[name], before[name]) for name in fixed)
    assert not nn.weights(model)[LAYER].dense()[zeros].any()
    values = nn.weights(model)[LAYER].dense()[~zeros]
    assert len(values.unique()) <= 8


def test_what_follows_does_not_round_again():
    plan = plan_of(toys.bert_classifier())
    for first in (sc.MagnitudePrune(), sc.DenseSparse(), sc.LowRank()):
        assert legal((first, sc.ClusterWeights(), sc.Distill(), sc.EntropyCode()), plan)
    for second in (sc.ClusterWeights(), sc.LowBitWeights(), sc.GPTQ(), sc.DenseSparse(), sc.MagnitudePrune()):
        assert not legal((sc.ClusterWeights(), second), plan)


def test_weights_that_are_no_numbers_are_refused(tokenizer, tmp_path):
    model = toys.bert_classifier()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = torch.nan
    with pytest.raises(BadWeights, match=LAYER):
        manager(tmp_path / "out", tokenizer).run(model, sc.ClusterWeights())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 1}, "bits=1"),
        ({"bits": 9}, "bits=9"),
        ({"bits": 2.5}, "bits=2.5"),
        ({"codebook": "rows"}, "codebook='rows'"),
        ({"bits": 6, "codebook": "row"}, "bits=6 does not go with codebook='row'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(SettingError, match=said):
        sc.ClusterWeights(**settings)
