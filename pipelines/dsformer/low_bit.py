"""Dense-sparse against plain rounding in few bits: MiniLM-L6 at 3, 2.5, 2, 1.5 and 1.25 bits for each weight of the encoder, all bytes
counted: values, scales and indices.

    stackcomp study pipelines/dsformer/low_bit.py --list

Methods, all with the same number of recovery steps, batches, teacher and losses, and with rounding in the loop of every step:

- "rounded": LowBitWeights of 2 bits, without recovery; "ternary" and "binary": the same with 1.6 and 1; each with ", trained":
  QuantizationAware at the same bits;
- "dense-sparse" and "low rank", in the metric of inputs and gradients, with factors of 4 or of 8 bits; these start near, and are trained
  at a fifth of the rate of the others;
- "STF": supports learned in half of the steps, 4 bits in the other half; "STF, GPTQ", at 1.5 bits: supports and values learned in all
  steps, then rounded on calibration text, without a further step;
- "pruned": the largest values, of 4 bits, beside a bitmap.

Plain rounding meets every budget; that of 2 bits in two ways, with 2 bits and a scale for 384 values, or ternary with one for 40. What an
entry really came to stands in its row: `layer_compression` of its last step, from 32 bits.

Where it is close, from 2 bits down, the methods in question have three seeds on STS-B.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from recipes import BLOCKS, BUDGETS, FROZEN, Budget, tuned, weighed, weighed_stf

import stackcomp as sc

TASKS = ("stsb", "reviews")
SEED = 0
MORE_SEEDS = (1, 2)  # on the tasks that are small, of the methods that decide where they are close
DECIDING = ("dense-sparse, int4", "low rank, int4", "rounded, trained", "ternary, trained", "binary, trained")
CLOSE_BITS = 2.0  # and fewer
BUDGET_BITS = (2.0, 1.5, 1.25, 2.5, 3.0)  # a weight of the encoder, those that say most first
ROUNDINGS = {  # bits of a value, and how many share a 16-bit scale
    3.0: {"rounded": (2, 16)},
    2.5: {"rounded": (2, 32)},
    2.0: {"rounded": (2, 384), "ternary": (1.6, 40)},
    1.5: {"binary": (1, 32)},
    1.25: {"binary": (1, 64)},
}
PRUNED_BITS = 4 + 16 / 32  # of a kept value, in groups of 32 without an end; the bitmap has 1 bit a weight


@dataclass(frozen=True, kw_only=True)
class Width:
    """How factors are rounded, and what a value then takes: a scale for 32 values, or one row, whose last group is shorter."""

    bits: int
    value_bits: float

    def ratio(self, budget_bits: float) -> float:
        """Of rounded dense bytes to stored bytes: what a factorization that is priced at `value_bits` is asked for."""
        return self.value_bits / budget_bits


WIDTHS = (Width(bits=4, value_bits=4.6), Width(bits=8, value_bits=8.5))
FACTORS_RATE = 4e-5  # of factors while they learn their rounding
GPTQ_BITS = 1.5  # the budget at which rounding after all steps is tried beside rounding in their loop


def learned(budget: Budget, bits: float, group: int | None = None, **settings: object) -> sc.Pass:
    """The recovery with rounding in its loop."""
    return sc.QuantizationAware(
        bits=bits, group=group, **(budget.learning | settings), only=BLOCKS, frozen=FROZEN
    )


def methods(budget: Budget, bits: float) -> Iterator[tuple[str, sc.Pipeline]]:
    """Every method that can take so many bits a weight."""
    for method, (value_bits, group) in ROUNDINGS[bits].items():
        yield method, sc.Pipeline(sc.LowBitWeights(bits=value_bits, group=group, only=BLOCKS))
        yield f"{method}, trained", sc.Pipeline(learned(budget, value_bits, group))
    for width in WIDTHS:
        start = {"ratio": width.ratio(bits), "value_bits": width.value_bits}
        recovery = learned(budget, width.bits, learning_rate=FACTORS_RATE)
        yield f"dense-sparse, int{width.bits}", sc.Pipeline(weighed(**start), recovery)
        yield (
            f"low rank, int{width.bits}",
            sc.Pipeline(sc.LowRank(**start, only=BLOCKS, samples=1024), recovery),
        )
    int4 = WIDTHS[0]
    half, start = {"steps": budget.steps // 2}, weighed(int4.ratio(bits), value_bits=int4.value_bits)
    supports = weighed_stf(budget, value_bits=int4.value_bits, **half)
    yield "STF, int4", sc.Pipeline(start, supports, learned(budget, 4, learning_rate=FACTORS_RATE, **half))
    if bits == GPTQ_BITS:
        supports = weighed_stf(budget, value_bits=int4.value_bits)
        yield "STF, GPTQ int4", sc.Pipeline(start, supports, sc.GPTQ(bits=4, only=BLOCKS, samples=1024))
    pruned = sc.MagnitudePrune(sparsity=round(1 - (bits - 1) / PRUNED_BITS, 4), only=BLOCKS)
    yield "pruned, int4", sc.Pipeline(pruned, learned(budget, 4))


def entries() -> Iterator[sc.Entry]:
    """The rows, task by task and seed by seed, the dense model first."""
    for name in TASKS:
        budget = BUDGETS[name]
        for seed in (SEED, *(MORE_SEEDS if budget.small else ())):
            dense = tuned(name, seed)
            yield dense
            for bits in BUDGET_BITS:
                for method, pipeline in methods(budget, bits):
                    if seed == SEED or (bits <= CLOSE_BITS and method in DECIDING):
                        yield sc.Entry(
                            key=f"{name}/{method}/{bits:g} bits/{seed}",
                            model=dense,
                            task=dense.task,
                            seed=seed,
                            pipeline=pipeline,
                            labels={"task": name, "method": method, "bits": bits},
                        )


study = sc.Study(name="low_bit", entries=tuple(entries()))
