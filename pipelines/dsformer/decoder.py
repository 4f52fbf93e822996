"""DSFormer's form on a decoder, after training: dense-sparse against low rank on SmolLM2-135M, by perplexity on WikiText-2.

    pip install '.[decoder]'
    stackcomp study pipelines/dsformer/decoder.py            # stop and go on as you like
    stackcomp study pipelines/dsformer/decoder.py --list

Both factorizations see the same calibration text, keep the same bytes, and whiten each layer's inputs, as SVD-LLM does; no gradient is
taken, and nothing is trained afterwards. Perplexity is over the same TEST windows of 256 tokens for all. The dense model's own is in
every row, as the first of its steps. The dense model and where it comes from: pipelines/studies/smollm2.py.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import stackcomp as sc

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "studies"))

from smollm2 import BLOCKS, model, task

RATIOS = (1.5, 1.25, 2.0)
SAMPLES = 1024  # calibration texts: lines of the training split
TEST = 256  # windows


def methods(ratio: float) -> dict[str, sc.Pass]:
    """Both ways to store the layers in the same bytes."""
    shared = {"ratio": ratio, "only": BLOCKS, "sensitivity": False, "samples": SAMPLES}
    return {"dense-sparse": sc.DenseSparse(**shared, sweeps=6), "low rank": sc.LowRank(**shared)}


def entries() -> Iterator[sc.Entry]:
    """Both methods at every ratio."""
    source = model()
    for ratio in RATIOS:
        for method, step in methods(ratio).items():
            yield sc.Entry(
                key=f"{method}/{ratio:g}",
                model=source,
                task=task,
                pipeline=step,
                labels={"task": task.name, "method": method, "ratio": ratio},
                limit=TEST,
            )


study = sc.Study(name="decoder", entries=tuple(entries()))
