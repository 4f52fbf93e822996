"""DSFormer (STF) on SQuAD 1.1: bert-base-uncased at an encoder compression of 2.8, by the recipe of the table.

    stackcomp check pipelines/dsformer/squad.py
    stackcomp study pipelines/dsformer/squad.py                  # fine-tunes the dense model, then compresses it
    STACKCOMP_MODEL=out/tuned stackcomp run pipelines/dsformer/squad.py --out out/squad    # compresses one that is fine-tuned already

The model comes from the hub, or is what STACKCOMP_MODEL names; the data from the hub or from the folder in STACKCOMP_DATA. It takes
days of a CPU and has not been run here: epochs, rate and steps are those usual for the model, not tuned ones.
"""

import os

from recipes import Budget, entry, methods

import stackcomp as sc

RATIO = 2.8

model = os.environ.get("STACKCOMP_MODEL") or "bert-base-uncased"
task = sc.tasks.squad()
budget = Budget(task=task, epochs=2, rate=3e-5, batch_size=16, steps=5000)
pipeline = methods(budget, RATIO)["STF"]

dense = sc.Entry(
    key="squad/dense/0",
    model=model,
    task=task,
    pipeline=sc.Pipeline(budget.dense),
    labels={"task": "squad", "method": "dense", "ratio": 1.0},
)
study = sc.Study(name="squad", entries=(dense, entry(dense, "STF", RATIO, pipeline)))
