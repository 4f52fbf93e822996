import errno
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from stackcomp.core.errors import OutputInUse
from stackcomp.core.files import disk_is_full, locked, remove_partial, whole_folder, write_atomic


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_is_whole_or_absent(tmp_path):

    def stopped():
        with whole_folder(tmp_path / "result") as partial:
            (partial / "file").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "result") as partial:
        (partial / "file").write_text("whole")
    assert (tmp_path / "result" / "file").read_text() == "whole"
    with pytest.raises(OutputInUse, match="another folder"), whole_folder(tmp_path / "result"):
        pass


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".partial-1-step").mkdir()
    (tmp_path / ".partial-2-file").write_text("")
    (tmp_path / "kept").write_text("")
    remove_partial(tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["kept"]


def test_a_lock_is_refused_to_others_and_dies_with_its_process(tmp_path):
    code = f"import stackcomp.core.files as f, pathlib, os\nwith f.locked(pathlib.Path({str(tmp_path)!r})): os._exit(9)"
    with locked(tmp_path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "OutputInUse" in other.stderr
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    with locked(tmp_path):
        assert (tmp_path / ".lock").exists()


def test_a_folder_that_was_removed_while_others_waited_for_it_is_made_again(tmp_path):
    def write():
        with locked(tmp_path / "step", wait=True):
            (tmp_path / "step" / "file").write_text("")
            with pytest.raises(OutputInUse), locked(tmp_path / "step"):
                pass

    other = threading.Thread(target=write)
    with locked(tmp_path / "step"):
        other.start()
        time.sleep(0.2)
        shutil.rmtree(tmp_path / "step")
    other.join()
    assert (tmp_path / "step" / "file").is_file()


def test_a_full_disk_is_known_in_whatever_words_it_is_told():
    def raised(error, cause=None):
        try:
            raise error from cause
        except type(error) as found:
            return found

    full = OSError(errno.ENOSPC, "anything")
    told = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    for error in (full, OSError(errno.EDQUOT, "anything"), told, raised(ValueError("no luck"), full)):
        assert disk_is_full(error)
    assert not disk_is_full(OSError(errno.EACCES, "Permission denied"))
    assert not disk_is_full(raised(RuntimeError("no luck"), ValueError("no space in a key")))
