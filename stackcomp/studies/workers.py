"""A study run by several processes of this machine, or by the nodes of a Ray cluster.

Each worker walks the whole study. What is done stands in the rows and what is under way in the locks, so nothing is handed out, and a
worker that dies takes nothing with it: its lock is free at once, and whoever comes by goes on from its last finished pass.
"""

import multiprocessing
import os
import threading
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from stackcomp.core.errors import MissingNeed
from stackcomp.core.files import disk_is_full
from stackcomp.core.settings import whole
from stackcomp.studies.rows import Rows
from stackcomp.studies.runner import Runner, say
from stackcomp.studies.study import declared


@dataclass(frozen=True, kw_only=True)
class Crew:
    """The workers of one study.

    file: where it is declared; each worker reads it anew. runner: what a single process would go by. workers: how many, on Ray as many
    as the cluster has CPUs for unless said. threads: of each, on this machine its share of the cores unless said, on Ray 1.
    """

    file: Path
    runner: Runner
    workers: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "threads"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 1)

    def here(self) -> bool:
        """Run the study in processes of this machine; whether all entries went well. Raises what `Runner.go` raises before any work."""
        count = self.workers or 1
        self.runner.begin()
        threads = self.threads or max(1, (os.cpu_count() or 1) // count)
        spawn = multiprocessing.get_context("spawn")  # torch and forks do not mix
        crew = [
            spawn.Process(target=_work_here, args=(self._job(threads, count), f"worker {number}"))
            for number in range(1, count + 1)
        ]
        for process in crew:
            process.start()
        ends = [_ended(process) for process in crew]
        for number, code in enumerate(ends, 1):
            if code:
                how = f"was killed (signal {-code})" if code < 0 else f"ended with status {code}"
                self.runner.tell(f"worker {number} {how}")
        return self._went_well(alive=0 in ends)

    def on_ray(self, address: str) -> bool:
        """Run the study on the Ray cluster at `address`, whose nodes must see the study's file and folders at the same places; whether
        all entries went well. A worker whose node dies is started again elsewhere. Raises what `Runner.go` raises before any work, and
        MissingNeed without Ray or a cluster."""
        try:
            import ray
            from ray.exceptions import RayError
        except ImportError as error:
            raise MissingNeed(f"--ray {address} needs Ray: pip install 'stackcomp[ray]'") from error
        self.runner.begin()
        threads = self.threads or 1
        try:
            ray.init(address=address, ignore_reinit_error=True, log_to_driver=True)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise MissingNeed(
                f"--ray {address} reaches no Ray cluster ({error}): start one with `ray start --head`, or give --workers"
            ) from error
        count = self.workers or max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
        task: Any = ray.remote(num_cpus=threads, max_retries=-1)(_work)
        job = self._job(threads, count)
        waiting = [task.remote(job, f"worker {number}") for number in range(1, count + 1)]
        alive = False
        while waiting:
            (ended,), waiting = ray.wait(waiting)
            try:
                ray.get(ended)
                alive = True
            except RayError as error:
                self.runner.tell(f"a worker failed: {error}")
        return self._went_well(alive=alive)

    def _job(self, threads: int, workers: int) -> "Job":
        runner = self.runner
        return Job(
            file=self.file,
            out=runner.out.resolve(),
            results=runner.rows.folder.resolve(),
            only=runner.only,
            minutes=runner.minutes,
            threads=threads,
            workers=workers,
        )

    def _went_well(self, *, alive: bool) -> bool:
        runner = self.runner
        left = {entry.key for entry in runner.chosen()} - runner.finished().keys() - runner.failed()
        if left and not alive:
            runner.tell(
                f"no worker is left, and {len(left)} entries are not done: run the same command again"
            )
            return False
        return not runner.failed()


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is told; see `Runner` and `Crew`. Paths are absolute."""

    file: Path
    out: Path
    results: Path
    only: tuple[str, ...]
    minutes: float | None
    threads: int
    workers: int


def _work(job: Job, name: str) -> None:
    """Walk the study in this process."""
    import torch

    torch.set_num_threads(job.threads)
    study = declared(job.file)
    rows = Rows(name=study.name, folder=job.results)
    Runner(
        study=study,
        rows=rows,
        out=job.out,
        only=job.only,
        minutes=job.minutes,
        workers=job.workers,
        tell=lambda text: say(f"{name}: {text}"),
    ).walk()


def _work_here(job: Job, name: str) -> None:
    """`_work` as a process that ends with its parent, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    try:
        _work(job, name)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if not disk_is_full(error):
            raise
        say(f"{name}: the disk is full; nothing is half-written")
        raise SystemExit(1) from None


def _follow(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _ended(process: BaseProcess) -> int:
    process.join()
    assert process.exitcode is not None
    return process.exitcode
