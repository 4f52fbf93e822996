"""What four techniques give together on a classifier, each stack distilled as long as each technique alone.

    stackcomp study pipelines/studies/encoder_stack.py --list         # what there is to run
    stackcomp study pipelines/studies/encoder_stack.py --minutes 60   # hours on two cores; stop and go on as you like
    stackcomp report pipelines/studies/encoder_stack.py --out out/report

All-MiniLM-L6-v2 is fine-tuned on SST-2; that is the model every pipeline starts from and its teacher. Every pipeline ends with the same
150 steps of distillation, and so does the dense model that techniques are credited against. Of rounded weights these train the scales only.
The sweep has one seed; what it found to be the smallest within a point, alone and stacked in either order, has three.
"""

from minilm import ATTENTION, FEED_FORWARD, FROZEN, LAYERS, classifier

import stackcomp as sc

STEPS = 150
FINAL = ("dense", "int8 layers", "dense-sparse > prune > int8 layers", "prune > dense-sparse > int8 layers")

tuned = classifier()

study = sc.combinations(
    name="encoder_stack",
    model=tuned,
    task=tuned.task,
    passes={
        "4 layers": sc.DropLayers(keep=4),
        "dense-sparse": sc.DenseSparse(ratio=2.0, only=FEED_FORWARD, sensitivity=False, samples=1024),
        "prune": sc.MagnitudePrune(sparsity=0.5, only=ATTENTION),
        "int8 layers": sc.Int8Weights(only=LAYERS),
    },
    again=dict.fromkeys(FINAL, (1, 2)),
    recovery=sc.Distill(epochs=100, steps=STEPS, batch_size=32, learning_rate=2e-4, skip=FROZEN),
    latency=True,
)
