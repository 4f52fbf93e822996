"""STS benchmark, post-training only: dense-sparse beside low rank at equal encoder compression, each then rounded to int8;
and int8 alone, which any factorization has to beat in bytes.

No label is read and no gradient step is taken. One row a step of each pipeline; the first row is the model as it came,
whose score is published (82.03 on MTEB), which checks model, data and metric at once. The data come from the hub, or from
the folder in STACKCOMP_DATA.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import stackcomp as sc
from benchmarks import command
from stackcomp.studies.rows import Rows, figures, stamp

if TYPE_CHECKING:
    from stackcomp.data.task import Task

BLOCKS = "encoder.layer.*"
RATIOS = (1.5, 2.0, 2.8, 3.57)
NEAR = 1.3  # how far the ratio of a layer may be from that of all, as a factor
PUBLISHED, TOLERANCE = 82.03, 0.1


def pipelines(ratios: Sequence[float] = RATIOS) -> Iterator[tuple[float, sc.Pipeline]]:
    """(ratio asked, pipeline) for int8 alone, and for every ratio and method."""
    rounding = sc.Int8Weights(only=BLOCKS)
    yield 1.0, sc.Pipeline(rounding)
    for ratio in ratios:
        for factorize in (sc.DenseSparse, sc.LowRank):
            yield ratio, sc.Pipeline(factorize(ratio=ratio, only=BLOCKS), rounding)
        yield ratio, sc.Pipeline(sc.LowRank(ratio=ratio, only=BLOCKS, spread=NEAR), rounding)


def method(first: sc.Pass) -> str:
    """What the tables call the first pass: low rank is given its budget both ways, free and near the ratio of all."""
    return f"{first.name} (even budget)" if getattr(first, "spread", None) else first.name


def run(
    model: Any,
    task: "Task",
    tokenizer: Any,
    rows: Rows,
    *,
    out: Path,
    ratios: Sequence[float] = RATIOS,
    seed: int = 0,
    limit: int | None = None,
    again: bool = False,
) -> None:
    """Add the rows that are missing. The folder `out` serves all pipelines in turn: what they share is made once."""
    from stackcomp.manager import Measuring

    manager = sc.PassManager(
        out=out,
        task=task,
        tokenizer=tokenizer,
        seed=seed,
        measuring=Measuring(latency=False, limit=limit),
    )
    for ratio, pipeline in pipelines(ratios):
        passes = pipeline.flat()
        keys = [" -> ".join(map(repr, passes[:end])) for end in range(1, len(passes) + 1)]
        if not again and all(
            rows.has(key, declaration=repr(pipeline), seed=seed, limit=limit) for key in keys
        ):
            command.say(f"there already: {keys[-1]}")
            continue
        command.say(f"running {keys[-1]}")
        ledger = manager.run(model, pipeline, resume=True).ledger
        common = {**stamp(pipeline, seed), "limit": limit, "task": task.name}
        for step, key in enumerate(["dense", *keys]):
            said = {
                "method": method(passes[0]) if step else "dense",
                "ratio": ratio if step else 1.0,
                "int8": step > 0 and isinstance(passes[step - 1], sc.Int8Weights),
            }
            found = figures(ledger, step)
            rows.add({"key": key, **said, **found, **common})
            command.say(f"  {key}: {found['score']:.2f} at {found['layer_compression']:.2f}x of the encoder")


def main() -> int:
    """Run the study; 1 when the model as it came misses its published score."""
    parser = command.parser("stsb", __doc__ or "")
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=list(RATIOS), help="encoder compressions asked for"
    )
    parser.add_argument("--limit", type=int, help="score on so many pairs of the test set (default: all)")
    options = parser.parse_args()
    model = command.packaged_model()
    with command.study("stsb", options) as rows:
        run(
            model,
            sc.tasks.stsb(),
            model,
            rows,
            out=options.out / "run",
            ratios=options.ratios,
            seed=options.seed,
            limit=options.limit,
            again=options.again,
        )
        shutil.rmtree(options.out / "run", ignore_errors=True)
        (dense,) = (row for row in rows.read() if row["key"] == "dense")
    if options.limit is None and abs(dense["score"] - PUBLISHED) > TOLERANCE:
        command.say(f"the model as it came scores {dense['score']:.2f}, and {PUBLISHED} is published")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
