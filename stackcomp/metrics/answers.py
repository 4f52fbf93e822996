"""Answers found in a text, and how right they are, as SQuAD counts (Rajpurkar et al., arXiv 1606.05250 and 1806.03822)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalized(text: str) -> list[str]:
    """Words in small letters, without ASCII punctuation and without articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1 where the answer has the words of a right one, in order; else 0. No right answers: 1 for the empty one."""
    return max(float(normalized(answer) == normalized(gold)) for gold in golds or [""])


def f1(answer: str, golds: Sequence[str]) -> float:
    """The best F1 of the words of the answer and those of a right one. Where either has no words: 1 if both have none, else 0."""
    return max(_overlap(normalized(answer), normalized(gold)) for gold in golds or [""])


def _overlap(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * (Counter(ours) & Counter(theirs)).total() / (len(ours) + len(theirs))


def best_spans(logits: Tensor, allowed: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """The span of the highest sum of logits in each text: its score, its first and its last token (each: texts).

    logits (texts x 2 x tokens) of first and last tokens; allowed (texts x tokens) says where both must be; a span has at most
    `longest` tokens. All spans are compared; the published scripts pair the 20 best first tokens with the 20 best last ones.
    """
    first, last = logits.masked_fill(~allowed.unsqueeze(1), -torch.inf).unbind(1)
    length = first.shape[1]
    by_width = [  # best span of each width: its score and first token
        (first[:, : length - width] + last[:, width:]).max(1) for width in range(min(longest, length))
    ]
    score, width = torch.stack([values for values, _ in by_width]).max(0)
    start = torch.stack([places for _, places in by_width]).gather(0, width.unsqueeze(0))[0]
    return score, start, start + width
