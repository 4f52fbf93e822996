"""Answers: points as SQuAD gives them, the best of all spans, and one score a question over its windows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackcomp.core.errors import BadWeights, DataError, UnsupportedModel
from stackcomp.data.question_answering import position_logits
from stackcomp.metrics import answers, evaluate, paired_difference
from tests import toys

QA = "AutoModelForQuestionAnswering"


@pytest.fixture
def tokenizer():
    """The toy tokenizer, not this folder's."""
    return toys.tokenizer()


@pytest.mark.parametrize(
    ("answer", "golds", "exact", "overlap"),
    [
        ("The Film!", ["a film"], 1, 1),
        ("the  good\nfilm", ["good film."], 1, 1),
        ("theatre", ["atre"], 0, 0),  # an article only as a word
        ("good film", ["film"], 0, 2 / 3),
        ("a very good film", ["film, good", "plot"], 0, 0.8),  # 2 of 3 words found, 2 of 2 named
        ("plot", ["film", "the plot"], 1, 1),
        ("very very bad", ["very bad"], 0, 0.8),  # a word counts as often as both have it
        ("U.S.", ["us"], 1, 1),
        ("film", [], 0, 0),
        ("", [], 1, 1),
        ("", ["film"], 0, 0),
        ("the", ["a"], 1, 1),
        ("bad", ["film"], 0, 0),
    ],
)
def test_points(answer: str, golds: list[str], exact: float, overlap: float) -> None:
    assert answers.exact_match(answer, golds) == exact
    assert answers.f1(answer, golds) == pytest.approx(overlap)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), length=st.integers(1, 9), longest=st.integers(1, 12))
def test_best_span_is_the_best_of_all(seed: int, length: int, longest: int) -> None:
    torch.manual_seed(seed)
    logits, allowed = torch.randn(3, 2, length), torch.rand(3, length) < 0.7
    allowed[:, seed % length] = True
    scores, firsts, lasts = (part.tolist() for part in answers.best_spans(logits, allowed, longest))
    for text in range(3):
        spans = {
            (a, b): (logits[text, 0, a] + logits[text, 1, b]).item()
            for a in range(length)
            for b in range(a, min(length, a + longest))
            if allowed[text, a] and allowed[text, b]
        }
        assert (firsts[text], lasts[text]) == max(spans, key=spans.__getitem__)
        assert scores[text] == pytest.approx(max(spans.values()))


def wanted(model, tokenizer, task) -> list[float]:
    """The F1 of each question, by reading each window alone and looking at all spans."""
    windows, questions = task.questions(tokenizer, "test")
    found = [(float("-inf"), "")] * len(questions)
    for i, number in enumerate(windows.question):
        row = {key: torch.tensor([part[i]]) for key, part in windows.columns.items()}
        with torch.no_grad():
            said = model(**row)
        for a, (begin, _) in enumerate(windows.offsets[i]):
            for b, (_, end) in enumerate(windows.offsets[i][: a + task.max_answer_length]):
                if begin >= 0 and end >= 0 and b >= a:
                    score = (said.start_logits[0, a] + said.end_logits[0, b]).item()
                    found[number] = max(found[number], (score, questions[number].context[begin:end]))
    return [answers.f1(text, asked.answers) for (_, text), asked in zip(found, questions, strict=True)]


def test_a_question_is_answered_once_over_all_its_windows(tokenizer) -> None:
    model, task = toys.make("bert", QA), toys.question_task(max_answer_length=3)
    one, many = (evaluate(model, tokenizer, task, batch_size=size) for size in (1, 64))
    assert (one.outcomes == many.outcomes).all()
    assert (one.n, one.metric) == (16, "f1")
    assert len(task.encode(tokenizer, "test")) > 16
    assert one.outcomes[:, 0].tolist() == pytest.approx(wanted(model, tokenizer, task))
    assert 0 < one.value < 100
    assert one.value == pytest.approx(100 * one.outcomes[:, 0].mean())
    assert one.interval[0] < one.value < one.interval[1]
    exact = evaluate(model, tokenizer, toys.question_task(max_answer_length=3, metric="exact_match"))
    assert exact.metric == "exact_match"
    assert exact.value <= one.value
    assert set(exact.outcomes[:, 0]) <= {0.0, 1.0}
    other = evaluate(toys.make("bert", QA, seed=1), tokenizer, task)
    change = paired_difference(one, other)
    assert change.value == pytest.approx(other.value - one.value)
    assert change.interval[0] <= change.value <= change.interval[1]
    with pytest.raises(DataError, match="cannot be paired"):
        paired_difference(one, evaluate(model, tokenizer, task, split="selection"))


class Pointing(torch.nn.Module):
    """Points to the first token by so much, and to the word given by 1 in the windows that hold it."""

    def __init__(self, word: int, nowhere: float) -> None:
        super().__init__()
        self.word, self.nowhere = word, nowhere
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = (input_ids == self.word).float()
        logits[:, 0] = self.nowhere
        return {"start_logits": logits, "end_logits": logits}


@pytest.mark.parametrize(("nowhere", "right"), [(-1.0, "film"), (0.5, "film"), (1.5, None)])
def test_no_answer_is_given_only_where_every_window_prefers_it(
    tokenizer, nowhere: float, right: str | None
) -> None:
    context = "film and the plot was very bad and the actor was sad and the scene was nice"
    some = {"text": ["film"], "answer_start": [0]}
    rows = [
        {"context": context, "question": "a", "answers": given}
        for given in (some, {"text": [], "answer_start": []})
    ]
    task = toys.tasks.question_answering(
        {"train": rows, "test": rows},
        selection="test",
        test="test",
        max_length=10,
        doc_stride=2,
        unanswerable=True,
    )
    word = tokenizer.convert_tokens_to_ids("film")
    assert evaluate(Pointing(word, nowhere), tokenizer, task).outcomes[:, 0].tolist() == [
        right is not None,
        right is None,
    ]


def test_padding_is_no_place_to_point_to(tokenizer) -> None:
    model = toys.make("bert", QA)
    batch = toys.batch(tokenizer)
    with torch.no_grad():
        chances = position_logits(model(**batch), batch["attention_mask"]).softmax(-1)
    assert chances.shape == (4, 2, batch["input_ids"].shape[1])
    assert (chances[~batch["attention_mask"].bool().unsqueeze(1).expand(-1, 2, -1)] == 0).all()


def test_bad_models_are_refused(tokenizer) -> None:
    with pytest.raises(UnsupportedModel, match="AutoModelForQuestionAnswering"):
        evaluate(toys.bert_classifier(), tokenizer, toys.question_task())
    model = toys.make("bert", QA)
    with torch.no_grad():
        model.qa_outputs.bias[0] = torch.nan
    with pytest.raises(BadWeights, match="row 0 of 'toy-questions'"):
        evaluate(model, tokenizer, toys.question_task())
