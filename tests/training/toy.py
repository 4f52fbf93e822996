"""A tiny classifier and a tiny run, also as a program that a test can kill."""

import os
import random
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerBase

from stackcomp.core.context import Progress, quiet
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
        return BertForSequenceClassification(
            BertConfig(**{**shape, "num_hidden_layers": 2, "max_position_embeddings": 16, **settings})
        )


def run(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, scratch: Path, **settings: object
) -> TrainReport:
    """The run that all tests compare with."""
    given = {"task": TASK, "loss": TaskLoss(task=TASK), "settings": SETTINGS, "seed": 5, **settings}
    return train(model, tokenizer=tokenizer, scratch=scratch, **given)


def trained_bytes(scratch: Path, progress: Progress = quiet) -> bytes:
    """The weights file at the end of the run, resumed from what scratch holds."""
    model = classifier()
    run(model, word_tokenizer(), scratch, progress=progress)
    return save(model.state_dict())


def kill_at(scratch: Path, step: int, delay_s: float) -> None:
    """Start the run in a process of its own, and send it SIGKILL so long after it began the given step."""
    reader, writer = os.pipe()

    def say(items: Iterable[int], /, label: str, total: int | None = None) -> Iterable[int]:
        for item in items:
            os.write(writer, b".")
            yield item

    child = os.fork()
    if child == 0:
        trained_bytes(scratch, say)
        os._exit(0)
    for _ in range(step):
        os.read(reader, 1)
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)


def main() -> None:
    """`python -m tests.training.toy FOLDER POINTS SEED`: kill at POINTS random moments, resume and compare.

    Prints the checkpoints that were resumed from; fails where the final bytes are not those of a whole run.
    """
    folder, points, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    torch.set_num_threads(1)  # before any thread starts, so that forks are whole
    whole = trained_bytes(folder / "whole")
    for point in range(points):
        scratch = folder / f"point-{point}"
        kill_at(scratch, chance.randint(1, 17), chance.uniform(0, 0.05))
        complete = sorted(marker.parent.name for marker in scratch.glob("*/complete.json"))
        if trained_bytes(scratch) != whole:
            sys.exit(f"point {point}: resumed from {complete}, and the weights differ from a whole run's")
        print(point, *complete, flush=True)


if __name__ == "__main__":
    main()
