"""`NF4`: its reach, the bytes of its files, and reloading."""

import pytest
import torch

import stackcomp as sc
from stackcomp import checkpoint, nn
from stackcomp.core.contract import legal
from stackcomp.core.errors import SettingError
from stackcomp.manager import plan_of
from stackcomp.metrics.cost import bytes_of_file
from stackcomp.ops import round_groups
from tests import toys
from tests.passes.coded import BLOCKS, FIRST, WORDS, coded
from tests.passes.test_conformance import apply

LAYER = "encoder.layer.0.output.dense"


@pytest.mark.parametrize("first", FIRST, ids=str)
def test_the_file_has_half_a_byte_a_value_and_reloads_exactly(first, tokenizer, tmp_path):
    model, before = coded(first, sc.NF4(group=8, only=(BLOCKS, WORDS)), tokenizer, tmp_path)
    batch = toys.batch(tokenizer)
    with torch.no_grad():
        logits = model(**batch).logits  # with bitsandbytes a product before it is saved spoils the layer
    checkpoint.save(model, tmp_path / "saved", tokenizer=tokenizer)
    sizes = bytes_of_file(tmp_path / "saved" / "model.safetensors")
    for id_, handle in nn.weights(model).items():
        for part, words in handle.spec.parts().items():
            assert ("nf4" in words) == (id_.startswith("encoder") or id_ == "embeddings.word_embeddings")
            if "nf4" in words:
                lines, length = handle.spec.matrices[part].lines
                name = f"{nn.absolute(model, id_)}.{part}"
                assert sizes[f"{name}.values"] == -(-lines * length // 2)
                assert sizes[f"{name}.scales"] == 2 * lines * -(-length // 8)
        assert (handle.dense() - before[id_]).norm() < 0.25 * before[id_].norm()
        assert ((handle.dense() != 0) <= (before[id_] != 0)).all()
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "saved")(**batch).logits, logits)


def test_values_are_those_of_the_rounding(tokenizer, tmp_path):
    model = toys.bert_classifier()
    before = nn.weights(model)[LAYER].dense().clone()
    apply(sc.NF4(group=16, only=LAYER), model, tokenizer, tmp_path)
    assert torch.equal(nn.weights(model)[LAYER].dense(), round_groups(before, "nf4", 16))


def test_what_follows_trains_scales_and_does_not_round_again():
    plan = plan_of(toys.bert_classifier())
    assert legal((sc.NF4(), sc.Distill()), plan)
    for second in (sc.NF4(), sc.LowBitWeights(), sc.GPTQ(), sc.DenseSparse()):
        assert not legal((sc.NF4(), second), plan)


@pytest.mark.parametrize("group", [0, 2.5])
def test_settings_out_of_range_are_refused(group):
    with pytest.raises(SettingError, match="group"):
        sc.NF4(group=group)
