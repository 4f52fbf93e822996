"""A small real classifier for the studies of reloading and resuming: all-MiniLM-L6-v2 cut to its first layers."""

from pathlib import Path
from typing import Any

import stackcomp as sc
from benchmarks import command
from stackcomp.core.files import whole_folder

LAYERS = 2
TEXTS = (
    "A film that knows where it is going, and takes its time.",
    "Two hours of my life that I will not get back.",
    "Fine acting; a plot one has seen before.",
    "It is neither good nor bad: it is long.",
)


def task() -> Any:
    """The quickstart's task on the package's own reviews."""
    return sc.tasks.movie_reviews("rotten_tomatoes")


def classifier(folder: Path, seed: int = 0) -> Path:
    """The folder of the model, made there once: real weights, a new head, its tokenizer."""
    if folder.is_dir():
        return folder
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    source = command.packaged_model()
    torch.manual_seed(seed)
    shown = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list every layer that is cut
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            source, num_hidden_layers=LAYERS, num_labels=2
        )
    finally:
        logging.set_verbosity(shown)
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(source).save_pretrained(partial)
    return folder


def batch(folder: Path) -> dict[str, Any]:
    """The fixed texts as the model reads them."""
    from transformers import AutoTokenizer

    return dict(AutoTokenizer.from_pretrained(folder)(list(TEXTS), padding=True, return_tensors="pt"))
