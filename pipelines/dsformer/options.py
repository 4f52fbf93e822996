"""What each option of STF changes: one at a time around the recipe of the table with gradients, at an encoder compression of 3.57.

    stackcomp study pipelines/dsformer/options.py

STS-B, one seed. Rows in docs/results/options.jsonl; beside the score, their findings hold the last losses and the share of the supports
that each projection changed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from recipes import BUDGETS, WEIGHED_RATE, entry, tuned, weighed, weighed_stf

import stackcomp as sc

TASK = "stsb"
RATIO = 3.57
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "as in the table": {},
    "every=16": {"every": 16},
    "every=300": {"every": 300},  # after the last step only
    "half the rate": {"learning_rate": WEIGHED_RATE / 2},
    "twice the rate": {"learning_rate": WEIGHED_RATE * 2},
    "latent=product": {"latent": "product"},
    "sensitivity=False": {"sensitivity": False},
    "data_aware=False": {"data_aware": False},
    "labels, no teacher": {"distill": False},
    "outputs only": {"hidden": 0.0},
}


def entries() -> Iterator[sc.Entry]:
    """One row an option."""
    dense = tuned(TASK, 0)
    yield dense
    for option, settings in OPTIONS.items():
        pipeline = sc.Pipeline(weighed(RATIO), weighed_stf(BUDGETS[TASK], **settings))
        yield entry(dense, option, RATIO, pipeline)


study = sc.Study(name="options", entries=tuple(entries()))
