"""A study killed by SIGKILL at random moments: started again after each, it must end with every row once and the same bytes in each.

An uninterrupted study comes first. Then the same study runs in new processes, each killed a random time after it began; where it ends
before all kills are spent, it starts from nothing. The model is all-MiniLM-L6-v2 cut to two layers.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import stackcomp as sc
from benchmarks import command, small
from stackcomp.studies import Runner
from stackcomp.studies.rows import Rows, stamp

LAYER = "encoder.layer.0"
BEGUN = "begun"
WORK = "import sys; from benchmarks.kill_study import work; work(*sys.argv[1:])"


def study(model: str | Path) -> sc.Study:
    """The study that is killed: three techniques that train nothing, in every legal order."""
    return sc.combinations(
        name="killed",
        model=str(model),
        task=small.task(),
        passes={
            "low rank": sc.LowRank(ratio=2.0, only=f"{LAYER}.attention", data_aware=False),
            "prune": sc.MagnitudePrune(only=f"{LAYER}.output"),
            "int8": sc.Int8Weights(only=LAYER),
        },
        limit=32,
    )


def work(model: str, out: str) -> None:
    """The process that is killed: run the study, or go on with it."""
    import transformers.trainer  # noqa: F401  # what takes long

    import stackcomp.manager  # noqa: F401

    runner = Runner(study=study(model), rows=Rows(name="killed", folder=Path(out)), out=Path(out) / "work")
    (Path(out) / BEGUN).touch()
    sys.exit(runner.go())


def start(model: Path, out: Path) -> "subprocess.Popen[bytes]":
    """A new process that does `work`, once it has begun: what comes before is imports."""
    out.mkdir(parents=True, exist_ok=True)
    (out / BEGUN).unlink(missing_ok=True)
    with (out / "log").open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORK, str(model), str(out)],
            cwd=command.ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=file,
        )
    while not (out / BEGUN).exists() and process.poll() is None:
        time.sleep(0.005)
    return process


def made(out: Path) -> Counter[tuple[str, str]]:
    """How often each key with the digest of its file stands in the rows of a study."""
    return Counter((row["key"], row["file_sha256"]) for row in Rows(name="killed", folder=out).read())


def whole(model: Path, out: Path) -> float:
    """Seconds of a study in the new folder `out` that nobody kills."""
    shutil.rmtree(out, ignore_errors=True)
    process = start(model, out)
    began = time.perf_counter()
    if process.wait() != 0:
        end = (out / "log").read_text("utf8", errors="replace")[-2000:]
        raise RuntimeError(f"the uninterrupted study failed with status {process.returncode}: {end}")
    return time.perf_counter() - began


def run(model: Path, rows: Rows, *, out: Path, kills: int, seed: int = 0) -> bool:
    """Add one row; returns whether every study that was killed ended as the uninterrupted one."""
    command.say("the uninterrupted study")
    seconds = whole(model, out / "whole")
    expected = made(out / "whole")
    command.say(f"  {seconds:.1f} s, {len(expected)} entries")
    generator, moments, ended = random.Random(seed), list[dict[str, Any]](), list[bool]()
    place = out / "killed"
    shutil.rmtree(place, ignore_errors=True)
    while len(moments) < kills or not ended or place.is_dir():
        after = generator.uniform(0, seconds / 2) if len(moments) < kills else None
        process = start(model, place)
        try:
            process.wait(timeout=after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            moments.append({"after_seconds": round(after or 0.0, 3), "rows": made(place).total()})
            command.say(f"  kill {len(moments)}: after {after:.1f} s, {moments[-1]['rows']} rows")
            continue
        ended.append(process.returncode == 0 and made(place) == expected)
        command.say(f"  ended {'the same' if ended[-1] else 'ANOTHER WAY'}")
        shutil.rmtree(place)
    rows.add(
        {
            "key": "study",
            "seconds": seconds,
            "entries": expected.total(),
            "moments": moments,
            "ended": len(ended),
            "identical": all(ended),
            "layers": small.LAYERS,
            **stamp(study(model).entries[-1].pipeline, seed),
        }
    )
    return all(ended)


def main() -> None:
    """Run the study; exit with 1 when a killed one ended another way."""
    parser = command.parser("kill_study", __doc__ or "")
    parser.add_argument("--kills", type=int, default=20, help="how many (default %(default)s)")
    options = parser.parse_args()
    with command.study("kill_study", options) as rows:
        if not options.again and rows.has("study", seed=options.seed):
            command.say("there already; --again makes it anew")
            return
        model = small.classifier(options.out / "model")
        same = run(model, rows, out=options.out, kills=options.kills, seed=options.seed)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
