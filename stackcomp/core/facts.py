"""The closed vocabulary of facts: words that are true of one stored part of a weight.

Passes speak about weights in these words only; there is no list of pass names anywhere. A new fact is a new
line here and in no other place.
"""

from enum import StrEnum


class Fact(StrEnum):
    """A word true of one stored part (`weight`, `basis`, `coefficients`) of a logical weight."""

    FLOAT = "float"  # values are floating-point numbers
    INT8 = "int8"  # values are 8-bit integers with one scale a row
    INT4 = "int4"  # values are 4-bit codes with one scale a group
    INT3 = "int3"  # the same with 3 bits
    INT2 = "int2"  # the same with 2 bits
    NF4 = "nf4"  # 4-bit codes of the quantiles of a normal distribution, times the scale of a group
    TERNARY = "ternary"  # -1, 0 or 1 times the scale of a group, 1.6 bits
    BINARY = "binary"  # one of two opposite values a group, 1 bit
    CODEBOOK = "codebook"  # values are codes of 2 to 8 bits into shared values, those of a row or of the whole matrix
    DENSE = "dense"  # every entry is stored
    SPARSE = "sparse"  # only a fixed support is stored; what is off it is zero and stays zero
    FACTOR = "factor"  # the part is one factor of a product
    KRONECKER = "kronecker"  # the part is one side of a sum of Kronecker products
    BRANCH = "branch"  # the part holds a factor for each layer that shares the weight
    DYNAMIC = "dynamic"  # the inputs of its product are rounded to int8 as they come
    TRAINABLE = "trainable"  # its values can take a gradient step


Facts = frozenset[Fact]

# codes, of which the scales can be trained, or the shared values
INTEGERS: Facts = frozenset(
    {
        Fact.INT8,
        Fact.INT4,
        Fact.INT3,
        Fact.INT2,
        Fact.NF4,
        Fact.TERNARY,
        Fact.BINARY,
        Fact.CODEBOOK,
    }
)


def facts(*words: Fact) -> Facts:
    """The set of `words`."""
    return frozenset(words)


def spell(words: Facts) -> str:
    """`words` in vocabulary order, for messages: `float, dense`."""
    return ", ".join(word.value for word in Fact if word in words) or "none"
