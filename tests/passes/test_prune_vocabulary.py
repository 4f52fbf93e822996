"""`PruneVocabulary`: the same logits for the texts it was made for, from an ordinary model with its own tokenizer."""

import copy
import json

import pytest
import torch
import transformers

import stackcomp as sc
from stackcomp import checkpoint, nn
from stackcomp.core import headers
from stackcomp.core.errors import MissingNeed, PipelineRefused, SettingError, UnsupportedModel
from stackcomp.manager import plan_of
from tests import toys
from tests.passes.test_conformance import apply, manager

WORDS = {"gpt2": "wte", "llama": "embed_tokens"}
TEXTS = ["the film is good", "the plot is bad"]
KEPT = len(toys.SPECIAL) + 6 + 1  # the words of TEXTS, and one that is a letter


def words_of(family):
    return WORDS.get(family, "embeddings.word_embeddings")


def logits(model, tokenizer, texts=TEXTS):
    with torch.no_grad():
        return model(**tokenizer(list(texts), padding=True, return_tensors="pt")).logits


def pruned(model, tokenizer, tmp_path, before=None, calibration=TEXTS):
    """The model behind `before` and without the words that TEXTS do not use; the other step's model and tokenizer beside it."""
    pipeline = sc.Pipeline(*([before] if before else []), sc.PruneVocabulary())
    result = manager(tmp_path / "out", tokenizer, task=None, calibration=list(calibration)).run(
        model, pipeline
    )
    steps = sorted((tmp_path / "out" / "steps").iterdir())
    return result, checkpoint.load(steps[-2])


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_texts_of_the_corpus_have_the_same_logits(family, tokenizer, tmp_path):
    model = toys.classifier(family)
    whole = logits(model, tokenizer)
    result, _ = pruned(model, tokenizer, tmp_path)
    assert torch.equal(logits(result.model, result.tokenizer), whole)
    assert result.ledger.rows[-1].findings == {"kept": KEPT, "of": toys.VOCABULARY}
    assert result.model.config.vocab_size == len(result.tokenizer) == KEPT
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(plain, again), whole)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert {weight.id: weight for weight in headers.plan_of(tmp_path / "out").weights} == {
        weight.id: weight for weight in plan_of(plain).weights
    }


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_an_output_head_loses_the_same_words(family, tokenizer, tmp_path):
    model = toys.language_model(family)
    whole = logits(model, tokenizer)
    result, _ = pruned(model, tokenizer, tmp_path)
    kept = [
        tokenizer.convert_tokens_to_ids(piece)
        for piece in result.tokenizer.convert_ids_to_tokens(range(KEPT))
    ]
    # the product has other shapes, for which libraries may sum in another order
    torch.testing.assert_close(logits(result.model, result.tokenizer), whole[..., kept], atol=1e-6, rtol=1e-6)
    (words,) = [
        handle for handle in nn.weights(result.model).values() if words_of(family) in handle.spec.paths
    ]
    assert len(words.spec.paths) == 2
    assert not any(len(part) == toys.VOCABULARY for part in result.model.state_dict().values())


def test_a_head_of_its_own_loses_them_too(tokenizer, tmp_path):
    model = toys.language_model("llama")
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    torch.manual_seed(1)
    model = type(model)(config).eval()
    assert sc.PruneVocabulary().selected(plan_of(model)) == ("embed_tokens", "lm_head")
    whole = logits(model, tokenizer)
    result, _ = pruned(model, tokenizer, tmp_path)
    kept = tokenizer.convert_tokens_to_ids(result.tokenizer.convert_ids_to_tokens(range(KEPT)))
    torch.testing.assert_close(logits(result.model, result.tokenizer), whole[..., kept], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "before",
    [
        sc.Int8Weights(only="*word_embeddings"),
        sc.Int8Dynamic(only="*word_embeddings"),
        *(sc.LowBitWeights(bits=bits, group=5, only="*word_embeddings") for bits in (4, 3, 2, 1.6, 1)),
        *(sc.ClusterWeights(bits=3, codebook=whose, only="*word_embeddings") for whose in ("matrix", "row")),
        sc.LowRank(ratio=1.3, data_aware=False, only="*word_embeddings"),
    ],
)
def test_rows_that_are_rounded_or_factored_are_taken_as_they_are(before, tokenizer, tmp_path):
    result, step = pruned(toys.bert_classifier(), tokenizer, tmp_path, before=before)
    assert torch.equal(logits(result.model, result.tokenizer), logits(step, tokenizer))
    old, new = (nn.weights(model)["embeddings.word_embeddings"] for model in (step, result.model))
    kept = tokenizer.convert_tokens_to_ids(result.tokenizer.convert_ids_to_tokens(range(KEPT)))
    assert torch.equal(new.dense(), old.dense()[kept])
    assert new.spec.parts() == old.spec.parts()
    assert new.spec.total_bytes < old.spec.total_bytes
    assert torch.equal(logits(checkpoint.load(tmp_path / "out"), result.tokenizer), logits(step, tokenizer))


def test_both_factors_may_be_rounded(tokenizer, tmp_path):
    factors = sc.Pipeline(
        sc.LowRank(ratio=1.3, data_aware=False, only="*word_embeddings"),
        sc.LowBitWeights(group=3, only="*word_embeddings"),
    )
    result, step = pruned(toys.bert_classifier(), tokenizer, tmp_path, before=factors)
    assert torch.equal(logits(result.model, result.tokenizer), logits(step, tokenizer))


def test_sparse_embeddings_are_refused_before_any_compute():
    pipeline = sc.Pipeline(sc.MagnitudePrune(only="*word_embeddings"), sc.PruneVocabulary())
    with pytest.raises(PipelineRefused, match="requires 'dense'"):
        sc.check(pipeline, toys.bert_classifier())


def test_a_teacher_reads_what_the_student_reads(tokenizer, tmp_path):
    model = toys.bert_classifier()
    pipeline = sc.Pipeline(sc.PruneVocabulary(), sc.Distill(steps=1, batch_size=48, learning_rate=1e-9))
    rows = manager(tmp_path / "out", tokenizer).run(model, pipeline).ledger.rows
    assert rows[-1].findings["final_loss"] == pytest.approx(0, abs=1e-6)  # they still say the same


def test_the_tokenizer_that_was_given_is_untouched(tokenizer, tmp_path):
    before = tokenizer.get_vocab()
    result, _ = pruned(toys.bert_classifier(), tokenizer, tmp_path)
    assert tokenizer.get_vocab() == before
    assert result.tokenizer.get_vocab() != before


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(tokenizer, tmp_path):
    tokenizer.add_tokens(["brandnew"])
    with pytest.raises(UnsupportedModel, match=r"24 word pieces, .*word_embeddings has 23 rows"):
        pruned(toys.make("bert"), tokenizer, tmp_path)


def test_rare_pieces_go(tokenizer, tmp_path):
    model = toys.bert_classifier()
    apply(sc.PruneVocabulary(least=25), model, tokenizer, tmp_path)
    assert {*tokenizer.get_vocab()} == {*toys.SPECIAL, "a", "the", "is", "and"}
    assert nn.weights(model)["embeddings.word_embeddings"].spec.rows == len(tokenizer)


def test_what_the_config_calls_by_id_is_called_by_the_new_one(tokenizer, tmp_path):
    model = toys.gpt2_lm()
    model.config.eos_token_id = [tokenizer.convert_tokens_to_ids("plot"), 3]
    model.generation_config.bos_token_id = tokenizer.convert_tokens_to_ids("bad")
    result, _ = pruned(model, tokenizer, tmp_path)
    assert result.model.config.eos_token_id == [result.tokenizer.convert_tokens_to_ids("plot"), 3]
    assert result.model.generation_config.bos_token_id == result.tokenizer.convert_tokens_to_ids("bad")
    assert result.model.generation_config.pad_token_id == toys.PAD


def test_perplexities_over_other_tokens_are_not_compared(tokenizer, tmp_path):
    rows = (
        manager(tmp_path / "out", tokenizer, task=toys.language_task())
        .run(toys.gpt2_lm(), sc.PruneVocabulary(least=9))
        .ledger.rows
    )
    assert rows[0].measured.difference == 0
    assert rows[1].measured.score is not None
    assert rows[1].measured.difference is None


def test_positions_counted_from_the_padding_are_guarded(tmp_path):
    model = toys.make("roberta")
    assert model.embeddings.position_embeddings.padding_idx == 0
    with pytest.raises(
        UnsupportedModel, match="position_embeddings: positions are counted from the id of the padding, 0"
    ):
        nn.keep_words(model, [2, 0, 1])


def test_a_resumed_run_and_one_that_goes_on_use_the_tokenizer_of_the_files(tokenizer, tmp_path):
    model = toys.bert_classifier()
    first = manager(tmp_path / "out", tokenizer).run(model, sc.PruneVocabulary())
    longer = sc.Pipeline(sc.PruneVocabulary(), sc.FineTune(steps=2, batch_size=4))
    again = manager(tmp_path / "out", tokenizer).run(model, longer, resume=True)
    assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    whole = manager(tmp_path / "whole", tokenizer).run(model, longer)
    assert nn.weights_digest(again.model) == nn.weights_digest(whole.model)


@pytest.mark.parametrize(
    "settings", [{"least": 0}, {"least": 1.5}, {"only": "*word_embeddings"}, {"skip": "pooler"}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        sc.PruneVocabulary(**settings)


def test_it_needs_text_and_a_tokenizer(tmp_path):
    with pytest.raises(MissingNeed, match=r"PassManager\(task=\.\.\.\) or PassManager\(calibration"):
        sc.PassManager(out=tmp_path / "out", tokenizer=toys.tokenizer()).run(
            toys.bert_classifier(), sc.PruneVocabulary()
        )
    with pytest.raises(MissingNeed, match="tokenizer"):
        sc.PassManager(out=tmp_path / "out", calibration=TEXTS).run(
            toys.bert_classifier(), sc.PruneVocabulary()
        )
