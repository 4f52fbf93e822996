"""DSFormer against everything it claims to beat: MiniLM-L6 on four tasks, at encoder compressions of 2, 2.8 and 3.57.

    stackcomp study pipelines/dsformer/table.py            # says what is left and for how long; stop and go on as you like
    stackcomp study pipelines/dsformer/table.py --list

All methods at 2.8; at 2 and 3.57 conventional practice, and STF and the best low rank, both with and without gradients in the metric; at
3.57 conventional practice from every start, too. Three seeds on the small tasks; on the large ones three of those that run at every
ratio and of the dense model, and one of the rest. Every finished row is in docs/results/dsformer.jsonl, and is not run again.
"""

from collections.abc import Iterator

from recipes import BUDGETS, EVERYWHERE, entry, methods, tuned

import stackcomp as sc

RATIOS = (2.8, 3.57, 2.0)
SEEDS = (0, 1, 2)


def entries() -> Iterator[sc.Entry]:
    """The rows of the table, those that say most first."""
    for seed in SEEDS:
        for name, budget in BUDGETS.items():
            dense = tuned(name, seed)
            yield dense
            for ratio in RATIOS:
                for place, (method, pipeline) in enumerate(methods(budget, ratio).items()):
                    if seed == 0 or budget.small or place < EVERYWHERE:
                        yield entry(dense, method, ratio, pipeline)


study = sc.Study(name="dsformer", entries=tuple(entries()))
