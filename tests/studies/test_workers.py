"""A study shared between processes, and between the nodes of a Ray cluster, some of which die."""

import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import psutil
import pytest

from stackcomp.cli import main
from stackcomp.studies import Rows
from tests.studies.counted import applied

FILE = """
import stackcomp as sc
from tests.studies.counted import *

tuned = entry("tuned", {folder!r}, Train(steps=2, batch_size=4))
several = [entry(f"pruned/{{share}}", tuned, Prune(sparsity=share)) for share in (0.25, 0.5, 0.75)]
study = sc.Study(name="toy", entries=(tuned, *several, entry("broken", tuned, Broken())))
"""
KEYS = {"tuned", "pruned/0.25", "pruned/0.5", "pruned/0.75", "broken"}


@pytest.fixture
def command(folder, tmp_path, monkeypatch):
    """The arguments that run a study of five entries, one of which fails, slowly."""
    monkeypatch.setenv("SECONDS_MORE", "1")
    (tmp_path / "mine.py").write_text(FILE.format(folder=str(folder)))
    places = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    return ["study", str(tmp_path / "mine.py"), *places]


def rows(tmp_path):
    """The rows by key."""
    return {row["key"]: row for row in Rows(name="toy", folder=tmp_path / "results").read()}


@contextmanager
def started(command):
    """The command as a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "stackcomp.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(what, seconds=60.0):
    """Wait until `what()` holds."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.05)


def workers(process):
    """The processes that a running command has started, without Python's own helpers."""
    return [one for one in psutil.Process(process.pid).children() if "spawn_main" in " ".join(one.cmdline())]


def test_workers_share_the_entries_and_one_that_is_killed_takes_nothing_with_it(command, tmp_path):
    with started([*command, "--workers", "2", "--threads", "1"]) as process:
        until(lambda: "Prune" in applied())
        first, _ = workers(process)
        first.kill()
        said = process.communicate(timeout=120)[0]
    assert process.returncode == 1, said  # "broken" failed
    assert "was killed (signal 9)" in said
    assert said.count("RuntimeError: no luck") == 1  # the other worker took it from the row
    found = rows(tmp_path)
    assert found.keys() == KEYS
    assert [key for key, row in found.items() if "error" in row] == ["broken"]
    assert applied().count("Train") == 1
    assert applied().count("Prune") in (3, 4)  # one may have been under way in the worker that died
    assert found["tuned"]["machine"]["threads"] == 1


def test_workers_end_with_the_command(command):
    with started([*command, "--workers", "2"]) as process:
        until(lambda: applied())
        crew = workers(process)
        process.kill()
        psutil.wait_procs(crew, timeout=30)
        assert len(crew) == 2
        assert not any(one.is_running() for one in crew)


def test_bad_input_ends_it_before_any_worker_starts(command, capsys):
    assert main([*command, "--workers", "0"]) == 2
    assert "workers=0 is out of range" in capsys.readouterr().err
    assert main([*command, "--workers", "2", "--only", "nothing"]) == 2
    assert "matches no entry" in capsys.readouterr().err
    assert applied() == []


def test_an_address_without_a_cluster_is_told(command, capsys, monkeypatch):
    ray = pytest.importorskip("ray")
    assert main([*command, "--ray", "nonsense"]) == 2
    assert "--ray nonsense reaches no Ray cluster" in capsys.readouterr().err

    def nobody(**settings):
        raise ConnectionError("could not find any running Ray instance")

    monkeypatch.setattr(ray, "init", nobody)
    assert main([*command, "--ray", "auto"]) == 2
    assert "--ray auto reaches no Ray cluster (could not find any" in capsys.readouterr().err
    assert applied() == []


def test_a_ray_cluster_shares_them_and_survives_the_loss_of_a_node(command, tmp_path):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)

    def lose_a_node():
        until(lambda: "Prune" in applied(), seconds=240)
        cluster.remove_node(node, allow_graceful=False)

    loss = threading.Thread(target=lose_a_node)
    try:
        loss.start()
        assert main([*command, "--ray", cluster.address]) == 1  # "broken" failed
    finally:
        loss.join()
        ray.shutdown()
        cluster.shutdown()
    found = rows(tmp_path)
    assert found.keys() == KEYS
    assert [key for key, row in found.items() if "error" in row] == ["broken"]
    assert applied().count("Train") == 1
    assert applied().count("Prune") in (3, 4)
