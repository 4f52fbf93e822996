"""What a reader sees of the DSFormer study, from rows made up for it; and the recipe for SQuAD on toys."""

import random
from math import log2

import numpy as np
import pytest
from scipy import stats

from benchmarks import comparison, dsformer, pictures
from benchmarks.command import ROOT
from benchmarks.comparison import Comparison, Curve, at_equal_score
from stackcomp.cli import main
from stackcomp.core.pipeline_file import read_file
from tests import toys

STUDY = dsformer.study()
ENCODER, FILE = 42_467_328, 90_000_000  # bytes of the dense model
DROPS = {  # points lost at 2.8x
    "STF": 0.6,
    "conventional": 1.2,
    "data-aware SVD": 2.1,
    "STF, gradients": 0.3,
    "data-aware SVD, gradients": 0.9,
    "conventional, gradients": 0.8,
    "STF, plain start": 1.5,
    "conventional, plain start": 3.0,
    "SVD": 3.8,
    "FWSVD": 3.2,
    "1:3 sparsity": 2.6,
    "movement pruning": 1.6,
    "2 layers": 6.0,
    "2 layers, hidden states": 5.2,
}
STARTS = {"stsb": 87.0, "reviews": 81.0, "mrpc": 88.5, "sst2": 90.0}


def score(entry):
    """The score of an entry in a world where every method loses what DROPS says, more at higher compression, and seeds differ."""
    labels = entry.labels
    loss = DROPS.get(labels["method"], 0.0) * (labels["ratio"] - 1) / 1.8
    chance = random.Random(entry.key)
    return STARTS[labels["task"]] + 0.3 * entry.seed - loss + chance.uniform(-0.1, 0.1)


def tuned(entry):
    """The dense model that an entry starts from."""
    return next(
        one
        for one in STUDY.entries
        if (one.labels["method"], one.labels["task"], one.seed) == ("dense", entry.labels["task"], entry.seed)
    )


def row(entry, score=score, **more):
    """The row that the study would leave for `entry`."""
    ratio, dense = entry.labels["ratio"], entry.labels["method"] == "dense"
    encoder = ENCODER / ratio
    return {
        "key": entry.key,
        "labels": entry.labels,
        "machine": {"processor": "a processor", "threads": 1},
        "versions": {"stackcomp": "1", "torch": "2"},
        "date": "2026-01-01",
        **entry.asked,
        "score": score(entry),
        "difference": 0.0 if dense else score(entry) - score(tuned(entry)),
        "noise": 1.5,
        "difference_noise": 0.3,
        "output_error": 0.0 if dense else 0.01 * ratio * (1.5 if "SVD" in entry.labels["method"] else 1.0),
        "metric": "accuracy",
        "layer_compression": None if dense else ratio,
        "layer_bytes": 0 if dense else encoder,
        "compression": FILE / (FILE - ENCODER + encoder),
        "size_bytes": FILE - ENCODER + encoder,
        "seconds": 1234.0,
        **more,
    }


def compared(score=score, only=lambda entry: True):
    """The study with the rows of the entries that `only` lets in."""
    return Comparison(study=STUDY, rows=[row(entry, score) for entry in STUDY.entries if only(entry)])


def line(text, start):
    """The first line that starts so."""
    return next(line for line in text.splitlines() if line.startswith(start))


# figures


def test_a_cell_is_the_mean_over_seeds_with_a_t_interval_and_the_bootstrap_of_the_examples():
    scores = {0: 80.0, 1: 81.0, 2: 82.0}
    found = compared(lambda entry: scores[entry.seed])
    several, one = found.cell("stsb", "STF", 2.8).score, found.cell("reviews", "SVD", 2.8).score
    assert (several.value, several.count) == (81.0, 3)
    assert several.half == pytest.approx(np.hypot(4.302653 / 3**0.5, 1.5), abs=1e-5)
    assert (one.value, one.half, one.count) == (80.0, 1.5, 1)


def test_beside_the_dense_model_missing_seeds_are_no_merit():
    found = compared(lambda entry: 80.0 + 5 * entry.seed - (entry.labels["method"] == "SVD"))
    few = found.cell("reviews", "SVD", 2.8)  # one seed, the dense model has three
    assert few.score.value == pytest.approx(79.0)
    assert few.beside(found.cell("reviews", *comparison.DENSE)) == pytest.approx(84.0)


def test_an_error_is_a_geometric_mean_in_which_tasks_weigh_the_same_and_none_is_missing():
    errors = {"stsb": 0.01, "reviews": 0.04, "mrpc": 0.02, "sst2": 0.02}  # mean in logarithms: 0.02
    rows = [row(entry, output_error=errors[entry.labels["task"]]) for entry in STUDY.entries]
    found = Comparison(study=STUDY, rows=rows)
    assert found.error("SVD", 2.8) == pytest.approx(0.02)  # three seeds on two tasks, one on the others
    assert found.error("SVD", 6.0) is None
    without = [one | {"output_error": None} if one["key"] == "mrpc/SVD/2.8/1" else one for one in rows]
    lacking = Comparison(study=STUDY, rows=without)
    assert lacking.error("SVD", 2.8) is None
    assert "| 0.020 | 2.80x |" in line(dsformer.page(found, ""), "| SVD |")
    assert "| - | 2.80x |" in line(dsformer.page(lacking, ""), "| SVD |")


def test_a_difference_pairs_seeds_and_weighs_tasks_the_same():
    """SVD has three seeds on two tasks and one on the others: their losses count the same nevertheless."""
    losses = {"stsb": 1.0, "reviews": 2.0, "mrpc": 3.0, "sst2": 6.0}

    def score(entry):
        lost = losses[entry.labels["task"]] if entry.labels["method"] == "SVD" else 0.0
        return 80.0 + 5 * entry.seed - lost  # what seeds have in common goes away

    found = compared(score)
    gap = found.difference(("SVD", 2.8), comparison.DENSE)
    assert (gap.value, gap.count, gap.tasks) == (pytest.approx(-3.0), 8, 4)


def test_a_row_that_came_of_another_dense_model_is_told_beside_ours():
    """The whole training of some rows was on a processor that made dense models 1.5 points better."""
    found = compared()
    rows = [
        row | {"score": row["score"] + 1.5} if row["labels"]["method"] == "STF" and row["seed"] == 1 else row
        for row in found.rows
    ]
    other = Comparison(study=STUDY, rows=rows)
    for rival in (comparison.DENSE, ("conventional", 2.8)):
        ours, theirs = (each.difference(("STF", 2.8), rival) for each in (found, other))
        assert (ours.value, ours.half) == (pytest.approx(theirs.value), pytest.approx(theirs.half))
    assert other.cell("stsb", "STF", 2.8).score.value == pytest.approx(
        found.cell("stsb", "STF", 2.8).score.value
    )


def test_the_interval_of_a_difference_is_that_of_seeds_within_tasks_and_of_the_examples():
    """As a linear model with a mean for each task has it; how far the tasks are from each other does not matter. All seeds of a task share
    its examples."""
    shifts = {"stsb": 9.0, "reviews": 0.0, "mrpc": -4.0, "sst2": 2.0}

    def score(entry):
        shift = shifts[entry.labels["task"]] if entry.labels["method"] == "STF" else 0.0
        return random.Random(entry.key).uniform(80, 81) + shift

    found = compared(score)
    gap = found.difference(("STF", 2.8), ("conventional", 2.8))
    scores = {row["key"]: row["score"] for row in found.rows}
    gaps = np.array(
        [
            [
                scores[f"{task}/STF/2.8/{seed}"] - scores[f"{task}/conventional/2.8/{seed}"]
                for seed in (0, 1, 2)
            ]
            for task in shifts
        ]
    )
    assert gap.value == pytest.approx(gaps.mean())
    spread = np.sqrt(gaps.var(axis=1, ddof=1).mean())
    of_seeds, of_examples = stats.t.ppf(0.975, 8) * spread / 12**0.5, 0.3 * 2**0.5 / 4**0.5
    assert (gap.half, gap.count) == (pytest.approx(np.hypot(of_seeds, of_examples)), 12)


def test_where_no_task_has_two_seeds_the_noise_of_a_difference_is_that_of_what_was_compared():
    one = compared(only=lambda entry: entry.labels["task"] == "stsb" and entry.seed == 0)
    assert one.difference(("STF", 2.8), comparison.DENSE).half == pytest.approx(0.3)
    assert one.difference(("STF", 2.8), ("conventional", 2.8)).half == pytest.approx(0.3 * 2**0.5)
    all_tasks = compared(only=lambda entry: entry.seed == 0)
    assert all_tasks.difference(("STF", 2.8), comparison.DENSE).half == pytest.approx(0.3 / 2)
    assert compared(only=lambda entry: False).difference(("STF", 2.8), comparison.DENSE) is None


def test_compression_at_equal_score_is_linear_in_its_logarithm():
    mine, other = Curve(points=[(2.0, 90.0), (4.0, 80.0)]), Curve(points=[(1.0, 90.0), (2.0, 80.0)])
    found = at_equal_score(mine, other)
    assert (found.score, found.value) == (pytest.approx(85.0), pytest.approx(2.0))
    assert mine.compression(85.0) == pytest.approx(8**0.5)
    crossing = Curve(points=[(2.0, 95.0), (4.0, 75.0)])
    assert at_equal_score(mine, crossing).value == pytest.approx(1.0)
    assert at_equal_score(mine, Curve(points=[(2.0, 90.0), (4.0, 70.0)])).value > 1


def test_a_score_that_rises_with_compression_is_noise_and_levelled():
    """Two points that come the wrong way round count as their mean; a level score is held up to its last point."""
    mine = Curve(points=[(2.0, 90.0), (4.0, 80.0)])
    noisy, level = [
        Curve(points=[(1.0, 90.0), (2.0, 83.0 - up), (3.0, 83.0 + up), (4.0, 80.0)]) for up in (1, 0)
    ]
    assert noisy.falling.points == [(place, pytest.approx(score)) for place, score in level.points]
    assert at_equal_score(noisy, mine).value == pytest.approx(at_equal_score(level, mine).value)
    ends_level = Curve(points=[(1.0, 90.0), (2.0, 81.0), (8.0, 83.0)])
    found = at_equal_score(ends_level, mine, lowest=True)
    assert (found.score, found.value) == (pytest.approx(82.0), pytest.approx(8.0 / mine.compression(82.0)))


@pytest.mark.parametrize(
    ("points", "why"),
    [
        ([(2.0, 70.0), (4.0, 60.0)], "share no score; above 2.00"),
        ([(2.0, 99.0), (4.0, 95.0)], "share no score; below 0.50"),
        ([(2.0, 82.0), (3.0, 82.0), (4.0, 85.0)], "does not fall"),
        ([], "not run yet"),
    ],
)
def test_there_is_no_figure_where_curves_do_not_allow_one(points, why):
    found = at_equal_score(Curve(points=[(2.0, 90.0), (4.0, 80.0)]), Curve(points=points))
    assert found.value is None
    assert why in found.why


def test_rows_of_another_declaration_and_failed_ones_do_not_count():
    first, second, third, *_ = STUDY.entries
    rows = [
        row(first),
        row(second, declaration="Pipeline()"),
        {"key": third.key, **third.asked, "error": {"type": "MissingNeed", "message": "no luck"}},
        {"key": "of another study", "error": {}},
    ]
    found = Comparison(study=STUDY, rows=rows)
    assert [row["key"] for row in found.finished] == [first.key]
    assert [row["key"] for row in found.failed] == [third.key]
    assert len(found.missing) == len(STUDY.entries) - 1
    page = dsformer.page(found, "")
    assert f"`{third.key}` failed: MissingNeed: no luck" in page
    assert f"1 of {len(STUDY.entries)} entries are done" in page
    assert "(1 of them failed)" in page
    assert "| failed |" in line(page, "| conventional practice |")
    older = Comparison(study=STUDY, rows=[{**rows[2], "declaration": "Pipeline(Old())"}])
    assert older.failed == []


# page and README


def test_nothing_has_run():
    found = compared(only=lambda entry: False)
    said = "Not run yet: `stackcomp study pipelines/dsformer/table.py` makes the rows."
    assert dsformer.headline(found) == said
    assert said in dsformer.page(found, "")
    assert "##" not in dsformer.page(found, "")


def test_a_complete_study():
    found = compared()
    page, block = dsformer.page(found, "PICTURE"), dsformer.headline(found)
    assert f"All {len(STUDY.entries)} entries are done (`stackcomp study" in page
    assert f"All {len(STUDY.entries)} entries are done (`stackcomp study" in block
    for text in (page, block):
        assert "not run yet" not in text
        assert "Partial" not in text
        assert "**better**, beyond the noise" in line(
            text.replace("- DSF", "DSF"), "DSFormer (STF) minus conv"
        )
    assert "PICTURE" in page
    tables = page.split("### Encoder at ")[1:]
    assert [text.partition("x\n")[0] for text in tables] == ["2.8", "2", "3.57", "6", "10"]
    assert [text.count(" (3) |") for text in tables] == [42, 16, 30, 14, 14]
    assert tables[0].index("| dense |") < tables[0].index("| DSFormer (STF) |")
    for entry in STUDY.entries:
        assert entry.key in page


def test_a_partial_study_says_what_is_missing():
    found = compared(only=lambda entry: entry.seed == 0 and entry.labels["task"] == "stsb")
    page, block = dsformer.page(found, ""), dsformer.headline(found)
    done = len(found.finished)
    for text in (page, block):
        assert f"**Partial: {done} of {len(STUDY.entries)} entries are done**" in text
        assert "`stackcomp study pipelines/dsformer/table.py` goes on" in text
        assert "(1 of 4 tasks, 1 pair of task and seed)" in text
    assert "(1 of 3) | not run yet | not run yet | not run yet | -0." in line(page, "| DSFormer (STF) |")
    assert "| - | -0." in line(block, "| DSFormer (STF) |")  # no mean of tasks that did not all run
    assert "1 of 12 |" in line(block, "| DSFormer (STF) |")
    assert "MRPC: not run yet." in page
    assert page.rstrip().endswith(
        "sst2/STF, gradients/10/2\nsst2/data-aware SVD, gradients/10/2</pre></details>"
    )


def test_what_is_worse_is_printed_as_worse_and_noise_as_noise():
    def score(entry):
        lost = {"STF": 1.0, "conventional": 0.5, "STF, plain start": 0.5}.get(entry.labels["method"], 0.0)
        return 80.0 + random.Random(entry.key).uniform(-0.05, 0.05) - lost

    text = dsformer.headline(compared(score))
    assert "-0.98 ±" in line(text, "DSFormer (STF) minus dense")
    assert "-0.50 ±" in line(text, "DSFormer (STF) minus conventional practice at 2.8x")
    assert text.count("**worse**, beyond the noise") == 3
    noise = dsformer.headline(compared(lambda entry: random.Random(entry.key).uniform(70, 90)))
    assert noise.count("within the noise") == 5
    assert "**" not in noise


def low_rank_in_words(losses, slope=1.0):
    """The lines on low rank, where a method loses `losses` and `slope` points more for each doubling."""

    def score(entry):
        method, ratio = entry.labels["method"], entry.labels["ratio"]
        return 90.0 - losses.get(method, 0.0) - slope * log2(ratio) + 1e-3 * entry.seed

    return "\n".join(dsformer._against_low_rank(compared(score)))


def test_the_ratio_to_low_rank_and_the_low_rank_that_has_no_curve():
    better = low_rank_in_words({"data-aware SVD": 0.5, "SVD": 0.6, "FWSVD": 0.2}, slope=1.0)
    assert "STS-B: 1.41 (at a score of " in better
    assert "- Mean score of the tasks: **1.41** (at a score of " in better
    assert "1.41 to 1.41 in 95% of the 100% of draws of pairs with a figure: more compression" in better
    assert "FWSVD, which was run at 2.8x only, scored +0.30" in better
    assert "\nSVD, which" not in better
    worse = low_rank_in_words({"STF": 0.5})
    assert "0.71 to 0.71 in 95% of the 100% of draws of pairs with a figure: **less** compression" in worse
    assert "Mean score of the tasks: no figure" in low_rank_in_words({"data-aware SVD": 5.0})


def test_the_mean_over_tasks_rests_on_what_both_have():
    def score(entry):
        task = STARTS[entry.labels["task"]]
        return task - log2(entry.labels["ratio"]) - 0.5 * (entry.labels["method"] == "data-aware SVD")

    some = compared(score, only=lambda entry: entry.key != "stsb/STF/2/0")
    assert (
        len(some.shared(["STF", "data-aware SVD"])) == len(compared().shared(["STF", "data-aware SVD"])) - 1
    )
    found = comparison.at_equal_mean(some, "STF", "data-aware SVD")
    assert found.ratio.value == pytest.approx(2**0.5)
    assert found.low == pytest.approx(found.high) == pytest.approx(2**0.5)

    def steeper(entry):
        slope = 1.5 if entry.labels["method"] == "data-aware SVD" else 1.0
        return 80.0 - slope * log2(entry.labels["ratio"])

    lowest = comparison.at_equal_mean(compared(steeper), "STF", "data-aware SVD", lowest=True).ratio
    assert lowest.score == pytest.approx(80.0 - log2(3.57))
    assert lowest.value == pytest.approx(3.57 / 3.57 ** (1 / 1.5))
    near = comparison.at_equal_mean(some, "STF", "data-aware SVD", figure="nearness")
    assert (near.ratio.value, near.count) == (pytest.approx(1.5), found.count)
    old = Comparison(study=STUDY, rows=[{**one, "output_error": None} for one in some.rows])
    assert (
        comparison.at_equal_mean(old, "STF", "data-aware SVD", figure="nearness").ratio.why == "not run yet"
    )
    assert (
        "At equal error of the outputs, which needs no loss of score: **1.50** (at an error of 0.033, "
        in ("\n".join(dsformer._against_low_rank(some)))
    )
    alone = compared(score, only=lambda entry: entry.labels["task"] == "mrpc" and entry.seed == 0)
    found = comparison.at_equal_mean(alone, "STF", "data-aware SVD")
    assert (found.count, found.low, found.high) == (1, 0.0, float("inf"))


# picture


def test_the_picture_shows_what_there_is():
    some = compared(only=lambda entry: entry.labels["task"] == "stsb")
    for found in (compared(), some, compared(only=lambda entry: entry.labels["method"] == "dense")):
        assert "</svg>" in pictures.dsformer(found, dsformer.TASKS)
        assert "</svg>" in pictures.dsformer_mean(found)


def test_a_mean_over_some_of_the_tasks_is_not_drawn():
    mrpc = [entry for entry in STUDY.entries if entry.labels["task"] == "mrpc"]
    found = compared(
        only=lambda entry: entry not in mrpc or entry.labels["method"] != "STF" or entry.labels["ratio"] != 2
    )
    drawn = pictures._of_mean(found)
    assert [round(point.compression, 2) for point in drawn["STF"]] == [2.8, 3.57]
    assert [round(point.compression, 2) for point in drawn["conventional"]] == [2.0, 2.8, 3.57]
    gap = found.difference(("STF", 2.8), comparison.DENSE)
    assert drawn["STF"][0] == (pytest.approx(2.8), gap.value, gap.half)
    for one in (found, compared(only=lambda entry: entry in mrpc)):
        assert ("not run yet" in pictures.dsformer_mean(one)) == (one is not found)


def test_without_its_dense_model_a_task_has_no_panel():
    found = compared(only=lambda entry: entry.labels["method"] != "dense")
    assert "not run yet" in pictures.dsformer(found, dsformer.TASKS)


def test_labels_keep_their_room_and_stay_where_they_can():
    assert pictures._apart([1.0, 5.0], [1.0, 1.0]) == [1.0, 5.0]
    found = pictures._apart([1.0, 1.0, 1.2], [1.0, 1.0, 2.0])
    assert found[1] - found[0] == pytest.approx(1.0, abs=1e-3)
    assert found[2] - found[1] == pytest.approx(1.5, abs=1e-3)
    assert sum(found) == pytest.approx(3.2)


def test_every_method_of_the_study_is_drawn():
    assert set(pictures._METHODS) == {entry.labels["method"] for entry in STUDY.entries} - {"dense"}
    assert set(dsformer.TASKS) == set(compared().tasks)


# SQuAD


@pytest.fixture
def squad(tmp_path, monkeypatch):
    """The recipe for SQuAD, on a toy BERT and a few questions in its format."""
    import datasets

    (tmp_path / "squad").mkdir()
    for split in ("train", "validation"):
        datasets.Dataset.from_list(toys.questions(10)).to_parquet(tmp_path / "squad" / f"{split}.parquet")
    toys.make("bert", "AutoModelForQuestionAnswering").save_pretrained(tmp_path / "model")
    toys.tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setenv("STACKCOMP_DATA", str(tmp_path))
    monkeypatch.setenv("STACKCOMP_MODEL", str(tmp_path / "model"))
    return ROOT / "pipelines" / "dsformer" / "squad.py"


def test_the_recipe_for_squad_is_legal_and_its_data_are_read(squad, capsys):
    assert main(["check", str(squad)]) == 0
    assert "legal on" in capsys.readouterr().out
    found = read_file(squad)
    study = found["study"]
    study.check()
    assert (study.name, [entry.key for entry in study.entries]) == (
        "squad",
        ["squad/dense/0", "squad/STF/2.8/0"],
    )
    assert study.entries[1].parent is study.entries[0]
    assert len(found["task"].encode(toys.tokenizer(), "test")) == 10


def test_the_recipe_for_squad_names_bert_unless_told(squad, monkeypatch):
    monkeypatch.delenv("STACKCOMP_MODEL")
    assert read_file(squad)["model"] == "bert-base-uncased"
