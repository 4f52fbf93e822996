"""The quickstart's pipeline, the same passes in every other legal order, each pass alone, and the yardstick: plain rounding of the same
weights to 4 bits.

One row a pipeline, with its whole ledger. Legal orders are found by search over the contracts.
"""

import itertools
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import stackcomp as sc
from benchmarks import command
from stackcomp.core import contract, headers
from stackcomp.core.passes import Pass
from stackcomp.studies.rows import Rows, stamp

if TYPE_CHECKING:
    from stackcomp.data.task import Task
    from stackcomp.manager import Measuring

Role = Literal["declared", "other order", "alone", "yardstick"]


def pipelines(passes: Sequence[Pass], source: Path) -> list[tuple[Role, sc.Pipeline]]:
    """The declared pipeline, its other legal orders, each pass alone; those that begin alike follow each other. The yardstick, on what the
    last pass works on, comes last."""
    plan = headers.plan_of(source)
    orders = [order for order in itertools.permutations(passes) if contract.legal(order, plan)]
    declared = tuple(passes)
    found: list[tuple[Role, tuple[Pass, ...]]] = [("declared", declared)]
    found.extend(("other order", order) for order in orders if order != declared)
    found.extend(("alone", (item,)) for item in declared)
    places = {item: index for index, item in enumerate(declared)}
    found.sort(key=lambda entry: [places[item] for item in entry[1]])
    found.append(("yardstick", (sc.LowBitWeights(bits=4, only=declared[-1].only),)))
    return [(role, sc.Pipeline(*order)) for role, order in found]


def run(
    source: Path,
    passes: Sequence[Pass],
    task: "Task",
    rows: Rows,
    *,
    out: Path,
    measuring: "Measuring",
    seed: int = 0,
    again: bool = False,
) -> None:
    """Add the rows that are missing. The folder `out` serves all pipelines in turn: what they share is made once."""
    manager = sc.PassManager(out=out, task=task, tokenizer=source, seed=seed, measuring=measuring)
    for role, pipeline in pipelines(passes, source):
        key = " -> ".join(map(repr, pipeline))
        if not again and rows.has(key, seed=seed, task=task.name):
            command.say(f"there already: {key}")
            continue
        command.say(f"running ({role}) {key}")
        ledger = manager.run(source, pipeline, resume=True).ledger
        rows.add(
            {"key": key, "role": role, "task": task.name, **stamp(pipeline, seed), "ledger": ledger.to_json()}
        )
        command.say(f"{ledger}\n")


def main() -> int:
    """Run the study."""
    parser = command.parser("quickstart", __doc__ or "")
    options = parser.parse_args()
    from stackcomp.manager import Measuring

    names: dict[str, Any] = command.pipeline_file("quickstart")
    with command.study("quickstart", options) as rows:
        run(
            names["model"](),
            names["pipeline"].flat(),
            names["task"],
            rows,
            out=options.out / "run",
            measuring=Measuring(),
            seed=options.seed,
            again=options.again,
        )
        shutil.rmtree(options.out / "run", ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
