"""How fast models compute in the form in which they are stored, and unpacked: milliseconds of a batch beside the dense model in float32.

Forms: "stored", as `stackcomp.load` gives it; "unpacked", decoded once (`stackcomp.unpack`); "factors", the same with products left as
they are where they are cheaper. Each in float32 and cast to bfloat16, on a batch of 8 x 128 random tokens and on one text of 16. Dense
model and form take turns in one process; all-MiniLM-L6-v2, one thread. How well a model does is not looked at here: passes run without
calibration.
"""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import stackcomp as sc
from benchmarks import command
from stackcomp.studies.rows import Rows, stamp

LAYERS = "encoder.layer.*"
BATCHES = ((8, 128), (1, 16))  # texts, and tokens of each
REPEATS = 15
FORMS = ("stored", "unpacked", "factors")
DTYPES = ("float32", "bfloat16")


def pipelines() -> Iterator[tuple[str, sc.Pipeline]]:
    """What is timed, by name."""
    dense_sparse = sc.DenseSparse(ratio=2.8, only=LAYERS, data_aware=False, sweeps=1)
    low_rank = sc.LowRank(ratio=2.8, only=LAYERS, data_aware=False)
    four = sc.LowBitWeights(bits=4, only=LAYERS)
    yield "dense", sc.Pipeline()
    yield "dense-sparse, 2.8x", sc.Pipeline(dense_sparse)
    yield "low rank, 2.8x", sc.Pipeline(low_rank)
    yield "2:4 sparsity", sc.Pipeline(sc.MagnitudePrune(sparsity="2:4", only=LAYERS))
    yield "int8 weights", sc.Pipeline(sc.Int8Weights(only=LAYERS))
    yield "int8 dynamic", sc.Pipeline(sc.Int8Dynamic(only=LAYERS))
    yield "4 bits", sc.Pipeline(four)
    yield "dense-sparse, 2.8x > 4 bits", sc.Pipeline(dense_sparse, four)
    yield "low rank, 2.8x > 4 bits", sc.Pipeline(low_rank, four)
    yield "3 of 6 layers > 4 bits", sc.Pipeline(sc.DropLayers(keep=3), four)


def run(model: Path | str, rows: Rows, *, out: Path, seed: int = 0, again: bool = False) -> None:
    """Add the rows that are missing."""
    from transformers import AutoModel

    dense = AutoModel.from_pretrained(model).eval()
    for name, pipeline in pipelines():
        if not again and rows.has(name, declaration=repr(pipeline), seed=seed, **_asked()):
            command.say(f"there already: {name}")
            continue
        found = timed(pipeline, dense, out / "run", seed)
        rows.add({"key": name, **found, **stamp(pipeline, seed)})
        for took in found["timings"]:
            forms = ", ".join(f"{form} {ratio:.2f}x" for form, ratio in took["ratios"].items())
            command.say(f"{name}, {took['batch']} x {took['length']}: {forms}")


def timed(pipeline: sc.Pipeline, dense: Any, out: Path, seed: int) -> dict[str, Any]:
    """The ratio of every form to the dense model, by form and dtype, for every batch, and the bytes of the file."""
    import shutil

    import torch

    from stackcomp import metrics, nn
    from stackcomp.manager import Measuring

    model, size = dense, sum(part.numel() * part.element_size() for part in dense.state_dict().values())
    if len(pipeline):
        shutil.rmtree(out, ignore_errors=True)
        manager = sc.PassManager(out=out, seed=seed, measuring=Measuring(latency=False))
        result = manager.run(copy.deepcopy(dense), pipeline)
        model, size = result.model, result.ledger.rows[-1].size_bytes
    timings: list[dict[str, Any]] = [
        {"batch": batch, "length": length, "ratios": {}} for batch, length in BATCHES
    ]
    for form in FORMS if len(pipeline) else FORMS[:1]:
        made = copy.deepcopy(model)
        if form != "stored":
            nn.unpack(made, factors=form == "factors")
        for dtype in DTYPES:
            made.to(getattr(torch, dtype))
            for timing in timings:
                inputs = metrics.latency_inputs(
                    dense, batch=timing["batch"], length=timing["length"], seed=seed
                )
                took = metrics.latency(made, dense, inputs, repeats=REPEATS)
                timing["ratios"][f"{form}, {dtype}"] = took.ratio
                timing.setdefault("dense_ms", took.baseline_ms)
    return {"timings": timings, "size_bytes": size, **_asked()}


def _asked() -> dict[str, Any]:
    """What is timed of every pipeline."""
    return {"batches": [list(batch) for batch in BATCHES], "repeats": REPEATS}


def main() -> int:
    """Run the study."""
    options = command.parser("speed", __doc__ or "").parse_args()
    with command.study("speed", options) as rows:
        run(command.packaged_model(), rows, out=options.out, seed=options.seed, again=options.again)
    return 0


if __name__ == "__main__":
    sys.exit(main())
