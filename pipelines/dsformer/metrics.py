"""Which errors of a weight a factorization should keep small: those of the weight itself, of the layer's outputs (the metric of its
inputs), or of what the model says (that of its inputs and of the gradients at its outputs, which is the default).

    stackcomp study pipelines/dsformer/metrics.py

Dense-sparse and low rank in each, without a step of training: trained ones are in table.py. STS-B, one seed. Rows in
docs/results/metrics.jsonl.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from recipes import BLOCKS, entry, tuned

import stackcomp as sc

RATIOS = (3.57, 5.0)
METRICS: Mapping[str, Mapping[str, Any]] = {
    "inputs and gradients": {"samples": 1024},
    "inputs": {"samples": 1024, "sensitivity": False},
    "weights": {"data_aware": False},
}


def methods(ratio: float) -> Iterator[tuple[str, sc.Pipeline]]:
    """Both factorizations at a ratio, in every metric."""
    for metric, settings in METRICS.items():
        yield f"low rank, {metric}", sc.Pipeline(sc.LowRank(ratio=ratio, only=BLOCKS, **settings))
        dense_sparse = sc.DenseSparse(ratio=ratio, only=BLOCKS, sweeps=12, **settings)
        yield f"dense-sparse, {metric}", sc.Pipeline(dense_sparse)


def entries() -> Iterator[sc.Entry]:
    """One row a method and ratio."""
    dense = tuned("stsb", 0)
    yield dense
    for ratio in RATIOS:
        for method, pipeline in methods(ratio):
            yield entry(dense, method, ratio, pipeline)


study = sc.Study(name="metrics", entries=tuple(entries()))
