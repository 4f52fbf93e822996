"""Weights that are trained with their rounding in the loop: the model runs on what will be stored, and gradients pass straight through
(arXiv 1308.3432)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stackcomp.core.matrices import Coding
from stackcomp.nn import RoundedMatrix, round_in_training, settle

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def rounded(
    model: "PreTrainedModel", ids: Iterable[str], *, coding: Coding, group: int | None
) -> Iterator[list[RoundedMatrix]]:
    """Round the weights `ids` while they are trained, as long as the context lasts; afterwards, a failure included, they are stored as
    they computed last."""
    done: list[str] = []
    matrices: list[RoundedMatrix] = []
    try:
        for id_ in ids:
            matrices += round_in_training(model, id_, coding=coding, group=group)
            done.append(id_)
        yield matrices
    finally:
        for id_ in done:
            settle(model, id_)
