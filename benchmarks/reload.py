"""Does a checkpoint reload as what was saved? Every registered pass alone, and the quickstart's stack; with --decoder what usual passes and
factorizations make of SmolLM2-135M.

Logits, and what a decoder writes, are taken in the process that made the model, before it is saved, and again in a new process, by
`stackcomp.load` and by `from_pretrained` of the `AutoModel` after `import stackcomp`; they must be equal bit by bit. The length of the file
on disk must be the sum of the ledger's components and of the file's own tensors. The classifier is all-MiniLM-L6-v2 cut to two layers;
passes take three steps of training and 64 texts of calibration.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
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
TOKENS = 24  # that a decoder writes after each text


@dataclass(frozen=True, kw_only=True, repr=False)
class Recorded(Pass):
    """Another pass, after which the answers of the model in memory are written to `answers`."""

    inner: Pass = field(default_factory=sc.Int8Weights)
    batch: str = ""
    answers: str = ""

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
        torch.save(answers_of(model, torch.load(self.batch)), self.answers)
        return findings


def answers_of(model: Any, batch: Any) -> "list[torch.Tensor]":
    """The model's logits, dropout off, and the ids that it writes greedily where it can."""
    import torch

    model.eval()
    with torch.no_grad():
        found = [model(**batch).logits]
        if model.can_generate():
            settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
            found.append(model.generate(**batch, **settings))
    return found


def pipelines() -> Iterator[tuple[str, sc.Pipeline]]:
    """(name, pipeline): every registered pass alone, STF on the factors that it learns on, then the quickstart's stack, all shortened."""
    for name, cls in registered().items():
        first = [sc.DenseSparse()] if cls is sc.STF else []
        yield name, sc.Pipeline(*map(shortened, [*first, cls()]))
    yield "quickstart", sc.Pipeline(*map(shortened, command.pipeline_file("quickstart")["pipeline"]))


def decoder_pipelines() -> Iterator[tuple[str, sc.Pipeline]]:
    """The same of a decoder: those of its studies, factorizations at one ratio."""
    for study in ("studies/decoder_catalogue", "dsformer/decoder"):
        for entry in command.pipeline_file(study)["study"].entries:
            if entry.labels.get("ratio", 1.5) == 1.5:
                yield f"SmolLM2-135M: {entry.key}", sc.Pipeline(*map(shortened, entry.pipeline.flat()))


def shortened(item: Pass) -> Pass:
    """The same pass with little training, calibration and refinement, where it has such settings."""
    known = {entry.name for entry in fields(item)}
    return replace(item, **{name: value for name, value in SHORT.items() if name in known})


def run(
    model: Path,
    task: Any,
    rows: Rows,
    named: Iterable[tuple[str, sc.Pipeline]],
    *,
    out: Path,
    seed: int = 0,
    again: bool = False,
) -> int:
    """Add the rows of pipelines that are missing; returns how many rows say that something differs."""
    out.mkdir(parents=True, exist_ok=True)
    for name, pipeline in named:
        if not again and rows.has(name, declaration=repr(pipeline), seed=seed):
            command.say(f"there already: {name}")
            continue
        row = judge(name, pipeline, model, task, out / "run", seed)
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
        answers=str(out / "made.pt"),
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
    made, *again = (torch.load(out / f"{name}.pt") for name in ("made", "load", "auto"))
    same = [len(each) == len(made) and all(map(torch.equal, made, each)) for each in again]
    file, row = out / "run" / "model.safetensors", ledger.rows[-1]
    found = {
        "load_identical": same[0],
        "auto_identical": same[1],
        "written_tokens": TOKENS if len(made) > 1 else 0,
        "file_bytes": file.stat().st_size,
        "ledger_bytes": row.size_bytes,
        "component_bytes": sum(row.components.values()),
        "tensor_bytes": sum(bytes_of_file(file).values()),
        "components": dict(row.components),
        "dense_bytes": ledger.rows[0].size_bytes,
    }
    shutil.rmtree(out)
    return {"key": name, **found, **stamp(pipeline, seed)}


def main() -> int:
    """Run the study; 1 when something differs."""
    parser = command.parser("reload", __doc__ or "")
    parser.add_argument(
        "--decoder", action="store_true", help="SmolLM2-135M (extra `decoder`), and not the classifier"
    )
    options = parser.parse_args()
    with command.study("reload", options) as rows:
        if options.decoder:
            decoder = command.pipeline_file("studies/smollm2")
            model, task, named = Path(decoder["model"]()), decoder["task"], decoder_pipelines()
        else:
            model, task, named = (
                small.classifier(options.out / "model", options.seed),
                small.task(),
                pipelines(),
            )
        bad = run(model, task, rows, named, out=options.out, seed=options.seed, again=options.again)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
