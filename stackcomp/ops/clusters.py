"""Values replaced by codes into a few shared values, by k-means in one dimension (Deep Compression, arXiv:1510.00149).

Letters: there are `books` lines of n values, each with a codebook of k ascending levels; x_1 <= ... <= x_n are the values of a line, sorted
once. k - 1 cuts part them into k cells, cell j from bound j to bound j + 1, and the level of a cell is its mean.

The first cuts are the best of m candidates, found by dynamic programming over all choices of them. Half of the candidates part the values
into equal counts, half the sum of (x_{i+1} - x_i)^(2/3) into equal shares: gaps are inverse to the density p of values, so that this sum is
an integral of p^(1/3), which is how dense levels are best where they are many (Panter and Dite, 1951). Where a line has no more than m / 2
distinct values, every cut is a candidate, and the result is the best there is.

Lloyd's rounds follow: each value goes to the nearest level, and levels to the means of what they have by then. A round looks up k - 1
places among the sorted values and takes differences of running sums; there is no n x k matrix of distances.
"""

import torch
from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor
from torch.nn.functional import pad

from stackcomp.core.settings import whole
from stackcomp.ops.low_bit import stored_scales

ROUNDS = 30  # at most
CANDIDATES = 128  # m, and at least twice as many as levels
TILE = 1 << 17  # sums compared at a time: they stay in the cache


def cluster(
    values: Float[Tensor, "books n"],
    bits: int,
    *,
    level_dtype: torch.dtype = torch.float16,
    rounds: int = ROUNDS,
) -> tuple[UInt8[Tensor, "books n"], Float[Tensor, "books levels"]]:
    """Codes, and 2^bits ascending levels a line in `level_dtype`: every value has the code of the level nearest to it, as it is stored.

    Raises SettingError for bits outside 1 to 8 and rounds below 0.
    """
    whole("bits", bits, 1, 8)
    whole("rounds", rounds, 0)
    values = values.detach().float().contiguous()
    levels = stored_scales(_levels(values.sort(1).values, 2**bits, rounds), level_dtype)
    codes = torch.searchsorted(_middles(levels), values, out_int32=True).to(torch.uint8)
    return codes, levels.to(level_dtype)


def look_up(
    codebooks: Float[Tensor, "books levels"], codes: UInt8[Tensor, "*n"], book: Int[Tensor, "*#n"]
) -> Float[Tensor, "*n"]:
    """The values that codes stand for, each in the codebook with the number `book`. The gradient of a level is the sum of those of its
    values, taken in float32 at least."""
    places = codes + codebooks.shape[1] * book
    wide = codebooks.flatten().to(torch.promote_types(codebooks.dtype, torch.float32))
    return wide.index_select(0, places.flatten()).view(places.shape).to(codebooks.dtype)


def _levels(x: Float[Tensor, "books n"], k: int, rounds: int) -> Float[Tensor, "books k"]:
    """The levels of sorted values."""
    if x.shape[1] == 0:
        return x.new_zeros(len(x), k)
    sums = pad(x.cumsum(1, dtype=torch.float64), (1, 0))
    candidates = _candidates(x, max(CANDIDATES, 2 * k))
    tile = max(1, TILE // candidates.shape[1] ** 2)
    tiles = zip(candidates.split(tile), sums.split(tile), strict=True)
    bounds = torch.cat([_best(*each, k) for each in tiles])
    for _ in range(rounds):
        moved = _nearest(x, _means(x, sums, bounds))
        if torch.equal(moved, bounds):
            break
        bounds = moved
    return _means(x, sums, bounds)


def _candidates(x: Float[Tensor, "books n"], count: int) -> Int64[Tensor, "books m"]:
    """Bounds, of which `count` inner ones are where a cut may be best."""
    gaps = x.double().diff(dim=1)
    shares = [part / part.sum(1, keepdim=True).clamp(min=1e-300) for part in (gaps ** (2 / 3), gaps > 0)]
    reached = (shares[0] + shares[1]).cumsum(1)
    steps = torch.linspace(0, 2, count + 1, dtype=torch.float64, device=x.device)[1:]
    inner = torch.searchsorted(reached, steps.expand(len(x), -1).contiguous()) + 1
    return _ended(inner.clamp(max=x.shape[1] - 1), x.shape[1])


def _best(
    candidates: Int64[Tensor, "books m"], sums: Float[Tensor, "books sums"], k: int
) -> Int64[Tensor, "books ends"]:
    """The k - 1 of the candidates that leave the least squared error, which is the squares less the sum over cells of sum^2 / count. `sums`
    has at place i that of the first i values."""
    reached = sums.gather(1, candidates)
    count = candidates[:, :, None] - candidates[:, None, :]  # of a cell, by its end and its start
    won = (reached[:, :, None] - reached[:, None, :]).square_().div_(count.clamp(min=1))
    won.masked_fill_(
        torch.ones_like(won[0], dtype=torch.bool).triu(1), -torch.inf
    )  # it ends before it starts
    buffer = torch.empty_like(won)
    most = [won[:, :, 0]]  # with one cell more each time, by the end of the last
    for _ in range(k - 1):
        most.append(torch.add(won, most[-1][:, None], out=buffer).amax(2))
    place = torch.full_like(candidates[:, :1], candidates.shape[1] - 1)
    bounds = [candidates.gather(1, place)]
    for before in reversed(most[:-1]):
        cells = won.gather(1, place[:, :, None].expand(-1, -1, won.shape[2])).squeeze(1)
        place = (cells + before).argmax(1, keepdim=True)
        bounds.append(candidates.gather(1, place))
    return pad(torch.cat(bounds[::-1], dim=1), (1, 0))


def _means(
    x: Float[Tensor, "books n"], sums: Float[Tensor, "books sums"], bounds: Int64[Tensor, "books ends"]
) -> Float[Tensor, "books levels"]:
    """The mean of every cell; of an empty one the value at its place, which keeps levels ascending and raises no error."""
    counts = bounds.diff(dim=1)
    means = sums.gather(1, bounds).diff(dim=1) / counts.clamp(min=1)
    there = x.gather(1, bounds[:, :-1].clamp(max=x.shape[1] - 1))
    return torch.where(counts > 0, means.to(x.dtype), there)


def _nearest(x: Float[Tensor, "books n"], levels: Float[Tensor, "books k"]) -> Int64[Tensor, "books ends"]:
    """Bounds of the cells of the values that are nearest to each level."""
    return _ended(torch.searchsorted(x, _middles(levels)), x.shape[1])


def _ended(inner: Int64[Tensor, "books cuts"], n: int) -> Int64[Tensor, "books ends"]:
    """Inner bounds with those of the whole line around them."""
    return pad(pad(inner, (1, 0)), (0, 1), value=n)


def _middles(levels: Float[Tensor, "books k"]) -> Float[Tensor, "books inner"]:
    """The places half way between neighbouring levels."""
    return (levels[:, 1:] + levels[:, :-1]) / 2
