"""The smaller studies of DSFormer: what their grids and sentences say."""

import pytest

from benchmarks import dsformer_more

MADE = {
    "machine": {"processor": "any", "threads": 1},
    "versions": {"stackcomp": "1", "torch": "2", "transformers": "5"},
    "date": "2026-11-22",
    "seed": 0,
}


def row(method, score, layers=16.0, **labels):
    """A finished row with a noise of half a point."""
    return {
        "key": f"{method}/{labels}",
        "labels": {"method": method, **labels},
        "score": score,
        "noise": 0.5,
        "difference": score - 88.0,
        "difference_noise": 0.3,
        "layer_compression": layers,
        "compression": 1.5,
        "steps": [{"score": 38.0, "noise": 2.0}],
        **MADE,
    }


def test_options_stand_beside_the_recipe_of_the_table():
    rows = [
        row("dense", 88.0, task="stsb", ratio=1.0),
        row("as in the table", 80.0, task="stsb", ratio=3.57),
        row("every=4", 80.5, task="stsb", ratio=3.57),
        row("every=4", 70.0, task="reviews", ratio=3.57),
    ]
    text = dsformer_more.options(rows)
    assert "| method | STS-B | Rotten Tomatoes |" in text
    assert "| as in the table | 80.00 ± 0.50 | - |" in text
    assert "| every=4 | 80.50 ± 0.50 (+0.50) | 70.00 ± 0.50 |" in text


def test_metrics_stand_beside_the_dense_model():
    rows = [
        row("dense", 88.0, ratio=1.0),
        row("low rank, weights", 70.0, ratio=5.0),
        row("low rank, weights", 80.0, ratio=3.57),
        row("STF, inputs", 87.0, ratio=5.0),
    ]
    text = dsformer_more.metrics(rows)
    assert "| method | encoder 3.57x | encoder 5x |" in text
    assert "| low rank, weights | 80.00 ± 0.50 (-8.00 ± 0.30) | 70.00 ± 0.50 (-18.00 ± 0.30) |" in text
    assert "| STF, inputs | - | 87.00 ± 0.50 (-1.00 ± 0.30) |" in text
    assert "The dense model: 88.00 ± 0.50" in text
    assert "| dense |" not in text
    assert dsformer_more.metrics(rows[:1]) == dsformer_more.metrics(rows[1:]) == dsformer_more.metrics([])


def test_a_decoder_has_a_column_a_ratio_and_the_dense_model_beside_it():
    rows = [row("dense-sparse", 70.0, ratio=1.5), row("low rank", 238.0, ratio=1.5)]
    text = dsformer_more.decoder([*rows, row("low rank", 90.0, ratio=1.25)])
    assert "| method | layers 1.25x | layers 1.5x |" in text
    assert "| dense-sparse | - | 70.00 ± 0.50 |" in text
    assert "The dense model: 38.00 ± 2.00. The whole file becomes 1.50x at 1.5x." in text


@pytest.mark.parametrize("name", ["options", "metrics", "decoder"])
def test_without_finished_rows_the_command_is_named_which_exists(name):
    failed = {**row("every=4", 1.0, task="stsb", ratio=3.57), "error": {"type": "any"}}
    for rows in ([], [failed]):
        text = getattr(dsformer_more, name)(rows)
        assert text == f"Not run yet: `stackcomp study pipelines/dsformer/{name}.py` makes the rows."
