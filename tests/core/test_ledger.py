import json
from dataclasses import replace

import pytest

from stackcomp.core import ledger
from stackcomp.core.errors import CheckpointError
from stackcomp.core.ledger import Ledger, Measured, Row


def row(step, size, layers):
    return Row(
        step=step,
        name="Int8Weights",
        declaration="Int8Weights()",
        fingerprint=f"f{step}",
        seed=0,
        seconds=1.5,
        peak_memory_bytes=10,
        components={"values": size - 8, "header": 8},
        layer_bytes=layers,
        measured=Measured(metric="accuracy", score=90.0, noise=1.0, difference=-0.5, difference_noise=0.4),
    )


FOUND = Ledger((row(0, 4000, 3000), row(1, 1000, 500)))


def test_compressions_are_of_the_whole_file_and_of_the_layers():
    assert FOUND.compression(FOUND.rows[1]) == 4.0
    assert FOUND.layer_compression(FOUND.rows[1]) == 6.0
    assert FOUND.layer_compression(row(1, 1000, 0)) is None


def test_it_reads_back_from_json():
    assert ledger.read(json.dumps(FOUND.to_json())) == FOUND


@pytest.mark.parametrize("harm", [{"format": 99}, {"rows": [{}]}, {"rows": 3}])
def test_damage_is_refused(harm):
    with pytest.raises(CheckpointError):
        ledger.read(json.dumps({**FOUND.to_json(), **harm}))


def test_an_altered_size_is_noticed():
    data = FOUND.to_json()
    data["rows"][1]["components"]["values"] += 1
    with pytest.raises(CheckpointError, match="row 1"):
        Ledger.from_json(data)


def test_a_row_replaces_what_stood_at_its_step_and_after():
    again = replace(FOUND.rows[0], seconds=9.0)
    assert FOUND.with_row(again).rows == (again,)
    assert len(FOUND.with_row(row(2, 500, 250)).rows) == 3


def test_the_error_of_outputs_has_a_column_where_it_was_measured():
    assert "output error" not in str(FOUND)
    second = FOUND.rows[1]
    told = FOUND.with_row(replace(second, measured=replace(second.measured, output_error=0.0123)))
    titles, rows = told.table()
    assert [cells[titles.index("output error")] for cells in rows] == ["-", "0.0123"]


def test_the_table_says_what_was_measured_and_nothing_more():
    text = str(FOUND)
    assert "4.00x" in text
    assert "90.00 ± 1.00" in text
    unscored = str(Ledger((replace(FOUND.rows[0], measured=Measured()),)))
    assert "90" not in unscored
    assert " - " in unscored


def test_layers_that_a_pass_left_dense_are_counted_below_the_table():
    layers = {"a": f"{ledger.LEFT_DENSE}: too small to gain", "b": "rank 3", "c": "rank 2"}
    text = str(Ledger((FOUND.rows[0], replace(FOUND.rows[1], findings={"layers": layers}))))
    assert text.splitlines()[-1].startswith("1 Int8Weights: 1 of 3 layers left dense, a first")
    assert "left dense" not in str(FOUND)
