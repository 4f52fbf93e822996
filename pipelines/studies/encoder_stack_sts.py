"""What four post-training techniques give together on sentence embeddings, which one gave it, and whether the order matters.

    stackcomp study pipelines/studies/encoder_stack_sts.py            # about a quarter of an hour; stop and go on as you like
    stackcomp report pipelines/studies/encoder_stack_sts.py --out out/report

All-MiniLM-L6-v2 on the test pairs of STS-B, mean-pooled cosine; no label is read and no gradient step is taken. Factorizing, pruning and
the rounding of embeddings work on weights of their own, so they may come in any order; rounding the layers takes floating-point
values away, so by contract it comes after what needs these.
"""

from minilm import ATTENTION, FEED_FORWARD, LAYERS, WORDS, model

import stackcomp as sc

study = sc.combinations(
    name="encoder_stack_sts",
    model=model(),
    task=sc.tasks.stsb(),
    passes={
        "dense-sparse": sc.DenseSparse(ratio=2.0, only=FEED_FORWARD, sensitivity=False, samples=1024),
        "prune": sc.Wanda(sparsity=0.5, only=ATTENTION, samples=1024),
        "int8 layers": sc.Int8Weights(only=LAYERS),
        "int4 embeddings": sc.LowBitWeights(bits=4, only=WORDS),
    },
)
