"""How a matrix is stored: its price, its facts, and settings that do not fit."""

import json
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackcomp.core.errors import SettingError
from stackcomp.core.facts import Fact
from stackcomp.core.matrices import CODEBOOKS, Dense, Fixed, Free, MatrixSpec, word_bits


@given(st.integers(1, 64), st.data())
def test_packed_supports_cost_about_the_logarithm_of_their_number(block, data):
    layout = Fixed(block=block, nonzeros=data.draw(st.integers(1, block)))
    rows, cols = data.draw(st.integers(1, 40)), block * data.draw(st.integers(1, 6))
    exact = rows * (cols // block) * math.log2(layout.choices) / 8
    words = math.ceil(rows * (cols // block) / layout.ranks_per_word)
    assert exact <= layout.support_bytes(rows, cols) + 1e-9
    assert layout.support_bytes(rows, cols) <= exact + words / 8 + 1


def test_known_prices():
    assert (
        Fixed(block=4, nonzeros=2).support_bytes(384, 384) * 8 / 384 / 384 < 0.66
    )  # log2(6) / 4 = 0.646 bits an entry
    assert Fixed(block=8, nonzeros=8).support_bytes(100, 8) == 0  # low rank has no index to store
    assert Free(nonzeros=5).support_bytes(3, 7) == 3
    assert word_bits(6, 1) == 3


def test_total_bytes_count_values_indices_and_scales():
    matrix = MatrixSpec(rows=10, cols=64, layout=Fixed(block=32, nonzeros=8), coding="int8")
    assert matrix.value_bytes == 10 * 2 * 8
    assert matrix.scale_count == 10
    assert matrix.total_bytes == matrix.value_bytes + matrix.index_bytes + 40


@pytest.mark.parametrize(
    ("layout", "count", "scales"),
    [
        (Dense(), 10 * 60, 10 * 2),  # a row of 60 is a group of 32 and one of 28
        (Fixed(block=20, nonzeros=3), 10 * 9, 10),
        (Free(nonzeros=100), 100, 4),  # groups run over all values
        (Free(nonzeros=0), 0, 0),
    ],
)
@pytest.mark.parametrize(
    ("coding", "bits"),
    [("int4", 4), ("int3", 3), ("int2", 2), ("nf4", 4), ("ternary", Fraction(8, 5)), ("binary", 1)],
)
def test_low_bit_values_are_counted_by_the_bit(layout, count, scales, coding, bits):
    matrix = MatrixSpec(rows=10, cols=60, layout=layout, coding=coding, group=32, scale_coding="float16")
    assert matrix.count == count
    assert matrix.value_bytes == math.ceil(count * bits / 8)
    assert matrix.values_shape == (matrix.value_bytes,)
    assert matrix.scale_count == scales
    assert matrix.total_bytes == matrix.value_bytes + matrix.index_bytes + 2 * scales
    assert Fact(coding) in matrix.facts
    assert not {Fact.FLOAT, Fact.TRAINABLE, Fact.INT8} & matrix.facts
    assert MatrixSpec.from_json(json.loads(json.dumps(matrix.to_json()))) == matrix


@pytest.mark.parametrize(
    ("layout", "count", "lines"),
    [(Dense(), 600, 10), (Fixed(block=20, nonzeros=3), 90, 10), (Free(nonzeros=7), 7, 1)],
)
@pytest.mark.parametrize(("bits", "coding"), CODEBOOKS.items())
@pytest.mark.parametrize("group", [None, 1])
def test_codes_and_codebooks_are_counted(layout, count, lines, bits, coding, group):
    matrix = MatrixSpec(rows=10, cols=60, layout=layout, coding=coding, group=group, scale_coding="float16")
    books = lines if group else 1
    assert matrix.values_shape == (matrix.value_bytes,) == (math.ceil(count * bits / 8),)
    assert (matrix.books, matrix.scale_count) == (books, books * 2**bits)
    assert matrix.total_bytes == matrix.value_bytes + matrix.index_bytes + 2 * books * 2**bits
    assert matrix.facts & {Fact.CODEBOOK, Fact.FLOAT, Fact.TRAINABLE} == {Fact.CODEBOOK}
    assert MatrixSpec.from_json(json.loads(json.dumps(matrix.to_json()))) == matrix


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coding": "codebook4", "group": 2}, "group=2"),
        ({"coding": "codebook8", "group": 0}, "group=0"),
        ({"coding": "codebook8", "dynamic": True}, "dynamic=True"),
        ({"coding": "int4"}, "group=None"),
        ({"coding": "int4", "group": 0}, "group=0"),
        ({"coding": "int4", "group": -8}, "group=-8"),
        ({"coding": "int8", "group": 32}, "group=32"),
        ({"coding": "int4", "group": 32, "dynamic": True}, "dynamic=True"),
    ],
)
def test_settings_of_a_coding_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        MatrixSpec(rows=2, cols=4, **settings)


def test_facts_follow_layout_and_coding():
    assert MatrixSpec(rows=2, cols=2).facts == {Fact.FLOAT, Fact.DENSE, Fact.TRAINABLE}
    assert MatrixSpec(rows=2, cols=4, layout=Free(nonzeros=2), coding="int8", dynamic=True).facts == {
        Fact.INT8,
        Fact.SPARSE,
        Fact.DYNAMIC,
    }


@pytest.mark.parametrize(("block", "nonzeros"), [(4, 5), (4, 0)])
def test_more_nonzeros_than_atoms_is_refused(block, nonzeros):
    with pytest.raises(SettingError, match=f"nonzeros={nonzeros}.*block={block}"):
        Fixed(block=block, nonzeros=nonzeros)


def test_a_block_that_does_not_divide_is_refused():
    with pytest.raises(SettingError, match="block=5 does not divide the 12 columns"):
        MatrixSpec(rows=2, cols=12, layout=Fixed(block=5, nonzeros=2))


def test_outliers_are_of_rounded_inputs_and_survive_json():
    with pytest.raises(SettingError, match=r"outliers=6\.0 does not fit dynamic=False"):
        MatrixSpec(rows=2, cols=3, coding="int8", outliers=6.0)
    matrix = MatrixSpec(rows=2, cols=3, coding="int8", dynamic=True, outliers=6.0)
    assert MatrixSpec.from_json(json.loads(json.dumps(matrix.to_json()))) == matrix
    assert "outliers" not in MatrixSpec(rows=2, cols=3, coding="int8", dynamic=True).to_json()
