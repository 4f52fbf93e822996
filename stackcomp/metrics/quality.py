"""Scores of a model on a task, each with its noise: what the same measure would vary by on other examples.

An outcome is what one example contributes: (prediction, truth) for classes, numbers and similarities,
(sum of negative log likelihoods, tokens predicted) for a window of language modelling, and (points in [0, 1],
checksum of context and right answers) for a question, over all windows of its context. A metric is a function
of the (examples x 2) table of outcomes, so resampling its rows gives the bootstrap of any of them.

Beside the outcomes stand the outputs, by which two models differ long before their scores do: logits less their mean over the classes,
numbers, similarities, and negative log likelihoods of a token, meaned over a window. Answers to questions have none.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from stackcomp.core.context import Progress, quiet
from stackcomp.core.errors import BadWeights, DataError
from stackcomp.data.batches import IGNORED_LABEL, Collator, inference_batches, lengths_of, mean_over_tokens
from stackcomp.data.question_answering import NOWHERE, position_logits
from stackcomp.metrics import answers
from stackcomp.nn import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stackcomp.data.question_answering import Question, Windows
    from stackcomp.data.task import Task

Array = np.ndarray[Any, np.dtype[Any]]
RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """A value on the 0-100 scale (perplexity as it is), with a 95% bootstrap interval over the n examples.

    outcomes: (n x 2), see the module; in the order of the data, so that two scores of one task can be paired.
    statistic: the function of its two columns that value is. outputs: (n x k), see the module, or None.
    """

    value: float
    metric: str
    higher_is_better: bool
    n: int
    interval: tuple[float, float]
    outcomes: Array
    statistic: Callable[..., Array]
    outputs: Array | None = None

    @property
    def noise(self) -> float:
        """Half the interval's width: differences smaller than this say little."""
        return (self.interval[1] - self.interval[0]) / 2

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.2f} +- {self.noise:.2f} (n={self.n})"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """value = score of b minus score of a on the same examples, with its 95% paired bootstrap interval."""

    value: float
    interval: tuple[float, float]

    @property
    def noise(self) -> float:
        """Half the interval's width."""
        return (self.interval[1] - self.interval[0]) / 2


def accuracy(first: Array, second: Array, axis: int = -1) -> Array:
    """Percentage of predictions that are right."""
    return 100 * np.mean(first == second, axis=axis)


def f1(first: Array, second: Array, axis: int = -1) -> Array:
    """F1 of class 1 in percent: 2 TP / (2 TP + FP + FN), 0 where there is none of either."""
    hits = np.sum((first == 1) & (second == 1), axis=axis)
    named = np.sum(first == 1, axis=axis) + np.sum(second == 1, axis=axis)
    return 100 * np.divide(2 * hits, named, out=np.zeros(np.shape(hits)), where=named > 0)


def matthews(first: Array, second: Array, axis: int = -1) -> Array:
    """Matthews correlation of two classes, times 100."""
    return pearson((first == 1).astype(float), (second == 1).astype(float), axis)


def pearson(first: Array, second: Array, axis: int = -1) -> Array:
    """Linear correlation, times 100; 0 where either side is constant."""
    x = first - np.mean(first, axis=axis, keepdims=True)
    y = second - np.mean(second, axis=axis, keepdims=True)
    scale = np.sqrt(np.sum(x * x, axis=axis) * np.sum(y * y, axis=axis))
    return 100 * np.divide(np.sum(x * y, axis=axis), scale, out=np.zeros(np.shape(scale)), where=scale > 0)


def spearman(first: Array, second: Array, axis: int = -1) -> Array:
    """Rank correlation (ties share their mean rank), times 100."""
    return pearson(stats.rankdata(first, axis=axis), stats.rankdata(second, axis=axis), axis)


def perplexity(first: Array, second: Array, axis: int = -1) -> Array:
    """exp(mean negative log likelihood of a token)."""
    return np.exp(np.sum(first, axis=axis) / np.sum(second, axis=axis))


def points(first: Array, second: Array, axis: int = -1) -> Array:
    """Mean of what each question earned, times 100."""
    return 100 * np.mean(first, axis=axis)


METRICS: Mapping[str, Callable[..., Array]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "perplexity": perplexity,
}
ANSWER_METRICS: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    "f1": answers.f1,
    "exact_match": answers.exact_match,
}


def statistic_of(task: "Task") -> Callable[..., Array]:
    """What makes a score of the outcomes of a task: questions come with the points that each earned, by whichever metric."""
    return points if task.kind == "question_answering" else METRICS[task.metric]


def score_of(
    outcomes: Array,
    metric: str,
    statistic: Callable[..., Array] | None = None,
    outputs: Array | None = None,
) -> Score:
    """The score of a table of outcomes, with its bootstrap interval (percentiles of 1,000 resamples, seed 0). statistic: of `METRICS` by
    name, unless given."""
    if len(outcomes) == 0:
        raise DataError(f"{metric}: there are no examples to score")
    statistic = statistic or METRICS[metric]
    first, second = outcomes.T
    value = float(statistic(first, second))
    return Score(
        value=value,
        metric=metric,
        higher_is_better=metric != "perplexity",
        n=len(outcomes),
        interval=_interval(statistic, (first, second), value),
        outcomes=outcomes,
        statistic=statistic,
        outputs=outputs,
    )


def output_error(dense: Score, found: Score) -> float | None:
    """||Y - Y'||^2 / ||Y - mean Y||^2 of the outputs Y of `dense` and Y' of `found` on the same examples: the share of what the one tells
    examples apart by that the other misses. None where there are no outputs, or those of `dense` are all alike."""
    ours, theirs = found.outputs, dense.outputs
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return None
    spread = float(np.square(theirs - theirs.mean(0)).sum())
    return float(np.square(ours - theirs).sum()) / spread if spread > 0 else None


def paired_difference(a: Score, b: Score) -> Difference:
    """Score of b minus score of a, resampling examples, both outcomes of one together.

    Much tighter than two separate intervals, as most examples are answered alike. Raises `DataError` where
    the two scores are not of one metric on one set of examples.
    """
    same = a.metric == b.metric and a.n == b.n
    if not same or (a.metric != "perplexity" and not np.array_equal(a.outcomes[:, 1], b.outcomes[:, 1])):
        raise DataError(
            f"scores of {a.metric} on {a.n} and {b.metric} on {b.n} examples cannot be paired: "
            "evaluate both models on the same split with the same limit"
        )
    metric = a.statistic

    def difference(a1: Array, a2: Array, b1: Array, b2: Array, axis: int = -1) -> Array:
        return metric(b1, b2, axis=axis) - metric(a1, a2, axis=axis)

    value = b.value - a.value
    return Difference(value=value, interval=_interval(difference, (*a.outcomes.T, *b.outcomes.T), value))


def _interval(
    statistic: Callable[..., Array], samples: tuple[Array, ...], value: float
) -> tuple[float, float]:
    size = len(samples[0])
    if size < 2:  # nothing is known of the noise: say so by an interval as wide as the figure can be
        return (value - 100.0, value + 100.0)
    found = stats.bootstrap(
        samples,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 2_000_000 // size),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return (float(found.confidence_interval.low), float(found.confidence_interval.high))


def evaluate(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    task: "Task",
    *,
    split: str = "test",
    limit: int | None = None,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    progress: Progress = quiet,
) -> Score:
    """Score `model` on a split of `task` ("selection" to choose by, "test" once).

    limit: a fixed random subset of so many examples. device: where the model is, unless said; it is moved
    there and left there. The model runs in eval mode and gets its modes back. Raises `DataError` for data
    that cannot be scored and `BadWeights` for outputs that are not finite.
    """
    if task.kind == "similarity" and len(task.text) != 2:
        raise DataError(
            f"task {task.name!r}: similarity is scored on two text columns, and text={task.text!r}"
        )
    if device is not None:
        model.to(device)
    asks = task.kind == "question_answering"
    windows, questions = task.questions(tokenizer, split, limit) if asks else (None, [])
    columns = windows.columns if windows else task.encode(tokenizer, split, limit)[:]
    batches = _batches(
        model, tokenizer, columns, batch_size=batch_size, label=f"evaluating {task.name}", progress=progress
    )
    with evaluating(model), torch.inference_mode():
        if windows:
            outcomes, outputs = _answered(model, task, windows, questions, batches), None
        else:
            outcomes, outputs = _told(model, task.kind, len(columns["input_ids"]), batches)
    if not np.isfinite(outcomes).all():
        bad = int(np.flatnonzero(~np.isfinite(outcomes).all(axis=1))[0])
        raise BadWeights(
            f"the model's output for row {bad} of {task.name!r} ({split}) is not finite: look for NaN or "
            "infinite weights"
        )
    return score_of(outcomes, task.metric, statistic_of(task), outputs)


def embed(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Sentence embeddings (texts x width): the mean of the last hidden states over real tokens, in
    float32."""
    return mean_over_tokens(model(**batch).last_hidden_state, batch["attention_mask"])


def _batches(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    columns: Mapping[str, Any],
    *,
    batch_size: int,
    label: str,
    progress: Progress,
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Row numbers and their batch, on the model's device."""
    order = inference_batches(lengths_of(columns), batch_size=batch_size)
    collate = Collator(tokenizer, model)
    where = next(model.parameters()).device
    for indices in progress(order, label=label, total=len(order)):
        batch = collate([{key: part[i] for key, part in columns.items()} for i in indices])
        yield indices, {key: part.to(where) for key, part in batch.items()}


def _answered(
    model: nn.Module,
    task: "Task",
    windows: "Windows",
    questions: "Sequence[Question]",
    batches: Iterator[tuple[list[int], dict[str, Tensor]]],
) -> Array:
    """Outcomes of questions (questions x 2): the answer is the best span of all windows of a context, or none,
    where a question may have none and pointing at the first token of each window scores higher."""
    best = [(-math.inf, "")] * len(questions)
    null = np.full(len(questions), math.inf)
    for indices, batch in batches:
        logits = position_logits(model(**batch), batch["attention_mask"])
        inside = [torch.from_numpy(windows.offsets[i][:, 0] >= 0) for i in indices]
        allowed = nn.utils.rnn.pad_sequence(inside, batch_first=True).to(logits.device)
        spans = answers.best_spans(logits, allowed, task.max_answer_length)
        none = logits[:, :, NOWHERE].sum(1).tolist()
        for i, nothing, score, first, last in zip(
            indices, none, *(part.tolist() for part in spans), strict=True
        ):
            number, offsets = windows.question[i], windows.offsets[i]
            null[number] = min(null[number], nothing)
            if score > best[number][0] or math.isnan(score):  # NaN stays, and is refused with the others
                best[number] = (score, questions[number].context[offsets[first, 0] : offsets[last, 1]])
    outcomes = np.zeros((len(questions), 2))
    for number, (question, (score, answer)) in enumerate(zip(questions, best, strict=True)):
        given = "" if task.unanswerable and null[number] > score else answer
        earned = ANSWER_METRICS[task.metric](given, question.answers) if math.isfinite(score) else math.nan
        outcomes[number] = earned, zlib.crc32(repr(question).encode())
    return outcomes


def _told(
    model: nn.Module, kind: str, count: int, batches: Iterator[tuple[list[int], dict[str, Tensor]]]
) -> tuple[Array, Array | None]:
    """Outcomes (count x 2) and outputs (count x k) of all tasks but questions."""
    outcomes, outputs = np.zeros((count, 2)), None
    for indices, batch in batches:
        outcomes[indices], told = _outcomes(model, batch, kind)
        outputs = np.zeros((count, told.shape[1])) if outputs is None else outputs
        outputs[indices] = told
    return outcomes, outputs


def _outcomes(model: nn.Module, batch: dict[str, Tensor], kind: str) -> tuple[Array, Array]:
    """Outcomes and outputs of one batch."""
    labels = batch.pop("labels")
    outputs = None
    if kind == "similarity":
        first, second = embed(model, batch).chunk(2)
        found = functional.cosine_similarity(first, second)
    elif kind == "language_modelling":
        logits = model(**batch).logits[:, :-1].float()
        wanted = labels[:, 1:]
        found = functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
        )
        found, labels = found.view(wanted.shape).sum(1), (wanted != IGNORED_LABEL).sum(1)
        outputs = found / labels.clamp_min(1)
    else:
        logits = model(**batch).logits.float()
        found = logits.argmax(-1) if kind == "classification" else logits.squeeze(-1)
        if kind == "classification":  # argmax of NaN is a class like any other
            found = found.float().masked_fill(~logits.isfinite().all(-1), math.nan)
            outputs = logits - logits.mean(-1, keepdim=True)
    told = (found if outputs is None else outputs).view(len(found), -1)
    return torch.stack([found.double(), labels.double()], dim=1).cpu().numpy(), told.double().cpu().numpy()
