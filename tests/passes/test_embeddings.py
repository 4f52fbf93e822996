"""Embedding tables under the rounding passes: half of the file of a small encoder. Exact bytes, exact reloading, lookups that read
only what they need, and the output heads tied to them."""

import pytest
import torch

import stackcomp as sc
from stackcomp import checkpoint, nn
from stackcomp.core.families import FAMILIES
from stackcomp.core.matrices import packed_bytes
from stackcomp.metrics.cost import bytes_of_file
from stackcomp.ops import low_bit
from tests import toys
from tests.passes.test_conformance import apply

GROUP = 8


def rounding(bits, only):
    return sc.Int8Weights(only=only) if bits == 8 else sc.LowBitWeights(bits=bits, group=GROUP, only=only)


def table_bytes(rows, cols, bits):
    """What the codes and the scales of a table take."""
    if bits == 8:
        return rows * cols, 4 * rows
    return packed_bytes(rows * cols, bits), 2 * rows * -(-cols // GROUP)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1.6, 1])
@pytest.mark.parametrize("family", toys.FAMILIES)
def test_every_table_is_rounded_stored_exactly_and_reloads(family, bits, tokenizer, tmp_path):
    model = toys.classifier(family)
    only = FAMILIES[family].embeddings
    tables = {id_: handle.dense().clone() for id_, handle in nn.weights(model).items()}
    apply(rounding(bits, only), model, tokenizer, tmp_path)
    checkpoint.save(model, tmp_path / "saved", tokenizer=tokenizer)
    sizes = bytes_of_file(tmp_path / "saved" / "model.safetensors")
    reloaded = type(model).from_pretrained(tmp_path / "saved").eval()
    rounded = {id_: h for id_, h in nn.weights(model).items() if h.spec.kind == "embedding"}
    assert len(rounded) >= len(only)
    for id_, handle in rounded.items():
        name = f"{nn.absolute(model, id_)}.weight"
        codes, scales = table_bytes(handle.spec.rows, handle.spec.cols, bits)
        assert (sizes[f"{name}.values"], sizes[f"{name}.scales"]) == (codes, scales)
        assert handle.spec.total_bytes == codes + scales
        limit = {8: 0.02, 4: 0.2, 3: 0.4, 2: 0.8, 1.6: 0.8, 1: 0.8}[bits]
        error = (handle.dense() - tables[id_]).norm() / tables[id_].norm()
        assert 0 < error < limit
        ids = torch.tensor([[handle.spec.rows - 1, 0], [1, 1]])
        assert torch.equal(handle.modules[0](ids), handle.dense()[ids])
    batch = toys.batch(tokenizer)
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1.6, 1])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_a_tied_head_reads_the_rounded_table_which_is_stored_once(family, bits, tokenizer, tmp_path):
    model = toys.language_model(family)
    words = next(handle for handle in nn.weights(model).values() if len(handle.spec.paths) > 1).spec
    apply(rounding(bits, words.id), model, tokenizer, tmp_path)
    (handle,) = [handle for handle in nn.weights(model).values() if handle.spec.id == words.id]
    assert handle.spec.paths == words.paths
    hidden = torch.randn(3, handle.spec.cols)
    head = handle.modules[1]
    expected = hidden @ handle.dense().T + (0 if head.bias is None else head.bias)
    torch.testing.assert_close(head(hidden), expected, rtol=1e-4, atol=1e-4)
    checkpoint.save(model, tmp_path / "saved")
    sizes = bytes_of_file(tmp_path / "saved" / "model.safetensors")
    stored = [
        size for name, size in sizes.items() if size and any(f"{path}.weight" in name for path in words.paths)
    ]
    assert sorted(stored) == sorted(table_bytes(words.rows, words.cols, bits))
    batch = toys.batch(tokenizer)
    with torch.no_grad():
        reloaded = type(model).from_pretrained(tmp_path / "saved").eval()
        assert torch.equal(reloaded(**batch).logits, model(**batch).logits)
    tied = [handle for handle in nn.weights(reloaded).values() if handle.spec.id == words.id]
    assert tied[0].spec.paths == words.paths


def test_a_tied_head_whose_inputs_are_rounded_reloads(tokenizer, tmp_path):
    model = toys.gpt2_lm()
    apply(sc.Int8Dynamic(only="wte"), model, tokenizer, tmp_path)
    checkpoint.save(model, tmp_path / "saved")
    batch = toys.batch(tokenizer)
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "saved")(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("bits", [4, 3, 2, 1.6, 1])
def test_a_lookup_unpacks_the_rows_it_reads_and_no_others(bits, tokenizer, tmp_path, monkeypatch):
    model = toys.bert_classifier()
    apply(rounding(bits, "embeddings.word_embeddings"), model, tokenizer, tmp_path)
    table = model.get_submodule("bert.embeddings.word_embeddings")
    wanted = table.weight.dense()[[3, 3, 7]]
    taken = []
    take = low_bit.take

    def counted(packed, coding, places):
        taken.append(places.numel())
        return take(packed, coding, places)

    def unpacked(*_):
        raise AssertionError("the whole table was unpacked")

    monkeypatch.setattr(low_bit, "take", counted)
    monkeypatch.setattr(low_bit, "unpack", unpacked)
    assert torch.equal(table(torch.tensor([3, 3, 7])), wanted)
    assert taken == [3 * 16]
