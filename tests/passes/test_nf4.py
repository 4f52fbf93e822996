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


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes
def test_a_product_before_saving_spoils_what_bitsandbytes_stores_and_not_what_we_do(tokenizer, tmp_path):
    """Without double quantization its CPU layers save scales in the order that the product put them in."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    functional = bitsandbytes.functional
    weight, x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), torch.ones(4, 128)
    layer = bitsandbytes.nn.Linear4bit(
        128, 64, bias=False, quant_type="nf4", compress_statistics=False, compute_dtype=torch.float32
    )
    layer.load_state_dict({"weight": weight})
    layer = layer.to("cpu").eval()

    def stored():
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        scales = {name.removeprefix("weight."): part for name, part in state.items() if name != "weight"}
        read = bitsandbytes.nn.Params4bit.from_prequantized(state["weight"], scales, device="cpu")
        return functional.dequantize_4bit(read.data, read.quant_state)

    def nearness(found):
        return torch.cosine_similarity(found.flatten(), weight.flatten(), dim=0)

    ours = round_groups(weight, "nf4", 64, scale_dtype=torch.float32)
    torch.testing.assert_close(stored(), ours, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        layer(x)
    if functional.has_avx512bf16():  # only there are weights packed anew for a product
        assert nearness(stored()) < 0.98 < nearness(ours)
    model = toys.bert_classifier()
    apply(sc.NF4(group=16), model, tokenizer, tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model(**toys.batch(tokenizer))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_follows_trains_scales_and_does_not_round_again():
    plan = plan_of(toys.bert_classifier())
    assert legal((sc.NF4(), sc.Distill()), plan)
    for second in (sc.NF4(), sc.LowBitWeights(), sc.GPTQ(), sc.DenseSparse()):
        assert not legal((sc.NF4(), second), plan)


@pytest.mark.parametrize("group", [0, 2.5])
def test_settings_out_of_range_are_refused(group):
    with pytest.raises(SettingError, match="group"):
        sc.NF4(group=group)
