"""Allocation: optimal against brute force, within the budget, honest about what cannot be reached; sizes as they are stored."""

import ctypes
from itertools import product

import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from stackcomp.core.errors import UnreachableRatio
from stackcomp.core.matrices import Fixed
from stackcomp.ops.allocate import (
    Candidate,
    allocate,
    dense_sparse_bytes,
    low_rank_bytes,
    most_nonzeros,
    shape_of_size,
)

options = st.lists(st.tuples(st.integers(1, 50), st.floats(0, 10)), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(st.lists(options, min_size=1, max_size=4), st.integers(1, 200))
def test_the_allocation_is_optimal(layers: list[list[tuple[int, float]]], budget: int):
    candidates = {
        str(name): [
            Candidate(size_bytes=size, error=error, choice=index) for index, (size, error) in enumerate(layer)
        ]
        for name, layer in enumerate(layers)
    }
    allowed = [
        sum(option.error for option in taken)
        for taken in product(*candidates.values())
        if sum(option.size_bytes for option in taken) <= budget
    ]
    if not allowed:
        with pytest.raises(UnreachableRatio, match=f"budget is {budget}"):
            allocate(candidates, budget)
        return
    taken = allocate(candidates, budget)
    assert taken.keys() == candidates.keys()
    assert all(option in candidates[name] for name, option in taken.items())
    assert sum(option.size_bytes for option in taken.values()) <= budget
    assert sum(option.error for option in taken.values()) <= min(allowed) * 1.0001 + 1e-4


def test_bytes_go_where_they_matter():
    def curve(scale: float) -> list[Candidate]:
        return [Candidate(size_bytes=size, error=scale * (10 - size), choice=size) for size in range(1, 11)]

    taken = allocate({"dull": curve(1), "keen": curve(3)}, 11)
    assert (taken["dull"].choice, taken["keen"].choice) == (1, 10)


def test_what_the_solver_prints_on_its_own_is_not_seen(monkeypatch, capfd):
    puts, solve = ctypes.CDLL(None).puts, scipy.optimize.milp

    def talkative(*given, **settings):
        puts(b"a stray line")  # in a buffer that Python does not know
        return solve(*given, **settings)

    monkeypatch.setattr(scipy.optimize, "milp", talkative)
    puts(b"before, compiled")
    print("before")
    allocate({"layer": [Candidate(size_bytes=1, error=0.0, choice=None)]}, 1)
    print("after")
    ctypes.CDLL(None).fflush(None)
    assert sorted(capfd.readouterr().out.splitlines()) == ["after", "before", "before, compiled"]


def test_dense_sparse_bytes_are_those_of_the_parts():
    support = Fixed(block=32, nonzeros=8).support_bytes(100, 64)
    assert (
        dense_sparse_bytes(100, 20, atoms=32, nonzeros=8, blocks=2) == 4 * (32 * 20 + 100 * 2 * 8) + support
    )
    assert dense_sparse_bytes(100, 20, atoms=8, nonzeros=8) == low_rank_bytes(100, 20, 8) == 4 * 8 * 120


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.integers(0, 9000))
def test_most_nonzeros_is_the_most(rows: int, columns: int, atoms: int, blocks: int, size_bytes: int):
    fitting = [
        nonzeros
        for nonzeros in range(1, atoms + 1)
        if dense_sparse_bytes(rows, columns, atoms=atoms, nonzeros=nonzeros, blocks=blocks) <= size_bytes
    ]
    found = most_nonzeros(rows, columns, atoms=atoms, size_bytes=size_bytes, blocks=blocks)
    assert found == max(fitting, default=0)


@pytest.mark.parametrize("density", [0.22, 0.4])
@pytest.mark.parametrize("value_bytes", [4, 0.575])
@pytest.mark.parametrize(("rows", "columns", "blocks"), [(1536, 384, 1), (384, 384, 4)])
def test_a_shape_fills_its_size_at_its_density(
    rows: int, columns: int, blocks: int, value_bytes: float, density: float
):
    for ratio in (1.5, 2.0, 2.8, 5.0):
        size = value_bytes * rows * columns / ratio
        atoms, nonzeros = shape_of_size(
            rows, columns, size_bytes=size, density=density, blocks=blocks, value_bytes=value_bytes
        )
        shape = {"atoms": atoms, "blocks": blocks, "value_bytes": value_bytes}
        assert dense_sparse_bytes(rows, columns, nonzeros=nonzeros, **shape) <= size
        assert dense_sparse_bytes(rows, columns, nonzeros=nonzeros + 1, **shape) > size
        share = atoms * blocks / columns
        if ratio >= 2.8:
            assert share < 0.8
            assert nonzeros / atoms == pytest.approx(density, abs=1 / atoms + 0.01)
        assert share <= 0.81


def test_what_is_too_small_for_a_shape_has_no_nonzeros():
    assert shape_of_size(64, 64, size_bytes=100, density=0.22)[1] == 0
