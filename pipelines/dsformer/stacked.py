"""What DSFormer still brings on top of other techniques: MiniLM-L6, made smaller otherwise first, on two tasks.

    stackcomp study pipelines/dsformer/stacked.py            # stop and go on as you like
    stackcomp study pipelines/dsformer/stacked.py --list

Three bases, each alone and with DSFormer at three ratios of its own:

- distilled student: the first half of the layers, distilled;
- shared layers: every two layers use one set of weights (as in ALBERT), that of the first of them at the start, distilled;
- int8: the layers rounded. Rounded values take no gradient, so by contract rounding comes last: DSFormer is put under it.

Bases are distilled until they gain little (three recoveries of recipes, at a higher rate), DSFormer gets the steps of one recovery, and
what stands beside a stack has as many in all: a base that is trained gets those of DSFormer as a second distillation. Rounding alone is
not trained, as the model that it rounds is its own teacher.
The dense models are those of table.py.
"""

from collections.abc import Iterator
from dataclasses import replace

from recipes import BLOCKS, BUDGETS, Budget, entry, factorized, stf, tuned

import stackcomp as sc

TASKS = ("stsb", "reviews")
RATIOS = (2.0, 1.6, 2.8)
SEED = 0
BASE_RECOVERIES, BASE_RATE = 3, 3e-4


def stacks(budget: Budget) -> Iterator[tuple[str, float, sc.Pipeline]]:
    """(method, ratio of DSFormer, pipeline): every base, then every base with DSFormer."""
    recovery, rounding = budget.recovery, sc.Int8Weights(only=BLOCKS)
    long = replace(recovery, steps=BASE_RECOVERIES * budget.steps, learning_rate=BASE_RATE)
    smaller = {
        "distilled student": sc.DropLayers(keep=3, which="first"),
        "shared layers": sc.ShareLayers(group=2),
    }
    for base, step in smaller.items():
        yield base, 1.0, sc.Pipeline(step, long, recovery)
    yield "int8", 1.0, sc.Pipeline(rounding)
    for ratio in RATIOS:
        start = factorized(ratio)
        for base, step in smaller.items():  # the weights were trained since they came
            learned = stf(budget, latent="product")
            yield f"{base} + DSFormer", ratio, sc.Pipeline(step, long, start, learned)
        yield "int8 + DSFormer", ratio, sc.Pipeline(start, stf(budget), rounding)


def entries() -> Iterator[sc.Entry]:
    """The rows of the table."""
    for name in TASKS:
        dense = tuned(name, SEED)
        yield dense
        for method, ratio, pipeline in stacks(BUDGETS[name]):
            yield entry(dense, method, ratio, pipeline)


study = sc.Study(name="stacked", entries=tuple(entries()))
