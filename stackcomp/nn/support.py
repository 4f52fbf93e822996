"""Where the stored values of a matrix stand: supports packed and unpacked."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from stackcomp.core.matrices import Dense, Fixed, Free, Layout, MatrixSpec
from stackcomp.ops import supports


@dataclass
class Support:
    """Where the stored values stand. `packed` and `version` tell what it was decoded from."""

    packed: Tensor
    version: int | None
    form: MatrixSpec

    @cached_property
    def flat(self) -> Int64[Tensor, " nonzeros"]:
        """Position of every value in the row-major matrix."""
        return decode(self.packed, self.form.layout, self.form.rows, self.form.cols)

    @cached_property
    def rows(self) -> Int64[Tensor, " nonzeros"]:
        """Row of every value."""
        return self.flat // self.form.cols

    @cached_property
    def cols(self) -> Int64[Tensor, " nonzeros"]:
        """Column of every value."""
        return self.flat % self.form.cols

    @cached_property
    def by_row(self) -> tuple[Tensor, Tensor, None]:
        """Columns of the values row after row, and where each row starts."""
        return self.cols.int(), _starts(self.rows, self.form.rows), None

    @cached_property
    def by_column(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the values column after column, where each column starts, and the order that sorts the
        values so.
        """
        order = self.cols.argsort(stable=True)
        return self.rows[order].int(), _starts(self.cols[order], self.form.cols), order

    def of_rows(self, ids: Int64[Tensor, "*t"]) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
        """Of the stored values in the rows `ids`: their places in these rows put together, and which they are."""
        columns, starts, _ = self.by_row
        wanted = ids.flatten()
        first = starts[wanted].long()
        lengths = starts[wanted + 1].long() - first
        row = torch.repeat_interleave(torch.arange(len(wanted), device=ids.device), lengths)
        before = lengths.cumsum(0) - lengths
        entries = torch.arange(len(row), device=ids.device) + (first - before)[row]
        return row * self.form.cols + columns[entries].long(), entries


def _starts(sorted_places: Tensor, count: int) -> Tensor:
    edges = torch.arange(count + 1, device=sorted_places.device)
    return torch.searchsorted(sorted_places.contiguous(), edges).int()


def decode(packed: Tensor, layout: Layout, rows: int, cols: int) -> Int64[Tensor, " nonzeros"]:
    """Row-major positions of the entries that a packed support holds, ascending."""
    if isinstance(layout, Fixed):
        blocks = cols // layout.block
        picked = supports.unpack_fixed(packed, layout, rows, blocks).view(rows * blocks, -1)
        return (picked + layout.block * torch.arange(rows * blocks, device=packed.device)[:, None]).flatten()
    assert not isinstance(layout, Dense)
    down, across = layout.block
    mask = supports.unpack_free(packed, layout.nonzeros // layout.area, rows // down, cols // across)
    mask = mask.repeat_interleave(down, 0).repeat_interleave(across, 1)
    return mask.flatten().nonzero().squeeze(1)


def encode(layout: Layout, mask: Bool[Tensor, "rows cols"]) -> Tensor:
    """The packed support of `mask`. Raises ValueError when a block of a `Fixed` layout does not keep its
    number of entries, and one of a `Free` layout some of its entries only.
    """
    if isinstance(layout, Free):
        down, across = layout.block
        first = mask[::down, ::across]
        if (first.repeat_interleave(down, 0).repeat_interleave(across, 1) != mask).any():
            raise ValueError(f"blocks of {down} x {across} must be kept whole")
        return supports.pack_free(first)
    assert isinstance(layout, Fixed)
    grouped = mask.unflatten(1, (-1, layout.block))
    if (grouped.sum(-1) != layout.nonzeros).any():
        raise ValueError(f"every block of {layout.block} columns must keep {layout.nonzeros} entries")
    columns = grouped.nonzero()[:, 2]
    return supports.pack_fixed(columns.view(*grouped.shape[:2], layout.nonzeros), layout.block)
