"""Kill and resume: a real stack is killed by SIGKILL at random moments and resumed; the weights must be the same bytes.

An uninterrupted run comes first. Then, for each point, a new process runs the same stack from nothing, is killed at a
moment drawn from the time the uninterrupted run took once it wrote, and is started again until it ends.
The model is all-MiniLM-L6-v2 cut to two layers.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import stackcomp as sc
from benchmarks import command, small
from stackcomp.studies.rows import Rows, stamp

BLOCKS = "encoder.layer.*"
NARROW = "encoder.layer.0.attention"  # a few seconds of factorizing, so that kills fall into every pass
WEIGHTS = "model.safetensors"
WORK = "import sys; from benchmarks.kill import work; work(*sys.argv[1:])"


def stack() -> sc.Pipeline:
    """The stack that is killed: a factorization, training that saves every 3 of 20 steps, rounding."""
    return sc.Pipeline(
        sc.DenseSparse(ratio=2.0, only=NARROW, samples=64, sweeps=1),
        sc.Distill(steps=20, batch_size=4, limit=80, save_every=3),
        sc.Int8Weights(only=BLOCKS),
    )


def work(model: str, out: str, seed: str) -> None:
    """The process that is killed: run the stack, or go on with it."""
    from stackcomp.manager import Measuring

    manager = sc.PassManager(
        out=out,
        task=small.task(),
        tokenizer=model,
        seed=int(seed),
        measuring=Measuring(latency=False, limit=64),
    )
    manager.run(model, stack(), resume=True)


def start(model: Path, out: Path, seed: int) -> "subprocess.Popen[bytes]":
    """A new process that does `work`, with this process's number of threads."""
    import torch

    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with log(out).open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORK, str(model), str(out), str(seed)],
            cwd=command.ROOT,
            env={**os.environ, **threads},
            stdout=file,
            stderr=file,
        )


def log(out: Path) -> Path:
    """What the last process that worked in `out` printed."""
    return out.with_suffix(".log")


def until_it_writes(process: "subprocess.Popen[bytes]", out: Path) -> None:
    """Wait for the first file in `out`, or the process's end: what comes before is imports."""
    while not (out / "run.json").exists() and process.poll() is None:
        time.sleep(0.005)


def whole(model: Path, out: Path, seed: int) -> tuple[str, float]:
    """Digest of the weights of an uninterrupted run, and its seconds from the first write to the end."""
    shutil.rmtree(out, ignore_errors=True)
    process = start(model, out, seed)
    until_it_writes(process, out)
    began = time.perf_counter()
    if process.wait() != 0:
        end = log(out).read_text("utf8", errors="replace")[-2000:]
        raise RuntimeError(f"the uninterrupted run failed with status {process.returncode}: {end}")
    return digest(out), time.perf_counter() - began


def killed(model: Path, out: Path, seed: int, after_seconds: float) -> dict[str, Any]:
    """Kill one run so long after its first write, resume it until it ends; what was there when it died and what came
    out."""
    shutil.rmtree(out, ignore_errors=True)
    process = start(model, out, seed)
    until_it_writes(process, out)
    try:
        process.wait(timeout=after_seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    status = process.wait()
    there = sorted(path.name for path in (out / "steps").glob("[0-9]*")) if (out / "steps").is_dir() else []
    inside = sorted(path.name for path in (out / "scratch").glob("*/*")) if (out / "scratch").is_dir() else []
    resumed = start(model, out, seed).wait()
    return {
        "after_seconds": round(after_seconds, 3),
        "killed": status == -signal.SIGKILL,
        "last_step": there[-1] if there else "none",
        "under_way": inside,
        "resumed_status": resumed,
        "sha256": digest(out) if resumed == 0 else "none",
    }


def killed_early(
    model: Path, out: Path, seed: int, seconds: float, generator: random.Random
) -> dict[str, Any]:
    """`killed` at a moment of the given seconds; drawn again, earlier, where the run had ended by then: how long a run
    takes varies with what else the machine does."""
    found: dict[str, Any] = {"killed": False}
    while not found["killed"]:
        seconds = generator.uniform(0, seconds)
        found = killed(model, out, seed, seconds)
    return found


def digest(out: Path) -> str:
    """SHA-256 of the weights file."""
    return hashlib.sha256((out / WEIGHTS).read_bytes()).hexdigest()


def run(model: Path, rows: Rows, *, out: Path, points: int, seed: int = 0, again: bool = False) -> int:
    """Add the rows that are missing; returns how many points did not end in the same bytes.

    Points count only beside an uninterrupted run with the digest that they were compared with, so that run comes first
    each time.
    """
    command.say("the uninterrupted run")
    expected, seconds = whole(model, out / "whole", seed)
    common = stamp(stack(), seed)
    rows.add({"key": "whole", "sha256": expected, "seconds": seconds, "layers": small.LAYERS, **common})
    command.say(f"  {seconds:.1f} s, {expected[:12]}")
    bad = 0
    for point in range(points):
        key = f"point {point + 1}"
        if not again and rows.has(key, expected=expected, seed=seed, killed=True):
            command.say(f"there already: {key}")
        else:
            found = killed_early(model, out / "killed", seed, seconds, random.Random(1000 * seed + point))
            row = {
                "key": key,
                "expected": expected,
                "identical": found["sha256"] == expected,
                **found,
                **common,
            }
            rows.add(row)
            said = "same bytes" if row["identical"] else "DIFFERS"
            after = found["after_seconds"]
            command.say(f"{key}: killed after {after:.1f} s, last step {row['last_step']}: {said}")
        bad += not next(row["identical"] for row in rows.read() if row["key"] == key)
    return bad


def main() -> int:
    """Run the study; 1 when a resumed run ends in other bytes."""
    parser = command.parser("kill", __doc__ or "")
    parser.add_argument("--points", type=int, default=20, help="how many times to kill (default %(default)s)")
    options = parser.parse_args()
    with command.study("kill", options) as rows:
        model = small.classifier(options.out / "model", options.seed)
        bad = run(model, rows, out=options.out, points=options.points, seed=options.seed, again=options.again)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
