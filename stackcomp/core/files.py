"""Files that are whole or absent: temporary name, fsync, rename. A lock that dies with its process. And what a full disk looks like."""

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from stackcomp.core.errors import OutputInUse

_TEMPORARY = ".partial-"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader, or a crash at any moment, sees the old file or the new one."""
    partial = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}-{path.name}")
    try:
        with partial.open("w", encoding="utf8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def copy_atomic(source: Path, path: Path) -> None:
    """Copy `source` to `path` so that a reader, or a crash at any moment, sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}-{path.name}")
    try:
        shutil.copyfile(source, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def whole_folder(path: Path) -> Generator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends well, and is removed when it
    does not.

    Every file in it is fsynced before the rename. Raises OutputInUse when `path` exists and is not empty.
    """
    refuse_in_use(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}-{path.name}")
    partial.mkdir()
    try:
        yield partial
        for file in sorted(partial.rglob("*")):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        sync_folder(partial)
        if path.exists():
            path.rmdir()
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync_folder(path.parent)


def refuse_in_use(path: Path) -> None:
    """Raise OutputInUse when `path` is a file or a folder that is not empty."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise OutputInUse(f"{path} is in use: give another folder, or remove it")


def remove_partial(folder: Path) -> None:
    """Remove what a killed process left half-written in `folder`."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_is_full(error: BaseException) -> bool:
    """Whether this error, or one that it came of, says that there is no space left; libraries that write from other languages say so in
    their own words only."""
    line: BaseException | None = error
    while line is not None:
        known = isinstance(line, OSError) and line.errno in _FULL
        if known or any(os.strerror(number) in str(line) for number in _FULL):
            return True
        line = line.__cause__ or line.__context__
    return False


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Generator[None]:
    """Hold `folder` for this process; the system lets go when the process ends, however it ends. Whoever holds it may remove it.

    Raises OutputInUse when another process holds it, unless told to wait for its turn.
    """
    held = False
    while not held:
        with _opened(folder / ".lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError as error:
                raise OutputInUse(
                    f"{folder} is being written by another process: wait for it, or give another folder"
                ) from error
            held = os.fstat(file.fileno()).st_nlink > 0  # none once the folder was removed while we waited
            if held:
                yield


def _opened(path: Path) -> IO[str]:
    """`path` to write to, in its folder, which is made where it is not there."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another process has removed the folder in between
            return path.open("w")
