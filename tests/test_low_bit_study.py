"""What a reader sees of the study in few bits, from rows made up for it."""

from benchmarks import low_bit, pictures
from benchmarks.dsformer import TASKS

STUDY = low_bit.study()
LOSSES = {  # points, at 2 bits and at 1.5
    "dense-sparse, int4": (1.0, 2.0),
    "STF, int4": (0.5, 2.5),
    "low rank, int4": (0.4, 3.0),
    "rounded": (20.0, 0.0),
    "rounded, trained": (1.1, 0.0),
    "binary, trained": (0.0, 15.0),
    "STF, GPTQ int4": (0.0, 3.5),
    "pruned, int4": (0.7, 30.0),
}


def row(entry, loss=0.0):
    """The row that the study would leave for `entry`."""
    score = 80.0 + 0.1 * entry.seed - loss
    bits = entry.labels.get("bits")
    return {
        "key": entry.key,
        "labels": entry.labels,
        "machine": {"processor": "a processor", "threads": 1},
        "versions": {"stackcomp": "1", "torch": "2", "transformers": "5"},
        "date": "2026-01-01",
        **entry.asked,
        "score": score,
        "difference": -loss,
        "noise": 1.5,
        "difference_noise": 0.3,
        "metric": "spearman",
        "layer_compression": bits and 32 / bits,
        "compression": 1.5,
    }


def found(keep=lambda entry: True):
    """A comparison of the rows of STS-B that LOSSES tells of; every further seed scores 0.1 more, and is noisy at 1.5 bits."""
    rows = []
    for entry in STUDY.entries:
        labels = entry.labels
        if labels["task"] != "stsb" or not keep(entry):
            continue
        if labels["method"] == "dense":
            rows.append(row(entry))
        elif labels["method"] in LOSSES and labels["bits"] in (2.0, 1.5):
            loss = LOSSES[labels["method"]][labels["bits"] == 1.5]
            if loss:
                rows.append(row(entry, loss))
    return low_bit.comparison(rows)


def test_methods_that_decide_have_more_seeds_where_they_are_close():
    seeds = {}
    for entry in STUDY.entries:
        labels = entry.labels
        seeds.setdefault((labels["task"], labels["method"], labels.get("bits")), set()).add(entry.seed)
    several = {key for key, found in seeds.items() if len(found) == 3}
    assert {task for task, *_ in several} == {"stsb"}
    assert {bits for *_, bits in several} == {None, 2.0, 1.5, 1.25}
    assert {method for _, method, _ in several} == {
        "dense",
        "dense-sparse, int4",
        "low rank, int4",
        "rounded, trained",
        "ternary, trained",
        "binary, trained",
    }


def test_a_cell_is_a_mean_over_seeds_and_the_best_of_a_column_is_bold():
    text = low_bit.section(found(), "a picture")
    assert "### STS-B, dense 80.10" in text
    assert "| method | 3 bits | 2.5 bits | 2 bits | 1.5 bits | 1.25 bits |" in text
    assert (
        "| low rank, int4 | - | - | **79.70 ± 1.52 (2.00, 3 seeds)** | 77.10 ± 1.52 (1.50, 3 seeds) | - |"
        in text
    )
    assert "| STF, int4 | - | - | 79.50 (2.00) | 77.50 (1.50) | - |" in text
    assert "### Rotten Tomatoes" not in text  # no row yet


def test_the_best_dense_sparse_stack_stands_beside_the_best_of_every_family():
    head, text = low_bit.headline(found()), low_bit.section(found(), "a picture")
    assert (
        "| 2 | STF, int4: -0.50 | rounded, trained: -1.10 | low rank, int4: -0.40 | pruned, int4: -0.70 |"
        in head
    )
    one = "(1 of 2 tasks, 1 pair of task and seed)"
    assert f"- 2 bits, STF, int4 minus rounded, trained: +0.60 ± 0.42 points {one}: **better**" in text
    assert f"- 2 bits, STF, int4 minus low rank, int4: -0.10 ± 0.42 points {one}: within the noise." in text
    three = "(1 of 2 tasks, 3 pairs of task and seed): **better**, beyond the noise."
    assert f"- 1.5 bits, dense-sparse, int4 minus binary, trained: +13.00 ± 0.42 points {three}" in text
    assert f"- 1.5 bits, dense-sparse, int4 minus low rank, int4: +1.00 ± 0.42 points {three}" in text
    assert "- 3 bits" not in text
    assert f"**Partial: {len(found().finished)} of {len(STUDY.entries)} entries are done**" in head


def test_it_says_from_where_on_dense_sparse_pays():
    text = low_bit.headline(found())
    assert (
        "Against rounding, dense-sparse stacks pay from 2 bits down to 1.5 (points: +0.60 at 2, +13.00 at 1.5)."
        in text
    )
    assert "Against low rank, dense-sparse stacks pay at 1.5 bits (points: -0.10 at 2, +1.00 at 1.5)." in text
    assert (
        "Against pruning, dense-sparse stacks pay at 1.5 bits (points: +0.20 at 2," in text
    )  # the first within the noise
    losing = low_bit.headline(found(lambda entry: not entry.labels["method"].startswith("dense-sparse")))
    assert "Against low rank, dense-sparse stacks pay at 1.5 bits" in losing  # STF


def test_a_method_with_no_dense_model_beside_it_is_no_best():
    text = low_bit.headline(found(lambda entry: entry.labels["method"] != "dense"))
    assert "minus" not in text


def test_without_finished_rows_the_command_is_named_and_what_failed_is_counted():
    command = "`stackcomp study pipelines/dsformer/low_bit.py`"
    failed = {**row(STUDY.entries[1], 1.0), "error": {"type": "any"}}
    for rows, wanted in (
        ([], f"Not run yet: {command} makes"),
        ([failed], f"(1 of them failed); {command} goes on."),
    ):
        empty = low_bit.comparison(rows)
        assert wanted in low_bit.headline(empty)
        assert low_bit.section(empty, "a picture") == low_bit.headline(empty)


def test_the_picture_has_a_line_a_method_that_has_rows():
    drawn = pictures.low_bit(found(), TASKS)
    for words in ("STS-B", "low rank,", "best of STF", "best rounding,", "int4 50 ↓", "dense 80.1"):
        assert words in drawn, words
    assert "Rotten" not in drawn
    assert "int8" not in drawn


def test_a_line_is_the_best_of_its_methods_and_what_falls_far_below_does_not_flatten_the_others():
    from matplotlib.figure import Figure

    lines = pictures._few_bits(found(), "stsb")
    assert lines["STF, int4", "STF, GPTQ int4"] == [(2.0, 79.5), (1.5, 77.5)]
    axes = Figure().add_subplot()
    pictures._bits_panel(axes, found(), "stsb")
    low, high = axes.get_ylim()
    assert 50 < low < 65 < 80.1 < high


def test_every_line_of_the_picture_is_of_methods_of_the_study():
    methods = {entry.labels["method"] for entry in STUDY.entries}
    assert {method for line in pictures._FEW_BITS for method in line} <= methods
