"""What a model takes: bytes of its file by tensor, time and memory. Units are in the names."""

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from torch import nn

from stackcomp.core.errors import SettingError
from stackcomp.core.headers import read_header
from stackcomp.nn import evaluating

HEADER = "(header)"


def bytes_of_file(path: Path | str) -> dict[str, int]:
    """Bytes of each tensor of a safetensors file, by name, and of its header under "(header)"; they sum to the file's length.

    Reads the header only. Raises `CheckpointError` for a file that is cut short or none of the format.
    """
    header, header_bytes = read_header(Path(path))
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    return {HEADER: header_bytes} | {name: end - start for name, (start, end) in spans.items()}


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Median time of a forward pass beside a baseline measured in the same process; ratio = ms /
    baseline_ms, below 1 is faster."""

    ms: float
    baseline_ms: float
    ratio: float
    repeats: int
    threads: int
    batch: int
    length: int
    dtype: str
    device: str


def latency(
    model: nn.Module,
    baseline: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    *,
    repeats: int = 30,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Latency:
    """Time both models in turn on the same inputs, in eval mode without gradients, and compare.

    ratio is the median of the ratios of neighbouring runs, so a machine that slows down half way does not
    tilt it. inputs: what the models are called with, input_ids (batch x length) among them.
    """
    if repeats < 1:
        raise SettingError(f"latency: repeats={repeats} must be at least 1")
    device = next(model.parameters()).device
    times: dict[bool, list[float]] = {False: [], True: []}
    with evaluating(model, baseline), torch.inference_mode():
        for turn, ours in itertools.product(range(-warmup, repeats), (True, False)):
            _wait(device)
            start = clock()
            (model if ours else baseline)(**inputs)
            _wait(device)
            if turn >= 0:
                times[ours].append(1000 * (clock() - start))
    batch, length = inputs["input_ids"].shape
    return Latency(
        ms=statistics.median(times[True]),
        baseline_ms=statistics.median(times[False]),
        ratio=statistics.median(a / b for a, b in zip(times[True], times[False], strict=True)),
        repeats=repeats,
        threads=torch.get_num_threads(),
        batch=batch,
        length=length,
        dtype=_dtype(model),
        device=str(device),
    )


def latency_inputs(model: nn.Module, *, batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids (batch x length) that the model can read, nothing padded; shorter where the model has fewer positions."""
    config: Any = model.config
    places = getattr(config, "max_position_embeddings", None) or -1  # XLNet says -1: no limit
    length = min(length, places - 2) if places > 0 else length  # RoBERTa counts positions from 2
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (batch, length), generator=generator)
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _dtype(model: nn.Module) -> str:
    return str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")


class PeakMemory:
    """`with PeakMemory() as memory: ...`, then `memory.peak_bytes`: the most resident memory inside.

    On Linux the kernel's own high-water mark is reset and read, which misses nothing; where that is
    refused, a thread samples every 10 ms, which can miss short peaks. start_bytes: resident memory on
    entry. exact: which of the two it was.
    """

    def __init__(self) -> None:
        self.start_bytes = 0
        self.peak_bytes = 0
        self.exact = False

    def __enter__(self) -> "PeakMemory":
        self._process = psutil.Process()
        self.start_bytes = self.peak_bytes = self._process.memory_info().rss
        self.exact = _reset_high_water_mark()
        if not self.exact:
            self._done = threading.Event()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.exact:
            self.peak_bytes = max(self.peak_bytes, _high_water_mark_bytes())
        else:
            self._done.set()
            self._thread.join()
            self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)

    def _sample(self) -> None:
        while not self._done.wait(0.01):
            self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water_mark_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
