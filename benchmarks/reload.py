"""Does a checkpoint reload as what was saved? Every registered pass alone, and the quickstart's stack.

Logits are taken in the process that made the model, before it is written, and again in a new process, by
`stackcomp.load` and by `AutoModelForSequenceClassification.from_pretrained` after `import stackcomp`; they must be equal
bit by bit. The length of the file on disk must be the sum of the ledger's components and of the file's own tensors.
The model is all-MiniLM-L6-v2 cut to two layers; passes take three steps of training and 64 texts of
calibration.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import stackcomp as sc
from benchmarks import command, small
from stackcomp.core.passes import Findings, Pass
from stackcomp.passes import registered
from stackcomp.studies.rows import Rows, stamp

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stackcomp.core.context import Context
    from stackcomp.core.plan import Plan, PlannedWeight

SHORT = {"steps": 3, "batch_size": 8, "limit": 64, "samples": 64, "sweeps": 1}


@dataclass(frozen=True, kw_only=True, repr=False)
class Recorded(Pass):
    """Another pass, after which the logits of the model in memory are written to `logits`."""

    inner: Pass = field(default_factory=sc.Int8Weights)
    batch: str = ""
    logits: str = ""

    paper: ClassVar[str] = "none"

    @property
    def contract(self) -> sc.Contract:
        return self.inner.contract

    def selected(self, plan: "Plan") -> tuple[str, ...]:
        return self.inner.selected(plan)

    def reshape(self, plan: "Plan") -> "Plan":
        return self.inner.reshape(plan)

    def examine(self, weights: "Sequence[PlannedWeight]") -> None:
        self.inner.examine(weights)

    def apply(self, model: "PreTrainedModel", context: "Context") -> Findings:
        import torch

        findings = self.inner.apply(model, context)
        torch.save(logits_of(model, torch.load(self.batch)), self.logits)
        return findings


def logits_of(model: Any, batch: Any) -> "torch.Tensor":
    """The model's answers, dropout off."""
    import torch

    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def pipelines() -> Iterator[tuple[str, sc.Pipeline]]:
    """(name, pipeline): every registered pass alone, then the quickstart's stack, all shortened."""
    for name, cls in registered().items():
        yield name, sc.Pipeline(shortened(cls()))
    yield "quickstart", sc.Pipeline(*map(shortened, command.pipeline_file("quickstart")["pipeline"]))


def shortened(item: Pass) -> Pass:
    """The same pass with little training, calibration and refinement, where it has such settings."""
    known = {entry.name for entry in fields(item)}
    return replace(item, **{name: value for name, value in SHORT.items() if name in known})


def run(model: Path, task: Any, rows: Rows, *, out: Path, seed: int = 0, again: bool = False) -> int:
    """Add the rows that are missing; returns how many rows say that something differs."""
    out.mkdir(parents=True, exist_ok=True)
    for name, pipeline in pipelines():
        if not again and rows.has(name, declaration=repr(pipeline), seed=seed):
            command.say(f"there already: {name}")
            continue
        row = judge(name, pipeline, model, task, out / name, seed)
        rows.add(row)
        said = "same bits, same bytes" if fine(row) else "DIFFERS"
        command.say(f"{name}: {said} ({row['file_bytes']} bytes)")
    return sum(not fine(row) for row in rows.read())


def fine(row: Any) -> bool:
    """Whether every comparison of a row held."""
    sizes = {row["file_bytes"], row["ledger_bytes"], row["component_bytes"], row["tensor_bytes"]}
    return row["load_identical"] and row["auto_identical"] and len(sizes) == 1


def judge(name: str, pipeline: sc.Pipeline, model: Path, task: Any, out: Path, seed: int) -> dict[str, Any]:
    """Run one pipeline in `out` and compare what it made with what a new process loads."""
    import torch

    from stackcomp.manager import Measuring
    from stackcomp.metrics import bytes_of_file

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    torch.save(small.batch(model), out / "batch.pt")
    *first, last = pipeline.flat()
    recorded = Recorded(
        inner=last,
        batch=str(out / "batch.pt"),
        logits=str(out / "logits.pt"),
        only=last.only,
        skip=last.skip,
    )
    manager = sc.PassManager(
        out=out / "run",
        task=task,
        tokenizer=model,
        seed=seed,
        measuring=Measuring(latency=False, limit=32),
    )
    ledger = manager.run(model, sc.Pipeline(*first, recorded)).ledger
    subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "benchmarks.reloaded",
            *map(str, (out / "run", out / "batch.pt", out)),
        ],
        check=True,
        cwd=command.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    made = torch.load(out / "logits.pt")
    file, row = out / "run" / "model.safetensors", ledger.rows[-1]
    found = {
        "load_identical": torch.equal(made, torch.load(out / "load.pt")),
        "auto_identical": torch.equal(made, torch.load(out / "auto.pt")),
        "file_bytes": file.stat().st_size,
        "ledger_bytes": row.size_bytes,
        "component_bytes": sum(row.components.values()),
        "tensor_bytes": sum(bytes_of_file(file).values()),
        "components": dict(row.components),
        "dense_bytes": ledger.rows[0].size_bytes,
        "layers": small.LAYERS,
    }
    shutil.rmtree(out)
    return {"key": name, **found, **stamp(pipeline, seed)}


def main() -> int:
    """Run the study; 1 when something differs."""
    options = command.parser("reload", __doc__ or "").parse_args()
    with command.study("reload", options) as rows:
        model = small.classifier(options.out / "model", options.seed)
        bad = run(model, small.task(), rows, out=options.out / "runs", seed=options.seed, again=options.again)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
