"""Matrices rounded one by one, as `nn.quantize` does those of a weight."""

from dataclasses import replace

from stackcomp.core.matrices import Coding
from stackcomp.nn.matrix import CODINGS, StoredMatrix
from stackcomp.nn.storing import encoded


def to_int8(matrix: StoredMatrix, *, axis: int, dynamic: bool) -> StoredMatrix:
    """int8, one scale a row (axis 0) or a column (axis 1)."""
    scale_axis = 0 if axis == 0 else 1
    form = replace(
        matrix.spec, coding="int8", scale_axis=scale_axis, scale_coding=CODINGS[matrix.dtype], dynamic=dynamic
    )
    return encoded(matrix, form)


def to_low_bit(matrix: StoredMatrix, *, coding: Coding, group: int | None) -> StoredMatrix:
    """Packed codes with float16 scales or shared values."""
    return encoded(matrix, replace(matrix.spec, coding=coding, group=group, scale_coding="float16"))
