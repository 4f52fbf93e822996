"""What each option of STF changes: one at a time around the recipe of the table, at an encoder compression of 3.57.

    stackcomp study pipelines/dsformer/options.py

The film reviews and STS-B, one seed. Rows in docs/results/options.jsonl; beside the score, their findings hold the last losses and the
share of the supports that each projection changed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from recipes import BUDGETS, STF_RATE, entry, factorized, stf, tuned

import stackcomp as sc

RATIO = 3.57
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "as in the table": {},
    "every=4": {"every": 4},
    "every=64": {"every": 64},
    "half the rate": {"learning_rate": STF_RATE / 2},
    "twice the rate": {"learning_rate": STF_RATE * 2},
    "latent=product": {"latent": "product"},
    "data_aware=False": {"data_aware": False},
    "labels, no teacher": {"distill": False},
    "outputs only": {"hidden": 0.0},
}


def entries() -> Iterator[sc.Entry]:
    """One row an option and task."""
    for name in ("reviews", "stsb"):
        dense = tuned(name, 0)
        yield dense
        for option, settings in OPTIONS.items():
            pipeline = sc.Pipeline(factorized(RATIO), stf(BUDGETS[name], **settings))
            yield entry(dense, option, RATIO, pipeline)


study = sc.Study(name="options", entries=tuple(entries()))
