"""The manifest of a checkpoint folder: every file with its length and SHA-256, so that a cut or altered one
is refused.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from stackcomp.core.errors import CheckpointError

NAME = "stackcomp.json"
FORMAT = 1


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(directory: Path, names: Iterable[str], version: str) -> dict[str, Any]:
    """The manifest of the files `names` in `directory`; `version` is that of stackcomp."""
    files = {name: directory / name for name in sorted(names)}
    return {
        "format": FORMAT,
        "stackcomp": version,
        "files": {
            name: {"bytes": path.stat().st_size, "sha256": digest(path)} for name, path in files.items()
        },
    }


def read(directory: Path) -> dict[str, Any]:
    """The manifest in `directory`. Raises CheckpointError when there is none, it is damaged, or its format is
    another.
    """
    path = directory / NAME
    try:
        manifest: Any = json.loads(path.read_text("utf8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{directory}: no {NAME}, so it is no checkpoint of stackcomp, or half of one"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error}); copy or save the checkpoint again") from error
    content = cast("dict[str, Any]", manifest) if isinstance(manifest, dict) else {}
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {content.get('format')!r}, this version reads {FORMAT}: install a newer stackcomp, "
            "or save it again"
        )
    files = content.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, cast("dict[str, Any]", files).values())):
        raise CheckpointError(
            f"{path}: damaged (what it lists are no files); copy or save the checkpoint again"
        )
    return content


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and {"bytes", "sha256"} <= cast("dict[str, Any]", entry).keys()


def check(directory: Path) -> None:
    """Compare every file that the manifest lists with it; raises CheckpointError at the first that differs."""
    for name, entry in read(directory)["files"].items():
        _compare(directory / name, entry)


def check_file(path: Path) -> None:
    """The same for one file of a folder, when the folder has a manifest; without one there is nothing to
    compare.
    """
    if (path.parent / NAME).is_file():
        files = read(path.parent)["files"]
        if path.name not in files:
            raise CheckpointError(
                f"{path}: not in {NAME} beside it; remove {NAME} when you changed the folder on purpose"
            )
        _compare(path, files[path.name])


def _compare(path: Path, entry: dict[str, Any]) -> None:
    way_out = f"copy or save it again, or remove {NAME} when you changed it on purpose"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, {NAME} lists it: {way_out}")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise CheckpointError(
            f"{path}: {size} bytes, {NAME} says {entry['bytes']}: cut short or altered; {way_out}"
        )
    if digest(path) != entry["sha256"]:
        raise CheckpointError(f"{path}: its checksum is not the one in {NAME}: altered; {way_out}")
