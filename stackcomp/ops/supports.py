"""Packing of supports: which entries of a sparse matrix are stored, in as few bytes as the choice can be
written in.

Letters: a matrix has `rows` rows and `blocks` blocks of b columns; a block of a row keeps s of its b columns
(`nonzeros`). A *rank* is the number of such a subset among all C(b, s), by the combinatorial number system
(subset c_1 < ... < c_s, counted from 0):

    rank = sum_i C(c_i, i)

which needs log2 C(b, s) bits: the smallest any fixed-length code can be. Small ranks are put together into
words of at most 63 bits (mixed radix C(b, s), first rank lowest); large ones are written alone. Words follow
each other without gaps, lowest bit first.

Everything is exact: ranks below 2^63 in 64-bit integers, larger ones in limbs of 30 bits.
"""

import math

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from stackcomp.core.errors import CheckpointError
from stackcomp.core.matrices import Fixed, word_bits

DOUBLE_LIMBS = 34  # up to here a number fits a double
LIMB_BITS = 30  # a limb plus a carry, and the sum of 2^33 limbs, fit a signed 64-bit integer
GUESS_SLACK = 1e-11  # bits: far above the rounding error of the logarithm of a rank, far below the gap between those of table entries


def pack_fixed(indices: Int64[Tensor, "rows blocks s"], b: int) -> UInt8[Tensor, " bytes"]:
    """Pack the supports of all blocks into exactly `Fixed(block=b, nonzeros=s).support_bytes(rows, blocks *
    b)` bytes.

    indices are the kept columns of a block, counted from its start, ascending. Raises ValueError when they
    are not.
    """
    rows, blocks, s = indices.shape
    layout = Fixed(block=b, nonzeros=s)
    picked = indices.reshape(rows * blocks, s).cpu().numpy()
    if picked.size and (picked.min() < 0 or picked.max() >= b or (np.diff(picked, axis=1) <= 0).any()):
        raise ValueError(f"the indices of a support must ascend from 0 to block - 1 = {b - 1} in every block")
    if layout.choices == 1 or picked.size == 0:
        return torch.empty(0, dtype=torch.uint8, device=indices.device)
    offsets = picked - np.arange(s)  # c_i - (i - 1): the column of the table
    if _fits_word(layout):
        table = np.array(_table(b, s), dtype=np.int64)
        ranks = table[np.arange(s), offsets].sum(axis=1)
        bits = _bits_of_words(ranks, layout)
    else:
        limbs = _limbs_of([entry for row in _table(b, s) for entry in row], layout.choices)
        table = limbs.reshape(s, b - s + 1, -1)
        bits = _bits_of_limbs(_carry(table[np.arange(s), offsets].sum(axis=1)), layout.choices)
    packed = np.packbits(bits, bitorder="little")
    return torch.from_numpy(packed).to(indices.device)


def unpack_fixed(
    packed: UInt8[Tensor, " bytes"], layout: Fixed, rows: int, blocks: int
) -> Int64[Tensor, "rows blocks s"]:
    """The indices that `pack_fixed` packed; raises CheckpointError when the bytes encode no support."""
    b, s = layout.block, layout.nonzeros
    count = rows * blocks
    if packed.numel() != layout.support_bytes(rows, blocks * b):
        raise CheckpointError(
            f"a support of {rows} x {blocks * b} in {layout} takes {layout.support_bytes(rows, blocks * b)} bytes, "
            f"not {packed.numel()}: copy or save the checkpoint again"
        )
    if layout.choices == 1 or count == 0:
        return torch.arange(b, device=packed.device).repeat(rows, blocks, 1)
    bits = np.unpackbits(packed.cpu().numpy(), bitorder="little")
    if _fits_word(layout):
        picked = _unrank_words(_words_of_bits(bits, layout, count), b, s)
    else:
        picked = _unrank_limbs(_limbs_of_bits(bits, layout.choices, count), b, s)
    return torch.from_numpy(picked).view(rows, blocks, s).to(packed.device)


def pack_free(mask: Bool[Tensor, "rows cols"]) -> UInt8[Tensor, " bytes"]:
    """The bitmap of `mask`, row-major, lowest bit first: ceil(rows * cols / 8) bytes."""
    return torch.from_numpy(np.packbits(mask.reshape(-1).cpu().numpy(), bitorder="little")).to(mask.device)


def unpack_free(
    packed: UInt8[Tensor, " bytes"], nonzeros: int, rows: int, cols: int
) -> Bool[Tensor, "rows cols"]:
    """The mask that `pack_free` packed; raises CheckpointError unless it holds exactly `nonzeros` entries."""
    bits = np.unpackbits(packed.cpu().numpy(), bitorder="little")
    held = int(bits.sum())
    if packed.numel() != -(-rows * cols // 8) or held != nonzeros:
        raise CheckpointError(
            f"a bitmap of {packed.numel()} bytes holds {held} entries, where {nonzeros} of {rows} x {cols} are expected: "
            "copy or save the checkpoint again"
        )
    return torch.from_numpy(bits[: rows * cols].astype(bool)).view(rows, cols).to(packed.device)


def _fits_word(layout: Fixed) -> bool:
    """Whether ranks are handled as 64-bit integers."""
    return layout.choices.bit_length() <= 63


def _table(b: int, s: int) -> list[list[int]]:
    """Entry [i - 1][d] is C(i - 1 + d, i): what c_i = i - 1 + d adds to a rank; only subsets that exist, so
    no entry exceeds C(b, s).
    """
    return [[math.comb(i + d, i + 1) for d in range(b - s + 1)] for i in range(s)]


def _bits_of_words(ranks: np.ndarray, layout: Fixed) -> np.ndarray:
    """Ranks (count,) put together into words, as one array of bits."""
    per_word = layout.ranks_per_word
    radix = np.int64(layout.choices) ** np.arange(per_word, dtype=np.int64)
    full = len(ranks) // per_word
    words = (ranks[: full * per_word].reshape(full, per_word) * radix).sum(axis=1)
    rest = ranks[full * per_word :]
    last = (rest * radix[: len(rest)]).sum(keepdims=True)[: len(rest)]
    return np.concatenate(
        [
            _split(words, word_bits(layout.choices, per_word)),
            _split(last, word_bits(layout.choices, len(rest)) if len(rest) else 0),
        ]
    )


def _words_of_bits(bits: np.ndarray, layout: Fixed, count: int) -> np.ndarray:
    """The ranks (count,) that `_bits_of_words` wrote."""
    per_word = layout.ranks_per_word
    full, rest = divmod(count, per_word)
    width = word_bits(layout.choices, per_word)
    words = _join(bits[: full * width].reshape(full, width))
    if per_word == 1:
        return words
    ranks = [_digits(words, layout.choices, per_word)]
    if rest:
        tail = word_bits(layout.choices, rest)
        ranks.append(
            _digits(_join(bits[full * width : full * width + tail].reshape(1, tail)), layout.choices, rest)
        )
    return np.concatenate(ranks)


def _digits(words: np.ndarray, radix: int, count: int) -> np.ndarray:
    """The `count` digits of each word, lowest first, in one row; the last digit keeps what is too large, so
    that damage shows.
    """
    digits = np.empty((len(words), count), dtype=np.int64)
    for position in range(count - 1):
        words, digits[:, position] = np.divmod(words, radix)
    digits[:, -1] = words
    return digits.reshape(-1)


def _split(words: np.ndarray, width: int) -> np.ndarray:
    """The lowest `width` bits of each word, as bytes 0 and 1 in one row."""
    return ((words[:, None] >> np.arange(width)) & 1).astype(np.uint8).reshape(-1)


def _join(bits: np.ndarray) -> np.ndarray:
    """Words (count,) of their bits (count, width)."""
    words = np.zeros(len(bits), dtype=np.int64)
    for position in range(bits.shape[1]):
        words |= bits[:, position].astype(np.int64) << position
    return words


def _unrank_words(ranks: np.ndarray, b: int, s: int) -> np.ndarray:
    """Subsets (count, s) of their ranks: greedily the largest column whose entry does not exceed what is left
    of the rank.
    """
    picked = np.empty((len(ranks), s), dtype=np.int64)
    for i, entries in reversed(list(enumerate(np.array(_table(b, s), dtype=np.int64)))):
        column = np.searchsorted(entries, ranks, side="right") - 1
        ranks = ranks - entries[column]
        picked[:, i] = column + i
    return _checked(picked, ranks)


def _unrank_limbs(ranks: np.ndarray, b: int, s: int) -> np.ndarray:
    """The same for ranks (count, limbs): a guess by logarithms, at most one too high, is put right exactly."""
    rows = _table(b, s)
    picked = np.empty((len(ranks), s), dtype=np.int64)
    for i in range(s - 1, -1, -1):
        entries = _limbs_of(rows[i], math.comb(b, s))
        guesses = [math.log2(entry) if entry else -math.inf for entry in rows[i]]
        column = np.searchsorted(guesses, _log2(ranks) + GUESS_SLACK, side="right") - 1
        left = _carry(ranks - entries[column])
        high = left[:, -1] < 0
        column[high] -= 1
        left[high] = _carry(ranks[high] - entries[column[high]])
        ranks = left
        picked[:, i] = column + i
    return _checked(picked, ranks)


def _log2(limbs: np.ndarray) -> np.ndarray:
    """Logarithms of numbers as limbs, -inf of 0. A number that a double may not hold is read by its highest three limbs."""
    top = np.zeros(len(limbs), dtype=np.int64)
    if limbs.shape[1] > DOUBLE_LIMBS:
        used = limbs[:, :1:-1] != 0  # from the highest on
        used[:, -1] = True
        top = used.shape[1] - 1 - used.argmax(axis=1)
        limbs = limbs[np.arange(len(limbs))[:, None], top[:, None] + np.arange(3)]
    places = np.float64(2.0) ** (LIMB_BITS * np.arange(limbs.shape[1]))
    with np.errstate(divide="ignore"):
        return np.log2(limbs @ places) + LIMB_BITS * top


def _checked(picked: np.ndarray, left: np.ndarray) -> np.ndarray:
    if left.any() or (np.diff(picked, axis=1) <= 0).any() or (picked < 0).any():
        raise CheckpointError(
            "a packed support holds a number that stands for no support: copy or save the checkpoint again"
        )
    return picked


def _limb_count(choices: int) -> int:
    """Limbs of a rank: its bits, and one more for the sign of a difference."""
    return -(-(choices.bit_length() + 1) // LIMB_BITS)


def _limbs_of(numbers: list[int], choices: int) -> np.ndarray:
    """Numbers as limbs (count, limbs), lowest first."""
    mask = (1 << LIMB_BITS) - 1
    shifts = [LIMB_BITS * place for place in range(_limb_count(choices))]
    return np.array([[(number >> shift) & mask for shift in shifts] for number in numbers], dtype=np.int64)


def _carry(limbs: np.ndarray) -> np.ndarray:
    """Bring every limb but the highest into its range; the sign of the highest is that of the number."""
    limbs = limbs.copy()
    for place in range(limbs.shape[1] - 1):
        limbs[:, place + 1] += limbs[:, place] >> LIMB_BITS
        limbs[:, place] &= (1 << LIMB_BITS) - 1
    return limbs


def _bits_of_limbs(limbs: np.ndarray, choices: int) -> np.ndarray:
    bits = _split(limbs.reshape(-1), LIMB_BITS).reshape(len(limbs), -1)
    return bits[:, : word_bits(choices, 1)].reshape(-1)


def _limbs_of_bits(bits: np.ndarray, choices: int, count: int) -> np.ndarray:
    width = word_bits(choices, 1)
    padded = np.zeros((count, _limb_count(choices) * LIMB_BITS), dtype=np.uint8)
    padded[:, :width] = bits[: count * width].reshape(count, width)
    return _join(padded.reshape(-1, LIMB_BITS)).reshape(count, -1)
