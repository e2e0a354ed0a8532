"""The copy engine's descriptions of tensors, as the Hopper kernels read them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dilated_attention_pytorch.kernels.triton.views import Strides

_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def residue_views(x: Tensor, stride: int, rows: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """The view of a tensor `(B, N, H, D)` by rows of one residue, `[N / stride, columns]`, in blocks `[rows, D]`.

    Batch, residue and head are a column, the offset of their first row: rows beyond the last of a batch come as zeros,
    not as the next batch's. Where the stride does not divide N, the first residues have a row more than the others:
    the second view is theirs, and ends where the tensor does.
    """
    # Rows that every residue has, and how many residues have one more.
    length, longer = divmod(x.shape[1], stride)
    view = _view(x, length, stride, stride, rows)
    return view, _view(x, length + 1, longer, stride, rows) if longer else view


def unit_views(
    x: Tensor, stride: int, rows: int, columns: int
) -> tuple[TensorDescriptor, TensorDescriptor | None, Strides]:
    """The same of rows whose width is no power of two: `[units, N / stride, D]` in blocks `[1, rows, columns]`, whose
    columns beyond D come as zeros.

    Batch, residue and head are a number of *units*, the largest step that all their strides are multiples of; the
    strides are returned in units.
    """
    (strides,) = column_strides(x)
    unit = math.gcd(*strides) or x.shape[3]
    length, longer = divmod(x.shape[1], stride)

    def view(length: int, residues: int) -> TensorDescriptor:
        # The last place of so many residues; a block there needs D elements, not a unit of them.
        units = (columns_of(x, residues) - x.shape[3]) // unit + 1
        layout = gl.NVMMASharedLayout.get_default_for([1, rows, columns], _TYPES[x.dtype])
        shape, steps = [units, length, x.shape[3]], [unit, stride * x.stride(1), 1]
        return TensorDescriptor(x, shape, steps, [1, rows, columns], layout)

    found = view(length, stride), view(length + 1, longer) if longer else None
    return *found, Strides(*(s // unit for s in strides))


def stride_views(x: Tensor, strides: Sequence[int], rows: int, room: int) -> list[TensorDescriptor | None]:
    """The views of each stride, filled up with None to a kernel's room for them; then the longer residues' views.

    Where the last stride, a multiple of the others, divides N, no residue is longer: None for all.
    """
    every, longer = zip(*(residue_views(x, stride, rows) for stride in strides), strict=True)
    none = [None] * (room - len(every))
    return [*every, *none, *(longer if x.shape[1] % strides[-1] else [None] * len(every)), *none]


def columns_of(x: Tensor, residues: int) -> int:
    """How many elements lie between a tensor's first and the end of the first rows of so many residues."""
    batch, _, heads, width = x.shape
    return (batch - 1) * x.stride(0) + (residues - 1) * x.stride(1) + (heads - 1) * x.stride(2) + width


def column_strides(*tensors: Tensor) -> tuple[Strides, ...]:
    """Strides that lead to a column, each below 2^31 as `columns_of` is: 0 where a dimension has one index only."""
    found = (Strides(*(x.stride(i) if x.shape[i] > 1 else 0 for i in range(3))) for x in tensors)
    return tuple(found)


def _view(x: Tensor, length: int, residues: int, stride: int, rows: int) -> TensorDescriptor:
    width = x.shape[3]
    layout = gl.NVMMASharedLayout.get_default_for([rows, width], _TYPES[x.dtype])
    return TensorDescriptor(x, [length, columns_of(x, residues)], [stride * x.stride(1), 1], [rows, width], layout)
