import json

import pytest

from stackcomp.core.errors import CheckpointError
from stackcomp.core.facts import Fact
from stackcomp.core.matrices import Dense, Fixed, MatrixSpec
from stackcomp.core.spec import WeightSpec

WEIGHT = WeightSpec(
    id="a.b",
    kind="linear",
    rows=6,
    cols=8,
    paths=("a.b", "a.c"),
    transposed=True,
    matrices={
        "basis": MatrixSpec(rows=4, cols=6, coding="bfloat16"),
        "coefficients": MatrixSpec(
            rows=8, cols=4, layout=Fixed(block=4, nonzeros=2), coding="int8", scale_axis=1
        ),
    },
)


def test_a_weight_reads_back_from_json():
    assert WeightSpec.from_json("a.b", json.loads(json.dumps(WEIGHT.to_json()))) == WEIGHT


@pytest.mark.parametrize(
    "harm",
    [{"matrices": {"weight": {"layout": {"kind": "odd"}}}}, {"shape": [3]}, {"kind": None, "paths": 3}],
)
def test_a_damaged_description_is_refused(harm):
    with pytest.raises(CheckpointError, match=r"a\.b"):
        WeightSpec.from_json("a.b", {**WEIGHT.to_json(), **harm})


TILED = WeightSpec(
    id="w", kind="linear", rows=6, cols=8, paths=("w",), matrices={"weight": MatrixSpec(rows=6, cols=8)}
).as_kronecker(terms=3, tile=(2, 4))


def test_a_sum_of_kronecker_products_is_three_rows_a_side():
    assert {part: (matrix.rows, matrix.cols) for part, matrix in TILED.matrices.items()} == {
        "basis": (3, 8),
        "coefficients": (3, 6),
    }
    assert TILED.total_bytes == 4 * 3 * (8 + 6)
    assert TILED.blocks == 1
    side = {Fact.FLOAT, Fact.DENSE, Fact.TRAINABLE, Fact.FACTOR, Fact.KRONECKER}
    assert TILED.parts() == {"basis": side, "coefficients": side}
    assert all(Fact.KRONECKER not in words for words in WEIGHT.parts().values())
    assert WeightSpec.from_json("w", json.loads(json.dumps(TILED.to_json()))) == TILED


def test_what_was_written_before_there_were_tiles_is_read():
    assert "tile" not in WEIGHT.to_json()
    assert WeightSpec.from_json("a.b", WEIGHT.to_json()).tile is None


@pytest.mark.parametrize("tile", [3, [3]])
def test_a_damaged_tile_is_refused(tile):
    with pytest.raises(CheckpointError, match="w: its description"):
        WeightSpec.from_json("w", {**TILED.to_json(), "tile": tile})


def test_layouts_of_a_dense_weight():
    dense = WeightSpec(
        id="w", kind="linear", rows=3, cols=5, paths=("w",), matrices={"weight": MatrixSpec(rows=3, cols=5)}
    )
    assert dense.total_bytes == 60
    assert dense.matrices["weight"].layout == Dense()
    assert not dense.factored


def test_what_was_written_before_there_were_groups_is_read():
    assert "group" not in WEIGHT.to_json()["matrices"]["basis"]
