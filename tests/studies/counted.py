"""Passes that write down each time they really run, into the file that COUNTED names; and entries built of them."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import stackcomp as sc
from stackcomp import nn
from tests import toys


class Counting:
    """Notes a run before it begins, takes SECONDS longer, and tells the digest of what it leaves and of its teacher."""

    def apply(self, model, context):
        with Path(os.environ["COUNTED"]).open("a") as file:
            file.write(f"{type(self).__name__}\n")
        time.sleep(float(os.environ.get("SECONDS_MORE", "0")))
        super().apply(model, context)  # type: ignore[misc]
        return {"left": nn.weights_digest(model), "teacher": nn.weights_digest(context.teacher())}


@dataclass(frozen=True, kw_only=True, repr=False)
class Train(Counting, sc.FineTune):
    """Counted fine-tuning."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Prune(Counting, sc.MagnitudePrune):
    """Counted pruning."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Round(Counting, sc.Int8Weights):
    """Counted rounding."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Broken(Counting, sc.MagnitudePrune):
    """Fails where it should prune."""

    def apply(self, model, context):
        raise RuntimeError("no luck")


def applied():
    """Names of the passes that ran, in order."""
    path = Path(os.environ["COUNTED"])
    return path.read_text().split() if path.is_file() else []


def entry(key, model, *passes, **settings):
    """An entry on the toy task."""
    settings = {"task": toys.classification_task(), "limit": 8, **settings}
    return sc.Entry(key=key, model=model, pipeline=sc.Pipeline(*passes), **settings)


def study(model):
    """A tuned model, from which two entries start that share their first pass."""
    tuned = entry("tuned", model, Train(steps=2, batch_size=4), labels={"ratio": 1.0})
    pruned = entry("tuned/pruned", tuned, Prune(sparsity=0.5), labels={"ratio": 2.0})
    rounded = entry("tuned/rounded", tuned, Prune(sparsity=0.5), Round(), labels={"ratio": 8.0})
    return sc.Study(name="toy", entries=(tuned, pruned, rounded))
