"""How kernels reach a tensor's rows: by its strides, or through views by which the copy engine (TMA) loads tiles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dilated_attention_pytorch.kernels.triton.support import interpreting

# How a kernel loads the tiles of its walk: through plain pointers, or through a view of rank 2 or 5. A ragged view
# lacks the last rows of a length that the rate does not divide: tiles that may hold them go through pointers.
POINTERS, FLAT, STRIDED, RAGGED = 0, 1, 2, 3


class Strides(NamedTuple):
    """The strides of a tensor `(B, N, H, D)` whose rows are dense. Kernels are specialised on each of them."""

    batch: int
    row: int
    head: int


class ViewPair(NamedTuple):
    """The views of two tensors that a walk loads together, K and V or Q and dO, and their kind."""

    kind: int
    a: TensorDescriptor | None
    b: TensorDescriptor | None


NO_VIEWS = ViewPair(POINTERS, None, None)


def strides_of(*tensors: Tensor) -> tuple[Strides, ...]:
    return tuple(Strides(*x.stride()[:3]) for x in tensors)


def flat_views(a: Tensor, b: Tensor, rate: int, rows: int) -> ViewPair:
    """The views `[B * N / rate, rate * row]` of tensors `(B, N, H, D)` in tiles of `rows`; none where the copy engine
    cannot have them."""
    views = _flat(a, rate, rows), _flat(b, rate, rows)
    return NO_VIEWS if None in views else ViewPair(FLAT, *views)


def strided_views(a: Tensor, b: Tensor, rate: int, rows: int, block_d: int) -> ViewPair:
    """The views `[B, rate, H, N // rate, D]`. Unlike `flat_views` they take any D: columns from D on come as zeros."""
    is_ragged = a.shape[1] % rate > 0
    # Triton 3.6 compiles the short tile of fp32 rows that a ragged view lacks wrongly for 8 warps: on an H200 dK and dV
    # were off by 1e-4 at best, and foreign memory was touched at worst.
    if is_ragged and a.dtype == torch.float32 and not interpreting():
        return NO_VIEWS
    views = _strided(a, rate, rows, block_d), _strided(b, rate, rows, block_d)
    return NO_VIEWS if None in views else ViewPair(RAGGED if is_ragged else STRIDED, *views)


def _flat(x: Tensor, rate: int, rows: int) -> TensorDescriptor | None:
    batch, n, heads, width = x.shape
    strides = Strides(*x.stride()[:3])
    if not _aligned(x, strides) or width & (width - 1) or width < 16 or n < rate:
        return None
    # One stride leads from each row of a residue to the next, also into the next row of the batch.
    if n % rate or (batch > 1 and strides.batch != n * strides.row):
        return None
    columns = (rate - 1) * strides.row + (heads - 1) * strides.head + width
    return TensorDescriptor(x, [batch * (n // rate), columns], [rate * strides.row, 1], [rows, width])


def _strided(x: Tensor, rate: int, rows: int, block_d: int) -> TensorDescriptor | None:
    batch, n, heads, width = x.shape
    strides = (*x.stride()[:3], rate * x.stride(1))
    if not _aligned(x, strides) or n < rate:
        return None
    # A tile's row takes at most 512 bytes here, and CUDA's limit on a stride is 2^40 bytes.
    if block_d * x.element_size() > 512 or any(size * x.element_size() >= 1 << 40 for size in strides):
        return None
    return TensorDescriptor(x, [batch, rate, heads, n // rate, width], [*strides, 1], [1, 1, 1, rows, block_d])


def _aligned(x: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether address and strides are multiples of 16 bytes, as the copy engine asks."""
    return x.data_ptr() % 16 == 0 and all(size * x.element_size() % 16 == 0 for size in strides)
