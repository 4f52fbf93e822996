"""Costs: bytes that sum to the file, parameters once, times side by side, memory that was really used."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stackcomp.core.errors import CheckpointError, SettingError
from stackcomp.metrics import PeakMemory, bytes_of_file, cost, latency, latency_inputs


class Toy(nn.Module):
    """Called as a transformer is, and advances the test's own clock."""

    def __init__(self, seconds: float = 0.0, clock: list[float] | None = None) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 4, bias=False)
        self.seconds = seconds
        self.clock = [0.0] if clock is None else clock
        self.modes: list[bool] = []

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.clock[0] += self.seconds
        self.modes.append(self.training)
        return self.inner(input_ids.float())


def test_bytes_sum_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(
        {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.int8)}, path, metadata={"format": "pt"}
    )
    found = bytes_of_file(path)
    assert (found["a"], found["b"]) == (60, 7)
    assert sum(found.values()) == path.stat().st_size


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-3], "header says"),
        (lambda data: data + b"x", "header says"),
        (lambda data: data[:6], "cut short"),
        (lambda data: data[:20], "cut short"),
        (lambda data: data[:8] + b"!" + data[9:], "damaged safetensors header"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3, 5)}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        bytes_of_file(path)


@pytest.mark.parametrize(("places", "length"), [({}, 128), (-1, 128), (None, 128), (40, 38)])
def test_latency_is_taken_on_texts_that_the_model_has_places_for(places, length) -> None:
    model = torch.nn.Linear(2, 2)
    said = {} if places == {} else {"max_position_embeddings": places}
    model.config = SimpleNamespace(vocab_size=9, **said)
    assert latency_inputs(model, batch=2, length=128)["input_ids"].shape == (2, length)


def test_latency_is_interleaved_and_a_median() -> None:
    clock = [0.0]
    ours, baseline = Toy(0.002, clock).train(), Toy(0.008, clock)
    found = latency(
        ours, baseline, {"input_ids": torch.ones(2, 8)}, repeats=5, warmup=2, clock=lambda: clock[0]
    )
    assert found.ms == pytest.approx(2.0)
    assert found.baseline_ms == pytest.approx(8.0)
    assert found.ratio == pytest.approx(0.25)
    assert (found.batch, found.length, found.dtype, found.repeats) == (2, 8, "float32", 5)
    assert found.threads == torch.get_num_threads()
    assert len(ours.modes) == len(baseline.modes) == 7
    assert not any(ours.modes)
    assert ours.training
    with pytest.raises(SettingError, match="repeats=0"):
        latency(ours, baseline, {"input_ids": torch.ones(2, 8)}, repeats=0)


@pytest.mark.parametrize("refused", [False, True])
def test_peak_memory_sees_what_was_freed(monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    if refused:
        monkeypatch.setattr(cost, "_reset_high_water_mark", lambda: False)
    with PeakMemory() as memory:
        block = torch.ones(64 * 2**20 // 4)
        if refused:  # let the sampling thread see it
            memory._done.wait(0.1)
        del block
    assert memory.peak_bytes - memory.start_bytes > 50 * 2**20
    assert memory.peak_bytes - memory.start_bytes < 500 * 2**20
    with PeakMemory() as after:
        pass
    assert after.peak_bytes < memory.peak_bytes
