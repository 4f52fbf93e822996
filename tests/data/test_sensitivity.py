"""On what the outputs of a model depend."""

import pytest
import torch
import transformers

from stackcomp.core.errors import UnsupportedModel
from stackcomp.data import Calibration, gradient_moments
from stackcomp.data.question_answering import position_logits
from tests import toys


def test_gradients_of_answers_have_the_moment_of_draws_from_the_prediction() -> None:
    """Of log p(y) with respect to the logit of token t: 1 where y = t, less p_t; its square sums to 1 - sum of p_t^2 on average."""
    model, tokenizer = toys.make("bert", "AutoModelForQuestionAnswering"), toys.tokenizer()
    texts = ["the film is good", "the very bad plot was very bad and the scene was sad"] * 300
    calibration = Calibration(
        texts, tokenizer, batch_size=len(texts)
    )  # one batch, so that half of it is padded
    (found,) = gradient_moments(calibration, model, {"qa_outputs": model.qa_outputs}, seed=0).values()
    (batch,) = calibration.batches(model)
    with torch.no_grad():
        chance = position_logits(model(**batch), batch["attention_mask"]).softmax(-1)
    wanted = (1 - chance.pow(2).sum(-1)).sum(0) / calibration.tokens
    assert found is not None
    assert found.diagonal().tolist() == pytest.approx(wanted.tolist(), rel=0.1)


def test_texts_of_which_a_classifier_is_sure_count_too() -> None:
    """Of log p(y), p softened to temperature 4, with respect to the logits: p (1 - p) / 16 for either of two classes."""
    model, tokenizer = toys.bert_classifier(), toys.tokenizer()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([5.0, -5.0]))
    calibration = Calibration(["the film is good"] * 4000, tokenizer, batch_size=1000)
    (found,) = gradient_moments(calibration, model, {"classes": model.classifier}, seed=0).values()
    assert found is not None
    chance = torch.tensor([10.0, 0.0]).div(4).softmax(0)
    assert found.diagonal().tolist() == pytest.approx([float(chance.prod()) / 16] * 2, rel=0.2)


def test_the_moments_of_all_modules_that_use_a_weight_are_added() -> None:
    model, tokenizer = toys.bert_classifier(), toys.tokenizer()
    calibration = Calibration(toys.SENTENCES, tokenizer, batch_size=2)
    first, second = (layer.intermediate.dense for layer in model.bert.encoder.layer)
    alone = gradient_moments(calibration, model, {"first": first, "second": second}, seed=0)
    (found,) = gradient_moments(calibration, model, {"both": (first, second, first)}, seed=0).values()
    assert found is not None
    torch.testing.assert_close(found, alone["first"] + alone["second"])


SEQUENCES = {"vocab_size": toys.VOCABULARY, "d_model": 16, "pad_token_id": 0}


def translator() -> transformers.PreTrainedModel:
    sizes = {f"{side}_{size}": 2 for side in ("encoder", "decoder") for size in ("layers", "attention_heads")}
    config = transformers.BartConfig(
        **SEQUENCES, **sizes, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32
    )
    return transformers.BartForSequenceClassification(config).eval()


def test_an_encoder_that_looks_words_up_itself_is_reached() -> None:
    config = transformers.T5Config(**SEQUENCES, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = transformers.T5EncoderModel(config)
    calibration = Calibration(toys.SENTENCES, toys.tokenizer())
    found = gradient_moments(
        calibration, model, {"out": model.encoder.block[0].layer[1].DenseReluDense.wo}, seed=0
    )
    assert found["out"] is not None
    model, calibration = translator(), Calibration(["the film"], toys.tokenizer())
    found = gradient_moments(calibration, model, {"out": model.model.encoder.layers[0].fc2}, seed=0)
    assert found["out"] is not None


def test_a_model_whose_words_are_not_reached_is_refused(monkeypatch) -> None:
    model = toys.bert_classifier()
    monkeypatch.setattr(model, "get_input_embeddings", lambda: torch.nn.Embedding(2, 2))
    with pytest.raises(UnsupportedModel, match="sensitivity=False"):
        gradient_moments(
            Calibration(["the film"], toys.tokenizer()), model, {"out": model.classifier}, seed=0
        )
