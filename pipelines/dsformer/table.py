"""DSFormer against everything it claims to beat: MiniLM-L6 on four tasks, at encoder compressions from 2 to 10.

    stackcomp study pipelines/dsformer/table.py            # says what is left and for how long; stop and go on as you like
    stackcomp study pipelines/dsformer/table.py --list

All methods at 2.8; STF, conventional practice and the best low rank at 2 and 3.57, too, and with gradients in the metric, where less is
lost, at 3.57, 6 and 10. Three seeds on the small tasks; on the large ones three of those in REPEATED and of the dense model, and one of the
rest. Every finished row is in docs/results/dsformer.jsonl, and is not run again.
"""

from collections.abc import Iterator

from recipes import BUDGETS, REPEATED, entry, methods, tuned

import stackcomp as sc

RATIOS = (2.8, 3.57, 6.0, 2.0, 10.0)
SEEDS = (0, 1, 2)


def entries() -> Iterator[sc.Entry]:
    """The rows of the table, those that say most first."""
    for seed in SEEDS:
        for name, budget in BUDGETS.items():
            dense = tuned(name, seed)
            yield dense
            for ratio in RATIOS:
                for method, pipeline in methods(budget, ratio).items():
                    if seed == 0 or budget.small or method in REPEATED:
                        yield entry(dense, method, ratio, pipeline)


study = sc.Study(name="dsformer", entries=tuple(entries()))
