"""A classifier of SST-2 in a small file: the stack that `pipelines/studies/sst2_24x.py` found, on the model that it was found for.

    stackcomp check pipelines/smallest_sst2.py
    stackcomp run pipelines/smallest_sst2.py --out out/smallest    # more than an hour on one core; stop and go on with --resume

Word pieces that the training text hardly uses go first, then layers; what is left is rounded to 2 bits while it learns from the fine-tuned
model, and the file is entropy coded. The model comes with the `demo` extra, SST-2 from the hub or from the folder in STACKCOMP_DATA.
"""

import sys
from pathlib import Path

import stackcomp as sc

sys.path.insert(0, str(Path(__file__).resolve().parent / "studies"))

from minilm import LAYERS, classifier

tuned = classifier()
task = tuned.task

pipeline = sc.Pipeline(
    sc.PruneVocabulary(least=6),
    sc.DropLayers(keep=5),
    sc.QuantizationAware(
        bits=2,
        group=64,
        only=(LAYERS, "pooler", "embeddings.word_embeddings", "embeddings.position_embeddings"),
        epochs=100,
        steps=4800,
        learning_rate=2e-4,
    ),
    sc.EntropyCode(),
)


def model() -> Path:
    """The fine-tuned classifier; made once, then kept under out/."""
    folder = Path("out") / "sst2-fine-tuned"
    manager = sc.PassManager(out=folder, task=task, tokenizer=tuned.model)
    manager.run(tuned.model, tuned.pipeline, resume=True)
    return folder
