"""A tiny classifier and a tiny run, also as a program that a test can kill."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerBase

from stackcomp.data import tasks
from stackcomp.training import TaskLoss, TrainReport, TrainSettings, train
from tests.data.conftest import word_tokenizer

WORDS = ("the", "a", "film", "good", "bad", "was", "very", "not", "plot", "actor", "and")
TASK = tasks.classification(
    {
        "train": [
            {"text": " ".join(WORDS[(i * step) % 11] for step in range(1, 2 + i % 7)), "label": i % 2}
            for i in range(60)
        ]
    },
    test=6,
    selection=6,
)
SETTINGS = TrainSettings(epochs=3, batch_size=8, learning_rate=1e-2, save_every=2)


def classifier(**settings: object) -> BertForSequenceClassification:
    """A fixed little model, dropout on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
        return BertForSequenceClassification(BertConfig(**{**shape, "num_hidden_layers": 2, **settings}))


def run(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, scratch: Path, **settings: object
) -> TrainReport:
    """The run that all tests compare with."""
    given = {"task": TASK, "loss": TaskLoss(task=TASK), "settings": SETTINGS, "seed": 5, **settings}
    return train(model, tokenizer=tokenizer, scratch=scratch, **given)


def main() -> None:
    """Train, saying each step on standard output, and write the weights."""
    scratch, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)

    def loud(items, /, label, total=None):
        for item in items:
            print(label, item, flush=True)
            yield item

    model = classifier()
    run(model, word_tokenizer(), scratch, progress=loud)
    save_file(model.state_dict(), f"{out}.partial")
    os.replace(f"{out}.partial", out)


if __name__ == "__main__":
    main()
