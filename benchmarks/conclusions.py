"""What the studies say together, in a few lines for the front page. A line whose rows are missing is left out."""

from collections.abc import Iterator, Mapping, Sequence

from benchmarks import combined, smallest
from benchmarks.comparison import DENSE, Comparison, Curve, Equal, Estimate, at_equal_mean, at_equal_score
from benchmarks.dsformer import GRADIENTS, RATIO, STF
from benchmarks.tables import plus_minus
from stackcomp.studies.rows import Row

Results = Mapping[str, Sequence[Row]]  # finished rows by the name of their study
CONVENTIONAL, LOW_RANK = ("conventional", RATIO), ("data-aware SVD", RATIO)
SMALLER, AS_STORED, UNPACKED = "3 of 6 layers > 4 bits", "stored, float32", "unpacked, float32"


def headline(results: Results, compared: Comparison) -> str:
    """The lines, as a list."""
    parts = [
        _rounding(results),
        _stacks(results),
        _combined(results),
        _factors(results),
        _trained(compared),
        _supports(compared),
        _speed(results),
        _decoder(results),
    ]
    return "\n".join(f"- {' '.join(part)}" for lines in parts if (part := list(lines)))


def _rounding(results: Results) -> Iterator[str]:
    rows = _by_key(results["catalogue"])
    if "4 bits everywhere" not in rows:
        return
    yield "**Round first.** all-MiniLM-L6-v2, all weights rounded to nearest, STS-B, no training:"
    some = [
        f"{bits} bits: {_loses(rows[key])}"
        for bits in (4, 3, 2)
        if (key := f"{bits} bits everywhere") in rows
    ]
    yield f"{'; '.join(some)}."
    stacks = [row for row in results[combined.NAME] if (row["difference"] or 0.0) >= -combined.LOSS]
    if stacks:
        best = min(stacks, key=lambda row: row["size_bytes"])
        yield (
            f"The best stack of pruning, factorizing, int8 layers and int4 embeddings: {_loses(best)}. What a stack has to beat is the "
            "rounding, not the dense model."
        )


def _stacks(results: Results) -> Iterator[str]:
    found = smallest.stacks(results[smallest.NAME])
    if not found:
        return
    yield (
        "**Stacks go on where rounding ends.** Whole files on SST-2; points against dense on the validation split, where each was scored "
        "once:"
    )
    lines = [
        f"{one.name}: {_loses(one.chosen)} "
        f"({plus_minus(one.searched['difference'], one.searched['difference_noise'], signed=True)} where it was selected)"
        for one in found
    ]
    alone = results[smallest.SINGLE]
    if best := smallest.single(alone):
        lines.append(f"{smallest.named_single(best, alone)}: {_loses(best)}")
    yield f"{'; '.join(lines)}."


def _combined(results: Results) -> Iterator[str]:
    if said := combined.extras(combined.TRAINED, results[combined.TRAINED]):
        yield (
            "**What stacking adds.** Four techniques on the layers of a classifier (SST-2), in every subset and legal order, all with the "
            "same recovery."
        )
        yield said


def _factors(results: Results) -> Iterator[str]:
    best: dict[tuple[float, bool], tuple[float, float]] = {}  # score, and what it really takes
    for row in results["stsb"]:
        if not row["int8"] and row["ratio"] > 1:
            place = row["ratio"], row["method"] == "DenseSparse"
            point = row["score"], row["layer_compression"]
            best[place] = max(point, best.get(place, point))
    gaps = [
        score - best[ratio, False][0]
        for (ratio, ours), (score, _) in best.items()
        if ours and (ratio, False) in best
    ]
    if gaps:
        verdict = "holds more than" if min(gaps) > 0 else "does not always hold more than"
        curves = [
            Curve(
                points=sorted(
                    (compression, score) for (_, mine), (score, compression) in best.items() if mine is ours
                )
            )
            for ours in (True, False)
        ]
        equal = at_equal_score(*curves)
        yield (
            f"**Dense-sparse {verdict} low rank in the same bytes:** {min(gaps):+.2f} to {max(gaps):+.2f} points on STS-B without "
            f"training{f', or {equal.value:.2f} times its compression of the encoder at the same score' if equal.value else ''}."
        )


def _trained(compared: Comparison) -> Iterator[str]:
    """Dense-sparse and low rank in either metric, against the dense model and at equal score."""
    ours, theirs = (compared.difference(one, DENSE) for one in ((STF, RATIO), LOW_RANK))
    if not (ours and theirs):
        return
    yield (
        f"**DSFormer, trained,** at {RATIO:g}x of the encoder, mean of {ours.tasks} tasks, points against dense: {_gap(ours)}, low rank "
        f"{_gap(theirs)}, both fitted to what the layers put out."
    )
    weighed, low_rank = (compared.difference((method, RATIO), DENSE) for method in GRADIENTS)
    if weighed and low_rank and weighed.tasks == low_rank.tasks == ours.tasks:
        alike = compared.difference(*((method, RATIO) for method in GRADIENTS))
        verdict = "" if alike is None or abs(alike.value) > alike.half else ": no difference beyond the noise"
        yield f"Fitted to what the model says (gradients): {_gap(weighed)}, low rank {_gap(low_rank)}{verdict}."
    published, alike = (at_equal_mean(compared, GRADIENTS[0], one) for one in (LOW_RANK[0], GRADIENTS[1]))
    near = at_equal_mean(compared, *GRADIENTS, figure="nearness")
    if all(one.ratio.value and one.count > 1 for one in (published, alike, near)):
        yield (
            f"At equal score, with gradients, it compresses the encoder {_times(published)} times as much as low rank fitted to the "
            f"layers, and {_times(alike)} times as much as low rank fitted alike; at equal error of the outputs, {_times(near)} times."
        )


def _supports(compared: Comparison) -> Iterator[str]:
    """What learning the supports adds to freezing them, from either start."""
    chosen = compared.difference((STF, RATIO), CONVENTIONAL)
    plain = compared.difference(*((f"{method}, plain start", RATIO) for method in (STF, "conventional")))
    if chosen and plain:
        verdict = "pays" if plain.value > plain.half else "does not surely pay"
        yield (
            f"**Learning the supports (STF) {verdict} where they were chosen without data,** as the paper chooses them: {_gap(plain)} "
            f"points against frozen ones at {RATIO:g}x. Where they were chosen on calibration text: {_gap(chosen)}."
        )


def _times(found: Equal) -> str:
    settled = ", not settled" if found.low <= 1.0 <= found.high else ""
    return f"{found.ratio.value:.2f} ({found.low:.2f} to {found.high:.2f}{settled})"


def _speed(results: Results) -> Iterator[str]:
    timings = {row["key"]: row["timings"] for row in results["speed"]}
    if SMALLER not in timings:
        return
    for place, timing in enumerate(timings[SMALLER]):
        ratios = {key: found[place]["ratios"] for key, found in timings.items()}
        texts = f"{timing['batch']} x {timing['length']} tokens"
        start = (
            "**Small is not fast.** Beside the dense model in fp32, on one processor"
            if not place
            else "The same"
        )
        yield (
            f"{start}, {texts}: 4 bits as stored {ratios['4 bits'][AS_STORED]:.2f}x the time, decoded once "
            f"{ratios['4 bits'][UNPACKED]:.2f}x; dense-sparse at 2.8x {ratios['dense-sparse, 2.8x'][AS_STORED]:.2f}x; low rank at 2.8x "
            f"{ratios['low rank, 2.8x'][AS_STORED]:.2f}x; half of the layers {ratios[SMALLER][UNPACKED]:.2f}x."
        )


def _decoder(results: Results) -> Iterator[str]:
    rows = _by_key(results["decoder"])
    if {"dense-sparse/1.5", "low rank/1.5"} <= rows.keys():
        ours, theirs = rows["dense-sparse/1.5"], rows["low rank/1.5"]
        yield (
            f"**Do not factorize a small decoder without training it.** SmolLM2-135M at 1.5x of its layers: perplexity "
            f"{ours['score'] - ours['difference']:.1f} becomes {ours['score']:.1f} as dense-sparse and {theirs['score']:.1f} as low rank."
        )


def _gap(found: Estimate) -> str:
    return plus_minus(found.value, found.half, signed=True)


def _loses(row: Row) -> str:
    return f"{row['compression']:.1f}x smaller, {plus_minus(row['difference'], row['difference_noise'], signed=True)} points"


def _by_key(rows: Sequence[Row]) -> dict[str, Row]:
    return {row["key"]: row for row in rows}
