"""The lines of the front page say what the rows say, and nothing where there are none."""

from math import log

from benchmarks import combined, conclusions, smallest
from benchmarks.command import ROOT
from benchmarks.comparison import Comparison
from stackcomp.studies import Rows
from tests import test_smallest
from tests.test_dsformer import STUDY, compared

NAMES = (
    "catalogue",
    combined.NAME,
    combined.TRAINED,
    smallest.NAME,
    smallest.SINGLE,
    "stsb",
    "speed",
    "decoder",
)
NOTHING = {name: [] for name in NAMES}


def row(key, difference, size=4_000_000, **more):
    return {
        "key": key,
        "labels": {},
        "difference": difference,
        "difference_noise": 0.5,
        "size_bytes": size,
        "compression": 80e6 / size,
        "examples": 872,
        **more,
    }


def said(**rows):
    """The lines for these rows and no others."""
    return conclusions.headline({**NOTHING, **rows}, Comparison(study=STUDY, rows=[]))


def test_without_rows_there_is_nothing_to_say():
    assert said() == ""


def test_rounding_stands_beside_the_best_stack_that_keeps_the_score():
    stacks = [row("a > b", -0.4, 8_000_000), row("too small", -3.0, 1_000_000), row("a", 0.0, 40_000_000)]
    rounded = [row("4 bits everywhere", 0.1, 10_000_000), row("GPTQ", 0.0)]
    text = said(catalogue=rounded, **{combined.NAME: stacks})
    assert "4 bits: 8.0x smaller, +0.10 ± 0.50 points." in text
    assert "int4 embeddings: 10.0x smaller, -0.40 ± 0.50 points." in text
    assert "3 bits" not in text


def test_stacks_stand_beside_the_best_single_technique(monkeypatch):
    found = smallest.stack(test_smallest.FOUND, test_smallest.SEARCH)
    monkeypatch.setattr(smallest, "stacks", lambda rows: [found] if rows else [])
    alone = [test_smallest.single("good", split, -0.3, 8e6) for split in ("selection", "test")]
    text = said(**{smallest.NAME: test_smallest.FOUND, smallest.SINGLE: alone})
    assert (
        "scored once: a: 20.0x smaller, -1.00 ± 1.00 points (-0.50 ± 1.00 where it was selected); one" in text
    )
    assert text.endswith(
        "one technique, good (the smallest of 1 within 1 point): 10.0x smaller, -0.30 ± 1.00 points."
    )


def test_what_stacking_adds_is_that_of_the_rows_of_the_study():
    rows = Rows(name=combined.TRAINED, folder=ROOT / "docs" / "results").read()
    text = said(**{combined.TRAINED: rows})
    assert text.startswith("- **What stacking adds.** Four techniques")
    assert combined.extras(combined.TRAINED, rows) in text
    assert "compresses **" in text
    assert said(**{combined.TRAINED: rows[:1]}) == ""  # the model that all start from


def test_factors_are_compared_at_equal_bytes_and_trained():
    def plain(method, ratio, score, int8=False):
        really = ratio * 1.1 if method == "DenseSparse" else ratio
        return {
            "method": method,
            "ratio": ratio,
            "layer_compression": really,
            "score": score,
            "int8": int8,
        }

    rows = [
        plain("dense", 1.0, 82.0),
        plain("DenseSparse", 2.0, 81.0),
        plain("LowRank", 2.0, 79.5),
        plain("LowRank (even budget)", 2.0, 80.0),
        plain("LowRank", 2.0, 99.0, int8=True),
        plain("DenseSparse", 3.0, 79.0),
        plain("LowRank", 3.0, 76.0),
    ]
    text = conclusions.headline({**NOTHING, "stsb": rows}, compared())
    assert "**Dense-sparse holds more than low rank in the same bytes:** +1.00 to +3.00 points" in text
    # 79.5 is reached at 2.2 * 1.5 ** 0.75, by the better of the low ranks at 2 * 1.5 ** 0.125
    assert "without training, or 1.42 times its compression of the encoder at the same score." in text
    behind = said(stsb=[*rows, plain("LowRank", 3.0, 80.0)])
    assert (
        "**Dense-sparse does not always hold more than low rank in the same bytes:** -1.00 to +1.00" in behind
    )
    assert behind.endswith("on STS-B without training.")
    assert "mean of 4 tasks, points against dense: -0." in text
    assert "(+" not in said(stsb=[])


def test_how_much_smaller_than_both_low_ranks_is_said_where_both_figures_are():
    def score(entry):
        rate = 4.0 if entry.labels["method"] == "data-aware SVD" else 2.0
        return 90.0 - rate * log(entry.labels["ratio"])

    *_, text = conclusions._trained(compared(score))
    assert (
        " times as much as low rank fitted to the layers, and 1.00 (1.00 to 1.00, not settled) times" in text
    )
    assert text.endswith("fitted alike; at equal error of the outputs, 1.50 (1.50 to 1.50) times.")
    assert float(text.partition("encoder ")[2].partition(" (")[0]) > 1.5
    one = compared(score, only=lambda entry: entry.labels["task"] == "stsb" and entry.seed == 0)
    no_curve = compared(score, only=lambda entry: entry.labels["ratio"] != 10.0)
    for few in (one, no_curve):
        assert " times as much" not in " ".join(conclusions._trained(few))


def test_learned_supports_pay_only_where_they_do_beyond_the_noise():
    def scored(gain):
        return lambda entry: 80.0 + gain * (entry.labels["method"] == "STF, plain start")

    (text,) = conclusions._supports(compared(scored(2.0)))
    assert text.startswith("**Learning the supports (STF) pays where they were chosen without data,**")
    assert "+2.00 ± " in text
    assert text.endswith("at 2.8x. Where they were chosen on calibration text: +0.00 ± 0.21.")
    (text,) = conclusions._supports(compared(scored(0.0)))
    assert text.startswith("**Learning the supports (STF) does not surely pay where")
    neither = compared(scored(2.0), only=lambda entry: "plain" not in entry.labels["method"])
    assert list(conclusions._supports(neither)) == []


def test_speed_and_a_decoder():
    timings = [
        {"batch": 8, "length": 128, "ratios": {"stored, float32": 1.14, "unpacked, float32": 0.5}},
        {"batch": 1, "length": 16, "ratios": {"stored, float32": 3.3, "unpacked, float32": 0.7}},
    ]
    keys = ("4 bits", "dense-sparse, 2.8x", "low rank, 2.8x", conclusions.SMALLER)
    decoders = [
        row("dense-sparse/1.5", 30.0, score=70.0),
        row("low rank/1.5", 200.0, score=240.0),
    ]
    text = said(speed=[{"key": key, "timings": timings} for key in keys], decoder=decoders)
    assert "on one processor, 8 x 128 tokens: 4 bits as stored 1.14x the time, decoded once 0.50x" in text
    assert "The same, 1 x 16 tokens: 4 bits as stored 3.30x the time, decoded once 0.70x" in text
    assert "perplexity 40.0 becomes 70.0 as dense-sparse and 240.0 as low rank" in text
