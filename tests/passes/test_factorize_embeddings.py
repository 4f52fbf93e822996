"""`FactorizeEmbeddings` against its formula, with tied heads, rounding and another vocabulary."""

import pytest
import torch

import stackcomp as sc
from stackcomp import checkpoint, nn
from stackcomp.core.errors import MissingNeed, SettingError, UnreachableRatio
from stackcomp.core.families import vocabulary
from stackcomp.manager import plan_of
from stackcomp.metrics.cost import bytes_of_file
from tests import toys
from tests.passes.test_conformance import apply, manager

RATIO = 1.3
RANK = int(toys.VOCABULARY * 16 / (RATIO * (toys.VOCABULARY + 16)))


def words_of(model):
    """The weight of the word embedding."""
    name, *_ = vocabulary(path for weight in plan_of(model).weights for path in weight.paths)
    return next(handle for handle in nn.weights(model).values() if name in handle.spec.paths)


def logits(model, tokenizer):
    with torch.no_grad():
        return model(**toys.batch(tokenizer)).logits


def frequency(tokenizer, task):
    """How often each word stands in the training text, and once more."""
    found = torch.ones(toys.VOCABULARY)
    for text in task.texts("train", 10**6):
        for place in tokenizer(text)["input_ids"]:
            found[place] += 1
    return found


@pytest.mark.parametrize("power", [0.0, 0.4, 1.0])
def test_factors_are_those_of_the_formula(power, model, tokenizer, tmp_path):
    table = words_of(model).dense().clone()
    findings = apply(sc.FactorizeEmbeddings(ratio=RATIO, power=power), model, tokenizer, tmp_path)
    assert findings == {"layers": {"embeddings.word_embeddings": f"rank {RANK}"}}
    root = (frequency(tokenizer, toys.classification_task()) ** (power / 2))[:, None]
    u, s, v = torch.linalg.svd(root * table, full_matrices=False)
    expected = u[:, :RANK] * s[:RANK] @ v[:RANK] / root
    torch.testing.assert_close(words_of(model).dense(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_a_tied_head_reads_the_same_factors_which_are_stored_once(family, tokenizer, tmp_path):
    model = toys.language_model(family)
    paths = words_of(model).spec.paths
    assert len(paths) == 2
    apply(sc.FactorizeEmbeddings(ratio=RATIO), model, tokenizer, tmp_path, task=toys.language_task())
    handle = words_of(model)
    assert handle.spec.paths == paths
    ids, hidden = torch.tensor([[3, toys.VOCABULARY - 1, 3]]), torch.randn(2, 16)
    torch.testing.assert_close(handle.modules[0](ids), handle.dense()[ids])
    bias = 0 if handle.modules[1].bias is None else handle.modules[1].bias
    torch.testing.assert_close(
        handle.modules[1](hidden), hidden @ handle.dense().T + bias, rtol=1e-4, atol=1e-4
    )
    checkpoint.save(model, tmp_path / "saved")
    sizes = bytes_of_file(tmp_path / "saved" / "model.safetensors")
    stored = [
        size
        for name, size in sizes.items()
        if any(f"{path}." in name for path in paths) and "bias" not in name
    ]
    assert sorted(stored) == [4 * RANK * 16, 4 * RANK * toys.VOCABULARY]
    assert torch.equal(logits(checkpoint.load(tmp_path / "saved"), tokenizer), logits(model, tokenizer))


@pytest.mark.parametrize("vocabulary_first", [False, True])
def test_it_stacks_with_another_vocabulary_and_rounding(vocabulary_first, tokenizer, tmp_path):
    smaller = [sc.FactorizeEmbeddings(ratio=1.2), sc.PruneVocabulary(least=9)]
    pipeline = sc.Pipeline(
        *(reversed(smaller) if vocabulary_first else smaller),
        sc.LowBitWeights(group=3, only="embeddings.word_embeddings"),
        sc.Distill(steps=1, batch_size=8),
    )
    result = manager(tmp_path / "out", tokenizer).run(toys.bert_classifier(), pipeline)
    spec = words_of(result.model).spec
    assert spec.rows == len(result.tokenizer) < toys.VOCABULARY
    assert {matrix.coding for matrix in spec.matrices.values()} == {"int4"}
    whole = checkpoint.load(tmp_path / "out")
    assert torch.equal(logits(whole, result.tokenizer), logits(result.model, result.tokenizer))


def test_a_table_with_more_rows_than_the_tokenizer_has_words(tokenizer, tmp_path):
    model = toys.bert_classifier()
    model.resize_token_embeddings(toys.VOCABULARY + 5)
    apply(sc.FactorizeEmbeddings(ratio=RATIO), model, tokenizer, tmp_path)
    assert words_of(model).spec.factored
    tokenizer.add_tokens(["unheard", "of", "words", "that", "are", "new"])
    model = toys.bert_classifier()
    apply(sc.FactorizeEmbeddings(ratio=RATIO), model, tokenizer, tmp_path)
    assert words_of(model).spec.factored


def test_what_cannot_be_done_is_refused_before_any_compute(tmp_path):
    with pytest.raises(UnreachableRatio, match=r"FactorizeEmbeddings: ratio=20 leaves no rank.*is 9\.44"):
        sc.check(sc.FactorizeEmbeddings(ratio=20.0), toys.bert_classifier())
    with pytest.raises(MissingNeed, match="calibration"):
        sc.PassManager(out=tmp_path / "out", tokenizer=toys.tokenizer()).run(
            toys.bert_classifier(), sc.FactorizeEmbeddings()
        )
    for settings in ({"power": -0.1}, {"power": 1.5}, {"ratio": 0.5}, {"only": "*word_embeddings"}):
        with pytest.raises(SettingError, match=next(iter(settings))):
            sc.FactorizeEmbeddings(**settings)
