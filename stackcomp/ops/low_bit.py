"""Values rounded to a few levels in small groups that share a scale, and their packing without a gap.

Letters: values stand in `lines` lines of `length` stored values; a line is cut into groups of `group` consecutive
values, the last of which may be shorter; b is bits. Group-wise scales are those of Q-BERT (arXiv:1909.05840).

A value is read as

    value = scale * level(code),

with one scale a group, and a group of zeros has the scale zero and stays zero. By coding:

    int4, int3, int2    code in {-2^(b-1), ..., 2^(b-1) - 1},    level = code + 1/4
    ternary             code in {-1, 0, 1},                      level = code
    binary              code in {-1, 0},                         level = code + 1/2
    nf4                 code in {0, ..., 15},                    level = one of 16 quantiles of a normal distribution

Scales of integers have either sign: it turns the longer end of the grid to where the group needs it. On Gaussian
groups of 32 the quarter left the least squared error at every width: 0.0978, 0.0261 and 0.0065 of the variance at 2, 3
and 4 bits, where whole levels (code + 0) leave 0.110, 0.0263 and 0.0066, and symmetric ones (code + 1/2) 0.107, 0.0292
and 0.0073. They are searched for.

Ternary and binary scales are positive, and exactly those of least squares. Ternary: of the values by falling magnitude
the first k are kept, at their mean magnitude, where k makes (sum of what is kept)^2 / k largest. Li et al.
(arXiv:1605.04711) state this problem, and guess the threshold from the mean magnitude of all. Binary: half of the scale
is the mean magnitude (XNOR-Net, arXiv:1603.05279). With weights, sums and counts are weighted. On the groups above they
leave 0.178 and 0.353.

The scale of nf4 (QLoRA, arXiv:2305.14314) is the largest magnitude, which its outermost levels -1 and 1 keep. It leaves
0.0076 there, and in groups of 64, which are the paper's, 0.0085, where int4 leaves 0.0082.

Codes are packed from 0 on: bit j of value i is bit i b + j of the bytes, lowest bit first. Ternary ones are packed by
fives: value i is digit i mod 5, lowest first, of byte floor(i / 5) in base 3.
"""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor

from stackcomp.core.matrices import TRITS, VALUE_BITS, Coding, packed_bytes
from stackcomp.core.settings import one_of, whole


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The levels code + offset, for the whole numbers `code` from `low` to `high`."""

    low: int
    high: int
    offset: float

    def codes(self, places: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The codes whose levels are nearest to `places`, which is overwritten."""
        return places.sub_(self.offset).round_().clamp_(self.low, self.high)

    def levels(self, codes: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The levels of codes, which are overwritten."""
        return codes.add_(self.offset)


class NormalFloat:
    """16 levels that hold about as many values each of a normal distribution: quantiles of even spacing on both sides of an
    exact zero, 7 below it and 8 above, as shares of the outermost. Codes count from 0."""

    low = 0

    def __init__(self) -> None:
        tail = (1 / 32 + 1 / 30) / 2  # of the distribution, beyond the last level: the paper's
        sides = [
            torch.special.ndtri(torch.linspace(0.5, 1 - tail, count + 1, dtype=torch.float64))[1:]
            for count in (7, 8)
        ]
        table = torch.cat([-sides[0].flip(0), torch.zeros(1), sides[1]]) / sides[0][-1]
        self.table = table.float()
        self.edges = ((table[1:] + table[:-1]) / 2).float()

    def codes(self, places: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The codes whose levels are nearest to `places`."""
        return torch.bucketize(places, self.edges.to(places.device)).to(places.dtype)

    def levels(self, codes: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The levels of codes."""
        return self.table.to(codes)[codes.int()]


GRIDS: dict[str, Grid | NormalFloat] = {
    "int8": Grid(low=-128, high=127, offset=0),  # of whole rows, see `ops.quantize`
    "int4": Grid(low=-8, high=7, offset=0.25),
    "int3": Grid(low=-4, high=3, offset=0.25),
    "int2": Grid(low=-2, high=1, offset=0.25),
    "nf4": NormalFloat(),
    "ternary": Grid(low=-1, high=1, offset=0),
    "binary": Grid(low=-1, high=0, offset=0.5),
}
GROUPED = tuple(coding for coding in GRIDS if coding != "int8")
TRIES = 12  # scales compared for each end of the grid: 6 leave up to 5 percent more squared error, 40 up to 1 percent less
NARROWEST = 0.5  # the smallest scale compared, as a share of the one that clips nothing
CLIP = 1.01  # keeps the largest value on the last level, so that rounding again finds the same scale
TILE = 1 << 16  # values searched at a time: they stay in the cache
_WHOLE = {4: torch.int32, 8: torch.int64, 16: torch.complex128}  # by their bytes
_POWERS = 3 ** torch.arange(TRITS, dtype=torch.uint8)
_DIGITS = torch.arange(256, dtype=torch.uint8)[:, None] // _POWERS % 3  # of every byte in base 3


def quantize_groups(
    values: Float[Tensor, "lines length"],
    coding: Coding,
    group: int,
    *,
    scale_dtype: torch.dtype = torch.float16,
    weights: Float[Tensor, "lines length"] | None = None,
    tries: int = TRIES,
) -> tuple[UInt8[Tensor, "lines length"], Float[Tensor, "lines groups"]]:
    """Codes from 0 on, and scales in `scale_dtype`, with the least sum of weights * (value - rounded)^2 found.

    Of integers `2 tries` scales of each group are compared, among them the one that clips nothing; each is first
    replaced by the least-squares one for the codes it gives, as it will be stored. weights: importance of each value,
    at least zero. What `round_groups` gave is stored exactly, whatever the tries (with 16-bit scales, in float32).
    Raises SettingError for int8, whose scales are those of rows, and for a group or tries below 1.
    """
    one_of("coding", coding, GROUPED)
    whole("group", group, 1)
    whole("tries", tries, 1)
    parts = _groups(values, group)
    shares = [None] * len(parts) if weights is None else _groups(weights, group)
    found = [
        _quantize(part, coding, scale_dtype, share, tries) for part, share in zip(parts, shares, strict=True)
    ]
    codes, scales = ([pair[i] for pair in found] for i in range(2))
    return torch.cat([part.flatten(1) for part in codes], dim=1), torch.cat(scales, dim=1)


def dequantize_groups(
    codes: UInt8[Tensor, "lines length"], scales: Float[Tensor, "lines groups"], coding: Coding, group: int
) -> Float[Tensor, "lines length"]:
    """The values that codes and scales stand for, in the dtype of the scales; the gradient reaches the scales."""
    return scaled(levels(codes, coding, scales.dtype), scales, group)


def scaled(
    places: Float[Tensor, "lines length"], scales: Float[Tensor, "lines groups"], group: int
) -> Float[Tensor, "lines length"]:
    """Levels times the scales of their groups; `places` is overwritten where no gradient is asked for."""
    parts = _groups(places, group)
    shares = scales.split([parts[0].shape[1], *[1] * (len(parts) - 1)], dim=1)
    product = torch.mul if scales.requires_grad else Tensor.mul_
    found = [product(part, share[..., None]).flatten(1) for part, share in zip(parts, shares, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def per_value(
    scales: Float[Tensor, "lines groups"], group: int, length: int
) -> Float[Tensor, "lines length"]:
    """The scale of every value."""
    return scales.unsqueeze(-1).expand(-1, -1, group).flatten(1)[:, :length]


def refit_scales(
    values: Float[Tensor, "lines length"], places: Float[Tensor, "lines length"], group: int
) -> Float[Tensor, "lines groups"]:
    """The least-squares scales of values that stand at these `places` of the grid (their levels): sum(value * place) / sum(place^2)."""
    sums = (
        [torch.linalg.vecdot(a, b) for a, b in zip(_groups(part, group), _groups(places, group), strict=True)]
        for part in (values, places)
    )
    cross, square = (torch.cat(parts, dim=1) for parts in sums)
    return cross / square.clamp(min=torch.finfo(torch.float32).tiny)


def levels(codes: UInt8[Tensor, "*n"], coding: Coding, dtype: torch.dtype) -> Float[Tensor, "*n"]:
    """Where codes stand on the grid: what a scale is multiplied with."""
    grid = GRIDS[coding]
    return grid.levels(codes.to(dtype) + grid.low)


def round_groups(
    values: Float[Tensor, "lines length"],
    coding: Coding,
    group: int,
    *,
    scale_dtype: torch.dtype = torch.float16,
    weights: Float[Tensor, "lines length"] | None = None,
    tries: int = TRIES,
) -> Float[Tensor, "lines length"]:
    """The values as they would be read after they were stored with these settings, in their own dtype; no gradient.

    Rounding the result again changes nothing, and storing it loses nothing (with 16-bit scales, in float32).
    Fewer `tries` are faster.
    """
    codes, scales = quantize_groups(
        values, coding, group, scale_dtype=scale_dtype, weights=weights, tries=tries
    )
    return dequantize_groups(codes, scales.float(), coding, group).to(values.dtype)


def pack(codes: UInt8[Tensor, " n"], coding: Coding) -> UInt8[Tensor, " bytes"]:
    """Codes side by side in as few bytes as `packed_bytes` says, the last one filled up with zeros."""
    if coding == "ternary":
        digits = torch.nn.functional.pad(codes, (0, -len(codes) % TRITS)).view(-1, TRITS)
        return (digits * _POWERS.to(codes.device)).sum(1, dtype=torch.uint8)
    bits = _bits(coding)
    words = torch.nn.functional.pad(codes, (0, -len(codes) % 8)).view(torch.int64)  # a code a byte
    for values in (1, 2, 4):
        size = bits * values
        words = words & _mask(size, 0, values) | words >> 8 * values - size & _mask(size, size, values)
    return words.view(torch.uint8).view(-1, 8)[:, :bits].flatten()[: packed_bytes(len(codes), bits)]


def unpack(packed: UInt8[Tensor, " bytes"], coding: Coding, count: int) -> UInt8[Tensor, " n"]:
    """The first `count` codes that `pack` packed."""
    if coding == "ternary":
        return _DIGITS.to(packed.device).index_select(0, packed.int()).flatten()[:count]
    bits = _bits(coding)
    words = torch.nn.functional.pad(packed, (0, -len(packed) % bits)).view(-1, bits)  # 8 codes a row
    words = torch.nn.functional.pad(words, (0, 8 - bits)).flatten().view(torch.int64)
    for values in (4, 2, 1):
        size = bits * values
        words = words & _mask(size, 0, values) | words << 8 * values - size & _mask(size, 8 * values, values)
    return words.view(torch.uint8)[:count]


def look_up(
    packed: UInt8[Tensor, " bytes"], coding: Coding, count: int, values: Float[Tensor, " codes"]
) -> Float[Tensor, " n"]:
    """The values of the first `count` codes that `pack` packed: values[code]. The gradient reaches `values`.

    One pass over the bytes, each of which (or each 12 bits of codes of 3) picks the values of all its codes from a table. Without a
    gradient they are picked as one number of their size, where there is such a dtype: four times as fast.
    """
    table = _table(coding)
    if table is None:
        return values.index_select(0, unpack(packed, coding, count).int())
    held = values[table.to(packed.device)]
    words = _words(packed, coding)
    whole = None if held.requires_grad else _WHOLE.get(held[0].nbytes)
    if whole is None:
        return held.index_select(0, words).flatten()[:count]
    return held.view(whole).squeeze(1).index_select(0, words).view(values.dtype)[:count]


def grid_of(coding: Coding, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " codes"]:
    """Where every code stands on the grid."""
    grid = GRIDS[coding]
    count = len(grid.table) if isinstance(grid, NormalFloat) else grid.high - grid.low + 1
    return levels(torch.arange(count, dtype=torch.uint8, device=device), coding, dtype)


def take(packed: UInt8[Tensor, " bytes"], coding: Coding, places: Int64[Tensor, "*t"]) -> UInt8[Tensor, "*t"]:
    """The codes at `places`, without unpacking the others."""
    if coding == "ternary":
        return _DIGITS.to(packed.device)[packed[places // TRITS].int(), places % TRITS]
    bits = _bits(coding)
    first = places * bits
    byte = first >> 3
    low = packed[byte].int()
    high = packed[(byte + 1).clamp_(max=len(packed) - 1)].int()
    return ((low | high << 8) >> (first & 7)).bitwise_and_(2**bits - 1).to(torch.uint8)


def stored_scales(scales: Float[Tensor, "*n"], dtype: torch.dtype) -> Float[Tensor, "*n"]:
    """Scales as their stored dtype keeps them, in their own dtype; the gradient passes straight through."""
    with torch.no_grad():
        limit = torch.finfo(dtype).max
        rounded = scales.clamp(-limit, limit).to(dtype).to(scales.dtype)
    return scales + (rounded - scales).detach() if scales.requires_grad else rounded


@cache
@torch.inference_mode(mode=False)  # it outlives the first call
def _table(coding: Coding) -> Int64[Tensor, "words codes"] | None:
    """The codes of every word, as `_words` has them: what a byte holds, or of codes of 3 bits what 12 bits do. None of codes of other
    lengths."""
    if coding == "ternary":
        return _DIGITS.long()
    bits = _bits(coding)
    if bits == 3:
        low, high = torch.arange(4096).view(-1, 2).unbind(1)
        three = [low & 255, low >> 8 | (high & 15) << 4, high >> 4]
        packed = torch.stack(three, dim=1).to(torch.uint8).flatten()
    elif 8 % bits:
        return None
    else:
        packed = torch.arange(256, dtype=torch.uint8)
    codes = unpack(packed, coding, 8 * len(packed) // bits)
    return codes.view(-1, 4 if bits == 3 else 8 // bits).long()


def _words(packed: UInt8[Tensor, " bytes"], coding: Coding) -> Int[Tensor, " words"]:
    """The bytes in words of whole codes."""
    if coding == "ternary" or _bits(coding) != 3:
        return packed.int()
    three = torch.nn.functional.pad(packed, (0, -len(packed) % 3)).view(-1, 3).int().unbind(1)
    return torch.stack([three[0] | (three[1] & 15) << 8, three[1] >> 4 | three[2] << 4], dim=1).flatten()


def _bits(coding: Coding) -> int:
    """Bits of a code that has whole ones."""
    return int(VALUE_BITS[coding])


def _mask(size: int, first: int, half: int) -> int:
    """`size` bits from bit `first` on of every `2 * half` bytes of a 64-bit word, as torch reads it."""
    unit = (2**size - 1 << first).to_bytes(2 * half, "little")
    return int.from_bytes(unit * (4 // half), "little", signed=True)


def _groups(matrix: Tensor, group: int) -> list[Tensor]:
    """The groups of `group` values of all lines, and the shorter ones at their ends: (lines, groups, values) each."""
    count, rest = divmod(matrix.shape[1], group)
    full = matrix[:, : count * group].unflatten(1, (count, group))
    return [full, matrix[:, None, count * group :]] if rest else [full]


def _quantize(
    groups: Float[Tensor, "lines groups m"],
    coding: Coding,
    dtype: torch.dtype,
    weights: Float[Tensor, "lines groups m"] | None,
    tries: int,
) -> tuple[UInt8[Tensor, "lines groups m"], Float[Tensor, "lines groups"]]:
    """Codes and scales of all groups of one length, tile by tile."""
    grid = GRIDS[coding]
    rows = groups.flatten(0, 1)
    tile = max(1, TILE // rows.shape[1])
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    scales = torch.empty(len(rows), dtype=dtype, device=rows.device)
    for start in range(0, len(rows), tile):
        part = slice(start, start + tile)
        values = rows[part].detach().float()
        weight = None if weights is None else weights.flatten(0, 1)[part].detach().float()
        found = _search(values, weight, grid, dtype, tries)
        scales[part] = found.to(dtype)
        inverse = torch.where(found == 0, 0, 1 / found)
        codes[part] = grid.codes(values * inverse[:, None]).sub_(grid.low)
    return codes.view(groups.shape), scales.view(groups.shape[:2])


def _search(
    values: Float[Tensor, "n m"],
    weights: Float[Tensor, "n m"] | None,
    grid: Grid | NormalFloat,
    dtype: torch.dtype,
    tries: int,
) -> Float[Tensor, " n"]:
    """The best scale found for every group (a row), as `dtype` keeps it.

    With x the value of a group that is largest in magnitude, a scale is x / place, where place is where on the grid
    x comes to stand.
    """
    x = values.gather(1, values.abs().argmax(1, keepdim=True))
    unit = torch.where(x == 0, 1, x)
    ratios = values / unit
    x, unit = x.squeeze(1), unit.squeeze(1)
    if isinstance(grid, NormalFloat):
        return stored_scales(x.abs(), dtype)
    if grid.high - grid.low < 3:  # ternary or binary
        return stored_scales(_exact(ratios, weights, grid) * x.abs(), dtype)
    scales, losses = [], []
    for place in _places(grid, tries):
        found = grid.levels(grid.codes(ratios * place))
        weighted = found if weights is None else found * weights
        cross = torch.linalg.vecdot(weighted, ratios)
        square = torch.linalg.vecdot(weighted, found).clamp_(min=torch.finfo(torch.float32).tiny)
        limit = 1 / (CLIP * _nearest(place, grid))
        step = (cross / square).clamp_(min(limit, 0), max(limit, 0))
        scales.append(stored_scales(step * x, dtype))
        left = torch.addcmul(ratios, found, (scales[-1] / unit)[:, None], value=-1)
        losses.append(torch.linalg.vecdot(left if weights is None else left * weights, left))
    best = torch.stack(losses).argmin(0, keepdim=True)
    return torch.stack(scales).gather(0, best).squeeze(0)


def _exact(
    values: Float[Tensor, "n m"], weights: Float[Tensor, "n m"] | None, grid: Grid
) -> Float[Tensor, " n"]:
    """The scale of least squared error for every group (a row), on a ternary or binary grid."""
    sizes, order = values.abs().sort(dim=1, descending=True)
    shares = torch.ones_like(sizes) if weights is None else weights.gather(1, order)
    sums = (sizes * shares).cumsum(1)
    means = sums / shares.cumsum(1).clamp_(min=torch.finfo(torch.float32).tiny)
    if grid.offset:  # no level at zero: all values are kept
        return means[:, -1] / grid.offset
    return means.gather(1, (sums * means).argmax(1, keepdim=True)).squeeze(1)


def _places(grid: Grid, tries: int) -> list[float]:
    """Where the largest value of a group is put: on the first and the last level, and around them."""
    places: list[float] = []
    for end in (grid.low + grid.offset, grid.high + grid.offset):
        near, far = CLIP * _nearest(end, grid), end / NARROWEST
        places += [end, *(near + (far - near) * i / max(tries - 2, 1) for i in range(tries - 1))]
    return places


def _nearest(place: float, grid: Grid) -> float:
    """The place nearest to zero that is still rounded to the last level on the side of `place`."""
    return grid.offset + (grid.high - 0.5 if place > 0 else grid.low + 0.5)
