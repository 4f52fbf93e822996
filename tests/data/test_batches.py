"""Batches: every example once, in an order of seed and epoch only; padding that changes nothing real."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackcomp.core.errors import SettingError
from stackcomp.data.batches import Collator, LengthBatches, inference_batches, lengths_of

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=300)


@settings(deadline=None, max_examples=50)
@given(lengths=LENGTHS, batch_size=st.integers(1, 17), seed=st.integers(0, 2**31), epoch=st.integers(0, 5))
def test_every_example_once(lengths: list[int], batch_size: int, seed: int, epoch: int) -> None:
    batches = LengthBatches(lengths, batch_size=batch_size, seed=seed)
    found = batches.of_epoch(epoch)
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    assert len(found) == len(batches)
    assert max(map(len, found)) <= batch_size
    assert found == LengthBatches(lengths, batch_size=batch_size, seed=seed).of_epoch(epoch)


def test_order_depends_on_seed_and_epoch() -> None:
    lengths = [i % 23 + 1 for i in range(500)]
    orders = {
        str(LengthBatches(lengths, batch_size=8, seed=seed).of_epoch(epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_set_epoch_is_what_iteration_gives() -> None:
    batches = LengthBatches(range(1, 101), batch_size=7, seed=3)
    batches.set_epoch(2)
    assert list(batches) == batches.of_epoch(2)


def test_similar_lengths_share_a_batch() -> None:
    lengths = [(i * 37) % 100 + 1 for i in range(640)]

    def padding(order: list[list[int]]) -> int:
        return sum(max(lengths[i] for i in batch) * len(batch) for batch in order) - sum(lengths)

    plain = [list(range(start, start + 16)) for start in range(0, 640, 16)]
    assert padding(LengthBatches(lengths, batch_size=16, seed=0).of_epoch(0)) < padding(plain) / 5


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(SettingError, match="batch_size=0"):
        LengthBatches([1], batch_size=0, seed=0)


@given(lengths=LENGTHS, batch_size=st.integers(1, 9))
def test_inference_batches_are_longest_first(lengths: list[int], batch_size: int) -> None:
    order = [index for batch in inference_batches(lengths, batch_size=batch_size) for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)


def test_collator_pads_and_masks(tokenizer) -> None:
    rows = [
        dict(tokenizer("the film")) | {"labels": 1},
        dict(tokenizer("the very good film")) | {"labels": 0},
    ]
    batch = Collator(tokenizer)(rows)
    assert batch["input_ids"].shape == (2, 6)
    assert batch["attention_mask"].sum(1).tolist() == [4, 6]
    assert (batch["input_ids"][0, 4:] == tokenizer.pad_token_id).all()
    assert batch["labels"].dtype == torch.int64


def test_collator_labels(tokenizer) -> None:
    row = dict(tokenizer("the film"))
    numbers = Collator(tokenizer)([row | {"labels": 2.0, "index": 5}, row | {"labels": 3.5, "index": 1}])
    assert numbers["labels"].dtype == torch.float32
    assert numbers["index"].tolist() == [5, 1]
    windows = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in ([1, 2, 3], [4])
    ]
    assert Collator(tokenizer)(windows)["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]


def test_collator_stacks_pairs(tokenizer) -> None:
    first, second = tokenizer("the film"), tokenizer("a very bad film")
    row = dict(first) | {f"pair_{key}": value for key, value in second.items()} | {"labels": 1.0}
    batch = Collator(tokenizer)([row, row])
    assert batch["input_ids"].shape == (4, 6)
    assert batch["labels"].shape == (2,)
    assert batch["input_ids"][0].equal(batch["input_ids"][1])
    assert batch["input_ids"][2].tolist() == second["input_ids"]
    assert lengths_of({key: [value] for key, value in row.items()}) == [6]


def test_a_text_without_a_token_is_one_of_padding(tokenizer) -> None:
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in ([], [4, 5])]
    assert Collator(tokenizer)(rows[:1])["input_ids"].tolist() == [[tokenizer.pad_token_id]]
    assert Collator(tokenizer)(rows)["attention_mask"].tolist() == [[1, 0], [1, 1]]
