"""Batches: which examples go together, and how they are padded.

The order of training depends on seed and epoch alone, so that a run resumed in the middle of an epoch sees
what an uninterrupted run sees.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from stackcomp.core.errors import SettingError
from stackcomp.nn import padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100  # what losses of torch and transformers leave out
PAIR = "pair_"
POOL = 32  # batches whose examples are sorted by length together: longer pools pad less and shuffle less


class LengthBatches(Sampler[list[int]]):
    """Batches of similar lengths in random order, as lists of indices; every example once an epoch.

    Examples are shuffled, cut into pools of 32 batches, sorted by length within a pool, cut into batches,
    and the batches are shuffled. The order is a function of (lengths, batch_size, seed, epoch) and nothing
    else.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise SettingError(f"batch_size={batch_size} must be at least 1")
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.drop_last = False  # what accelerate asks of a batch sampler that it splits over processes

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.of_epoch(self.epoch))

    def of_epoch(self, epoch: int) -> list[list[int]]:
        """All batches of one epoch."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.lengths))
        pool = POOL * self.batch_size
        batches = []
        for start in range(0, len(order), pool):
            part = order[start : start + pool]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            batches += [
                part[cut : cut + self.batch_size].tolist() for cut in range(0, len(part), self.batch_size)
            ]
        return [batches[i] for i in random.permutation(len(batches))]


def inference_batches(lengths: Sequence[int], *, batch_size: int) -> list[list[int]]:
    """Batches for evaluation: sorted by length, longest first (so that too little memory shows at once)."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[start : start + batch_size].tolist() for start in range(0, len(order), batch_size)]


def lengths_of(rows: Mapping[str, Any]) -> list[int]:
    """Tokens of each row of `Task.encode`; of the longer text for a pair compared by similarity."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    if PAIR + "input_ids" in rows:
        return [max(a, len(b)) for a, b in zip(lengths, rows[PAIR + "input_ids"], strict=True)]
    return lengths


class Collator:
    """Pads rows of `Task.encode` on the right, to the longest of the batch; gives a dictionary of tensors.

    labels: int64 class numbers, float32 targets, or int64 tokens padded by -100. The two texts of a
    similarity pair become rows of one batch, all first texts and then all second ones: 2n rows of tokens
    beside n labels. A text without a token is one of padding, which counts as its own.

    model: what the batches are for, as heads of decoders find the end of a text by the padding of the model's config; without it, and
    where it has none, the tokenizer's is taken, or token 0.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", model: nn.Module | None = None) -> None:
        known = None if model is None else padding_id(model)
        padding = (tokenizer.pad_token_id or 0) if known is None else known
        self.fill = {"input_ids": padding, "token_type_ids": tokenizer.pad_token_type_id}
        self.blank = self.fill | {"attention_mask": 1}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {}
        tokens = [key for key in rows[0] if key not in ("labels", "index") and not key.startswith(PAIR)]
        for key in tokens:
            parts = [row[key] for row in rows]
            if PAIR + key in rows[0]:
                parts += [row[PAIR + key] for row in rows]
            parts = [part or [self.blank.get(key, 0)] for part in parts]
            batch[key] = _padded(parts, self.fill.get(key, 0))
        if "labels" in rows[0]:
            labels = [row["labels"] for row in rows]
            whole = not isinstance(labels[0], float)
            batch["labels"] = (
                _padded(labels, IGNORED_LABEL)
                if isinstance(labels[0], list)
                else torch.tensor(labels, dtype=torch.int64 if whole else torch.float32)
            )
        if "index" in rows[0]:
            batch["index"] = torch.tensor([row["index"] for row in rows])
        return batch


def _padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.int64)


def mean_over_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """Hidden states (texts x tokens x width) as one vector a text (texts x width): their mean where `mask` (texts x tokens) is 1, in
    float32."""
    real = mask.unsqueeze(-1).float()
    return (hidden.float() * real).sum(1) / real.sum(1)
