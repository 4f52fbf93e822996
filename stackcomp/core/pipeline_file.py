"""Pipeline files: Python that defines what a command is to run, as `pipeline`, `model`, `task`, `study` or `search`."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from stackcomp.core.errors import PipelineFileError, StackcompError


def read_file(path: Path) -> dict[str, Any]:
    """The names a pipeline file defines; it may import files beside it, as a script may. Raises PipelineFileError when it is missing
    or raises."""
    if not path.is_file():
        raise PipelineFileError(f"{path} is no file: give a Python file that defines `pipeline`")
    try:
        spec = importlib.util.spec_from_file_location(f"stackcomp_file_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise PipelineFileError(f"{path} is no Python file: its name must end in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where a pass that the file defines is looked up
        folder = str(path.resolve().parent)
        if folder not in sys.path:
            sys.path.insert(0, folder)
        spec.loader.exec_module(module)
        return vars(module)
    except StackcompError:
        raise
    except (Exception, SystemExit) as error:
        line = _line_in(path, error)
        raise PipelineFileError(
            f"{path}{line}: {type(error).__name__}: {error}; mend the file, then try again"
        ) from error


def _line_in(path: Path, error: BaseException) -> str:
    """`, line N` of the last frame of `error` that is in `path`."""
    trace, found = error.__traceback__, error.lineno if isinstance(error, SyntaxError) else None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            found = trace.tb_lineno
        trace = trace.tb_next
    return f", line {found}" if found else ""
