"""2:4 pruning -> recovery distillation -> int8 on the quickstart's classifier.

    stackcomp check pipelines/prune_distill.py
    stackcomp run pipelines/prune_distill.py --out out/prune-distill

Half of every four weights in a row is dropped and never comes back: the distillation trains what is kept, and the
rounding stores what is kept.
"""

import runpy
from pathlib import Path

import stackcomp as sc

quickstart = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))

BLOCKS = "encoder.layer.*"
task, model = quickstart["task"], quickstart["model"]

pipeline = sc.Pipeline(
    sc.MagnitudePrune(sparsity="2:4", only=BLOCKS),
    sc.Distill(epochs=1),
    sc.Int8Weights(only=(BLOCKS, "embeddings.word_embeddings")),
)
