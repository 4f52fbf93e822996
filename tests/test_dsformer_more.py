"""The smaller studies of DSFormer: what their grids and sentences say."""

import pytest

from benchmarks import dsformer_more

MADE = {
    "machine": {"processor": "any", "threads": 1},
    "versions": {"torch": "2", "transformers": "5"},
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
        "difference_noise": 0.3,
        "layer_compression": layers,
        "compression": 1.5,
        "steps": [{"score": 38.0, "noise": 2.0}],
        **MADE,
    }


FEW = [
    {**row("dense", 88.0, task="stsb", ratio=1.0), "layer_compression": None},
    row("rounded", 70.0, task="stsb", bits=2.0),
    row("rounded, trained", 80.0, task="stsb", bits=2.0),
    row("STF, int4", 82.0, task="stsb", bits=2.0),
    row("low rank, int4", 83.0, 16.5, task="stsb", bits=2.0),
    row("binary, trained", 75.0, 21.0, task="stsb", bits=1.5),
    row("dense-sparse, int8", 75.3, 21.0, task="stsb", bits=1.5),
    row("ternary", 60.0, 12.8, task="stsb", bits=2.5),
]


def test_each_budget_names_its_best_and_says_whether_dense_sparse_beats_rounding():
    text = dsformer_more.low_bit(FEW)
    assert "### STS-B, dense 88.00" in text
    assert "| method | 2.5 bits | 2 bits | 1.5 bits |" in text
    assert "| low rank, int4 | - | **83.00 (1.94)** | - |" in text
    assert "- 2 bits: STF, int4 minus rounded, trained +2.00 ± 0.42: dense-sparse wins." in text
    assert "- 1.5 bits: dense-sparse, int8 minus binary, trained +0.30 ± 0.42: within the noise." in text
    assert "- 2.5 bits:" not in text  # nothing to compare yet


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


def test_a_decoder_has_a_column_a_ratio_and_the_dense_model_beside_it():
    rows = [row("dense-sparse", 70.0, ratio=1.5), row("low rank", 238.0, ratio=1.5)]
    text = dsformer_more.decoder([*rows, row("low rank", 90.0, ratio=1.25)])
    assert "| method | layers 1.25x | layers 1.5x |" in text
    assert "| dense-sparse | - | 70.00 ± 0.50 |" in text
    assert "The dense model: 38.00 ± 2.00. The whole file becomes 1.50x at 1.5x." in text


@pytest.mark.parametrize("name", ["low_bit", "options", "decoder"])
def test_without_finished_rows_the_command_is_named_which_exists(name):
    failed = {**row("every=4", 1.0, task="stsb", ratio=3.57, bits=2.0), "error": {"type": "any"}}
    for rows in ([], [failed]):
        text = getattr(dsformer_more, name)(rows)
        assert text == f"Not run yet: `stackcomp study pipelines/dsformer/{name}.py` makes the rows."
