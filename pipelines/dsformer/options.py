"""What each option of STF changes: one at a time around the recipe of the table, at an encoder compression of 3.57.

    stackcomp study pipelines/dsformer/options.py          # about 2 hours of one core

The film reviews and STS-B, one seed. Rows in docs/results/options.jsonl; beside the score, their findings hold the last losses and the
share of the supports that each projection changed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from recipes import BLOCKS, BUDGETS, FROZEN, entry, factorized, tuned

import stackcomp as sc

RATIO = 3.57
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "as in the table": {},
    "learned=0 (conventional practice)": {"learned": 0.0},
    "learned=0.5": {"learned": 0.5},
    "learned=1": {"learned": 1.0},
    "every=4": {"every": 4},
    "every=64": {"every": 64},
    "weight_rate=0.25": {"weight_rate": 0.25},
    "weight_rate=1": {"weight_rate": 1.0},
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
            said = {"weight_rate": 0.5, **BUDGETS[name].learning, **settings}
            stf = sc.STF(**said, only=BLOCKS, frozen=FROZEN)
            yield entry(dense, option, RATIO, sc.Pipeline(factorized(RATIO), stf))


study = sc.Study(name="options", entries=tuple(entries()))
