"""Sentence embeddings, post-training only: dense-sparse -> int8 on all-MiniLM-L6-v2, scored on the STS benchmark.

    stackcomp check pipelines/sts_b.py
    stackcomp run pipelines/sts_b.py --out out/sts-b

No label is read and no gradient step is taken; calibration text is the training split. The model comes with the
`demo` extra (or name another in STACKCOMP_MODEL), the data from the hub or from the folder in STACKCOMP_DATA.
"""

import os
import runpy
from pathlib import Path

import stackcomp as sc

quickstart = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))

BLOCKS = "encoder.layer.*"
task = sc.tasks.stsb()
model = os.environ.get("STACKCOMP_MODEL") or quickstart["packaged_model"]()

pipeline = sc.Pipeline(
    sc.DenseSparse(ratio=2.8, only=BLOCKS),
    sc.Int8Weights(only=BLOCKS),
)
