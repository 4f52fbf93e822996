"""Questions on texts that hold their answers, as tokens: windows of the context, and where an answer is in each.

A context that is too long for the model is cut into windows that overlap, each behind the whole question. A window is a row like any
other to training and calibration; only the score puts the windows of one question together again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stackcomp.core.errors import DataError, MissingNeed, UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

Array = np.ndarray[Any, np.dtype[Any]]
Span = tuple[int, int]

NOWHERE = 0  # the token, CLS in encoders, that a model points to where a window does not hold the answer
NEVER = -1e30  # the logit of a place that cannot be meant: no chance after softmax, and still finite
CHUNK = 1000  # questions tokenized together: positions of characters are kept packed from then on


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """Windows in the order of their questions.

    columns: what the model reads, by name. question: number of the question of each window, from 0. offsets: for each window
    (tokens x 2), the characters of the context from first to behind the last of each token, -1 outside the context.
    """

    columns: dict[str, list[list[int]]]
    question: list[int]
    offsets: list[Array]

    def positions(self, answers: Sequence[Span | None]) -> list[list[int]]:
        """First and last token of each question's answer in each window; `NOWHERE` twice where the window does not hold all of it.

        answers: characters of the context from first to behind the last, or None where there is no answer.
        """
        return [
            _position(offsets, answers[number])
            for number, offsets in zip(self.question, self.offsets, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Question:
    """The text that a question is asked on, and every answer that is right; none where it cannot be answered."""

    context: str
    answers: tuple[str, ...]


def cut(
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[str],
    contexts: Sequence[str],
    *,
    name: str,
    max_length: int,
    doc_stride: int,
) -> Windows:
    """Windows of at most max_length tokens, neighbours sharing doc_stride tokens of the context.

    Raises `MissingNeed` for a tokenizer that does not tell positions, and `DataError` naming the row (of task `name`) whose question
    leaves no room, or whose context has no token.
    """
    if not tokenizer.is_fast:
        raise MissingNeed(
            f"task {name!r}: {type(tokenizer).__name__} does not tell where its tokens are in the text; give a fast tokenizer"
        )
    cuts = Windows(columns={}, question=[], offsets=[])
    special = tokenizer.num_special_tokens_to_add(pair=True)
    for start in range(0, len(questions), CHUNK):
        asked, read = list(questions[start : start + CHUNK]), list(contexts[start : start + CHUNK])
        for row, ids in enumerate(tokenizer(asked, add_special_tokens=False)["input_ids"], start):
            if max_length - special - len(ids) <= doc_stride:
                raise DataError(
                    f"task {name!r}: the question of row {row} has {len(ids)} tokens, which leaves "
                    f"{max_length - special - len(ids)} of max_length={max_length} for the context; more than doc_stride={doc_stride} "
                    "are needed: raise max_length or lower doc_stride"
                )
        found = tokenizer(
            asked,
            read,
            truncation="only_second",
            max_length=max_length,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=True,
        )
        for window, number in enumerate(found["overflow_to_sample_mapping"]):
            of_context = np.array([part == 1 for part in found.sequence_ids(window)])
            offsets = np.where(of_context[:, None], np.array(found["offset_mapping"][window], np.int32), -1)
            if not of_context.any():
                raise DataError(f"task {name!r}: the context of row {start + number} has no token")
            cuts.question.append(start + number)
            cuts.offsets.append(offsets)
        for key, part in found.items():
            if key not in ("overflow_to_sample_mapping", "offset_mapping"):
                cuts.columns.setdefault(key, []).extend(part)
    return cuts


def answers(
    contexts: Sequence[str],
    texts: Sequence[Sequence[str] | None],
    starts: Sequence[Sequence[int] | None],
    *,
    where: str,
    columns: Sequence[str],
    unanswerable: bool,
) -> Iterator[list[Span]]:
    """The answers of each question as characters of its context, spaces around them left out.

    columns: names of texts and starts. Raises `DataError` naming `where`, row and column for an answer that is blank or not at its
    place, and for a question without one unless it may be unanswerable.
    """
    for row, (context, golds, places) in enumerate(zip(contexts, texts, starts, strict=True)):
        here = f"{where}: row {row}"
        if golds is None or places is None or len(golds) != len(places):
            raise DataError(
                f"{here}: {columns[0]}={golds!r} and {columns[1]}={places!r} must be lists of one length"
            )
        if not golds and not unanswerable:
            raise DataError(
                f"{here} has no answer in {columns[0]!r}; name a labelled split, or set unanswerable=True where a question may have none"
            )
        spans = []
        for gold, place in zip(golds, places, strict=True):
            if not gold.strip():
                raise DataError(f"{here} has a blank answer in {columns[0]!r}; leave it out")
            if place < 0 or context[place : place + len(gold)] != gold:
                raise DataError(
                    f"{here}: the answer {gold!r} is not at {columns[1]}={place}, where the context reads "
                    f"{context[max(place, 0) : max(place, 0) + len(gold)]!r}; count characters of the context as given"
                )
            first = place + len(gold) - len(gold.lstrip())
            spans.append((first, first + len(gold.strip())))
        yield spans


def position_logits(outputs: Mapping[str, "Tensor"], mask: "Tensor") -> "Tensor":
    """Logits of the first and of the last token of the answer (texts x 2 x tokens), float32; `NEVER` where `mask` (texts x tokens)
    is 0, so that nothing depends on how far a batch is padded. Raises `UnsupportedModel` where there are none."""
    import torch

    if "start_logits" not in outputs:
        raise UnsupportedModel(
            f"the model gives {', '.join(outputs)} and no start_logits: load it by AutoModelForQuestionAnswering"
        )
    logits = torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1).float()
    return logits.masked_fill(~mask.bool().unsqueeze(1), NEVER)


def _position(offsets: Array, answer: Span | None) -> list[int]:
    if answer is None:
        return [NOWHERE, NOWHERE]
    real = np.flatnonzero(offsets[:, 0] >= 0)
    first, last = offsets[real].T
    if first[0] > answer[0] or last[-1] < answer[1]:
        return [NOWHERE, NOWHERE]
    inside = real[(last > answer[0]) & (first < answer[1])]
    return [int(inside[0]), int(inside[-1])] if len(inside) else [NOWHERE, NOWHERE]
