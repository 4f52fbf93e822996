"""The lines of the front page say what the rows say, and nothing where there are none."""

from benchmarks import combined, conclusions, smallest
from benchmarks.comparison import Comparison
from tests.test_dsformer import STUDY, compared

NAMES = ("catalogue", combined.NAME, smallest.NAME, "stsb", "speed", "decoder")
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


def test_a_search_that_missed_its_target_says_so():
    for loss, verdict in ((1.5, "**missed**"), (0.5, "reached")):
        rows = [
            row("3/stack", -loss, labels={"rung": 3}, declaration="Pipeline(A())", examples=5000),
            row("2/stack", -0.1, labels={"rung": 2}, declaration="Pipeline(A(steps=1))"),
            row("chosen/stack", 0.3, labels={"rung": "chosen"}, declaration="Pipeline(A())"),
        ]
        text = said(**{smallest.NAME: rows})
        assert f"on the 5000 examples that it was selected on it loses {loss:.2f} ± 0.50 ({verdict})" in text
        assert "20x smaller on SST-2 (4.0 MB)" in text
        assert "on the 872 that it was scored on once +0.30 ± 0.50" in text


def test_factors_are_compared_at_equal_bytes_and_trained():
    def plain(method, ratio, score, int8=False):
        return {"method": method, "ratio": ratio, "score": score, "int8": int8}

    rows = [
        plain("dense", 1.0, 82.0),
        plain("DenseSparse", 2.0, 81.0),
        plain("LowRank", 2.0, 79.5),
        plain("LowRank (free budget)", 2.0, 80.0),
        plain("LowRank", 2.0, 99.0, int8=True),
        plain("DenseSparse", 3.0, 79.0),
        plain("LowRank", 3.0, 76.0),
    ]
    text = conclusions.headline({**NOTHING, "stsb": rows}, compared())
    assert "**Dense-sparse holds more than low rank in the same bytes:** +1.00 to +3.00 points" in text
    behind = said(stsb=[*rows, plain("LowRank", 3.0, 80.0)])
    assert (
        "**Dense-sparse does not always hold more than low rank in the same bytes:** -1.00 to +1.00" in behind
    )
    assert "mean of 4 tasks: -0." in text
    assert "(+" not in said(stsb=[])


def test_speed_and_a_decoder():
    ratios = {"stored, float32": 1.14, "unpacked, float32": 0.5}
    keys = ("4 bits", "dense-sparse, 2.8x", "low rank, 2.8x", conclusions.SMALLER)
    decoders = [
        row("dense-sparse/1.5", 30.0, score=70.0),
        row("low rank/1.5", 200.0, score=240.0),
    ]
    text = said(speed=[{"key": key, "ratios": ratios} for key in keys], decoder=decoders)
    assert "4 bits as stored 1.14x the time, decoded once 0.50x" in text
    assert "perplexity 40.0 becomes 70.0 as dense-sparse and 240.0 as low rank" in text
