"""The Hilbert curve in 2-D and 3-D, and orders of tokens along it and along simpler curves.

A segment of dilated attention is a stretch of the sequence: a thin strip of the image in raster order, a compact region
along a Hilbert curve, whose every step goes to a neighbour and which fills each quadrant before it leaves it. The curve
is Skilling's (AIP Conf. Proc. 707, 381, 2004), read off tables that take several bits per step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.tables import kept
from dilated_attention_pytorch.kernels import hilbert_tables

Curve = Literal["raster", "snake", "morton", "hilbert"]

CURVES: tuple[Curve, ...] = get_args(Curve)
_MAX_BITS = {2: 31, 3: 20}  # of one coordinate, so that an index fits an int64
_MOST_TOKENS = 1 << 30  # whose coordinates alone take 16 GiB
_INTEGERS = (*check.INT_DTYPES, torch.uint16, torch.uint32, torch.uint64)
_FLOAT_BITS = {2: 26, 3: 20}  # finer than any scanner's coordinates


class CurveOrder(NamedTuple):
    """A permutation of tokens, and the way back.

    Attributes:
        order: int64 `(N,)`; the token at curve position p is token `order[p]` of the original sequence.
        inverse: int64 `(N,)`; token n of the original sequence stands at curve position `inverse[n]`.

    Example:
        >>> found = hilbert_order(grid=(2, 2))
        >>> x = torch.arange(4.0)[None]
        >>> torch.equal(found.undo(found.apply(x)), x)
        True
    """

    order: Tensor
    inverse: Tensor

    def apply(self, x: Tensor, dim: int = 1) -> Tensor:
        """Tokens along `dim`, in the order of the curve."""
        return _permuted(x, dim, self.order)

    def undo(self, x: Tensor, dim: int = 1) -> Tensor:
        """Tokens along `dim` that are in the order of the curve, back where they were."""
        return _permuted(x, dim, self.inverse)


def hilbert_encode(coords: Tensor, num_bits: int) -> Tensor:
    """The place of each point along the Hilbert curve through a square or cube of `2 ** num_bits` points per side.

    Args:
        coords: int `(..., 2)` or `(..., 3)`, each coordinate in `[0, 2 ** num_bits)`.
        num_bits: up to 31 in 2-D and 20 in 3-D.

    Returns:
        int64 `(...)`, in `[0, 2 ** (D * num_bits))`. Consecutive places are neighbours; the curve starts at the origin
        and ends at the far end of the first axis. The index is that of Skilling's algorithm with the same axes.

    Raises:
        ValueError: a shape, a number of bits or a coordinate out of range.
        TypeError: coordinates that are not integers.

    Example:
        >>> hilbert_encode(torch.tensor([[0, 0], [0, 1], [1, 1], [1, 0]]), 1).tolist()
        [0, 1, 2, 3]
    """
    _check_numbers("coords", coords, "to be of integers")
    if coords.dim() == 0 or coords.shape[-1] not in _MAX_BITS:
        raise ValueError(f"expected coords of shape (..., 2) or (..., 3), got {tuple(coords.shape)}")
    num_bits = _check_bits(num_bits, coords.shape[-1])
    axes = _within("coords", coords, num_bits).unbind(-1)  # D tensors (...)
    index = hilbert_tables.encode_with_hilbertsfc(axes, num_bits)
    return hilbert_tables.encode(axes, num_bits) if index is None else index


def hilbert_decode(index: Tensor, num_dims: int, num_bits: int) -> Tensor:
    """The point at each place along the Hilbert curve: the inverse of `hilbert_encode`.

    Args:
        index: int of any shape, in `[0, 2 ** (num_dims * num_bits))`.
        num_dims: 2 or 3.
        num_bits: of each coordinate.

    Returns:
        int64 `(*index.shape, num_dims)`.

    Raises:
        ValueError: dimensions, bits or an index out of range.
        TypeError: an index that is not of integers.

    Example:
        >>> hilbert_decode(torch.arange(4), 2, 1).tolist()
        [[0, 0], [0, 1], [1, 1], [1, 0]]
    """
    num_dims = check.check_positive_int("num_dims", num_dims)  # NumPy's ints would overflow in eight bits
    if num_dims not in _MAX_BITS:
        raise ValueError(f"expected num_dims to be 2 or 3, got {num_dims}")
    num_bits = _check_bits(num_bits, num_dims)
    _check_numbers("index", index, "to be of integers")
    index = _within("index", index, num_dims * num_bits)
    return torch.stack(hilbert_tables.decode(index, num_dims, num_bits), -1)  # (..., D)


def hilbert_order(coords: Tensor | None = None, *, grid: Sequence[int] | None = None) -> CurveOrder:
    """The order of tokens along a Hilbert curve: `curve_order("hilbert", ...)`.

    Example:
        >>> hilbert_order(grid=(2, 2)).order.tolist()
        [0, 1, 3, 2]
        >>> hilbert_order(torch.tensor([[0.5, 9.0], [0.0, 0.0], [0.6, 8.5]])).order.tolist()
        [1, 2, 0]
    """
    return curve_order("hilbert", coords, grid=grid)


def curve_order(name: Curve, coords: Tensor | None = None, *, grid: Sequence[int] | None = None) -> CurveOrder:
    """The order in which a curve meets tokens.

    `raster` goes row by row, `snake` too but every other row backwards, `morton` interleaves the coordinates' bits,
    `hilbert` steps from neighbour to neighbour. Hilbert and Morton walk the smallest square or cube of a power of two
    around the tokens, the shortest axis turning slowest, and leave out cells without a token. The Hilbert walk has unit
    steps in a grid of powers of two if no side is more than twice another; in any other it jumps where it leaves the
    grid and comes back. Tokens at one place keep their order.

    Args:
        name: `"raster"`, `"snake"`, `"morton"` or `"hilbert"`.
        coords: int or float `(N, 2)` or `(N, 3)`, rows before columns. Integers may be pixels of tiles at any stride:
            the steps that all of them share are divided out, axis by axis. Floats are taken to 26 bits of the longest
            extent (20 in 3-D), so raster and snake tell rows apart that finely. The result is on their device.
        grid: in place of coords, `(h, w)` or `(d, h, w)` tokens in raster order. Cached; do not write to the result.

    Returns:
        The permutation and its inverse.

    Raises:
        ValueError: an unknown name; both or neither of coords and grid; shapes, sizes or values that do not fit.
        TypeError: an argument of the wrong type.

    Example:
        >>> curve_order("snake", grid=(2, 3)).order.tolist()
        [0, 1, 2, 5, 4, 3]
    """
    check.check_choice("name", name, Curve)
    if (coords is None) == (grid is None):
        raise ValueError("expected either coords or grid, got " + ("both" if grid is not None else "neither"))
    if coords is not None:
        return _order(name, _cells(coords))
    if isinstance(grid, str | bytes | Tensor) or not isinstance(grid, Sequence):
        raise TypeError(f"expected grid to be (h, w) or (d, h, w), got {check.shown(grid)}")
    if len(grid) not in _MAX_BITS:
        raise ValueError(f"expected grid of 2 or 3 sizes, got {len(grid)}: {check.listed(grid)}")
    sizes = tuple(check.check_positive_int(f"grid[{i}]", n) for i, n in enumerate(grid))
    if math.prod(sizes) > _MOST_TOKENS:
        raise ValueError(f"expected grid of at most {_MOST_TOKENS} tokens, got {check.listed(sizes)}")
    if torch.compiler.is_compiling():
        return CurveOrder(*torch.ops.dilated_attention_pytorch.curve_order(name, sizes))
    return _grid_order(name, sizes)


@kept(32)
def _grid_order(name: Curve, grid: tuple[int, ...]) -> CurveOrder:
    return _order(name, grid_coords(grid))


def grid_coords(grid: Sequence[int]) -> Tensor:
    """The coordinates `(N, D)` of a grid's tokens in raster order."""
    axes = torch.meshgrid(*(torch.arange(n, device="cpu") for n in grid), indexing="ij")
    return torch.stack([a.flatten() for a in axes], -1)


def _cells(coords: Tensor) -> Tensor:
    """Non-negative int64 cells `(N, D)`, no finer than it takes to tell the tokens apart."""
    _check_numbers("coords", coords, "of integers or floats", floats=True)
    if coords.dim() != 2 or coords.shape[1] not in _MAX_BITS:
        raise ValueError(f"expected coords of shape (N, 2) or (N, 3), got {tuple(coords.shape)}")
    if coords.shape[0] == 0:
        return coords.to(torch.int64)
    if coords.is_floating_point():
        points = coords.detach().to(torch.float64)
        if not bool(points.isfinite().all()):
            raise ValueError("expected finite coords, got inf or nan")
        points = points - points.amin(0)
        extent = float(points.max())
        if extent == float("inf"):
            raise ValueError("expected coords whose extent is a finite float64, got a larger one")
        # One scale for all axes keeps the picture's proportions.
        last = (1 << _FLOAT_BITS[coords.shape[1]]) - 1
        return (points / extent * last).to(torch.int64) if extent > 0 else points.to(torch.int64)
    whole = coords.to(torch.int64)  # torch has no minima of wider unsigned integers
    if coords.dtype == torch.uint64 and bool((whole < 0).any()):
        raise ValueError("expected coords below 2 ** 63, got larger ones")
    low, high = whole.amin(0).tolist(), whole.amax(0).tolist()
    if max(b - a for a, b in zip(low, high, strict=True)) >= 1 << 62:
        raise ValueError(f"expected coords whose extent is below 2 ** 62, got {low} to {high}")
    cells = whole - whole.amin(0)
    return cells // _common_step(cells).clamp(min=1)


def _common_step(cells: Tensor) -> Tensor:
    """The greatest common divisor of each column, `(N, D) -> (D,)`."""
    # Halves the rows each time: gcd(first half, second half), and a row left over.
    while cells.shape[0] > 1:
        half = cells.shape[0] // 2
        cells = torch.cat((torch.gcd(cells[:half], cells[half : 2 * half]), cells[2 * half :]))
    return cells[0]


def _order(name: Curve, cells: Tensor) -> CurveOrder:
    positions = torch.arange(len(cells), device=cells.device)  # (N,)
    if len(cells) == 0:
        return CurveOrder(positions, positions.clone())
    order = _raster(cells, snake=name == "snake") if name in ("raster", "snake") else _along_bits(name, cells)
    return CurveOrder(order, torch.empty_like(order).scatter_(0, order, positions))


def _raster(cells: Tensor, *, snake: bool) -> Tensor:
    """Sorted by the first axis, then the next; a snake goes every other row backwards."""
    columns = list(cells.unbind(-1))  # D tensors (N,)
    if snake:
        # The walk skips rows without a token, so each axis counts the others.
        columns = [torch.unique(c, return_inverse=True)[1] for c in columns]
        rows = columns[0]
        for i in range(1, len(columns)):
            last = columns[i].max()
            columns[i] = torch.where(rows % 2 == 1, last - columns[i], columns[i])
            rows = rows * (last + 1) + columns[i]
    # Stable sorts from the last axis to the first.
    order = torch.arange(cells.shape[0], device=cells.device)
    for column in reversed(columns):
        order = order[torch.argsort(column[order], stable=True)]
    return order


def _along_bits(name: Curve, cells: Tensor) -> Tensor:
    """Sorted by the place along a Hilbert or Morton curve."""
    extents = cells.amax(0).tolist()
    num_bits = max(1, max(extents).bit_length())
    if num_bits > _MAX_BITS[cells.shape[1]]:
        raise ValueError(
            f"expected coords of at most 2 ** {_MAX_BITS[cells.shape[1]]} steps along an axis, got {max(extents) + 1}"
        )
    # The first axis turns slowest: given to the shortest, a grid twice as long as wide is one half of the walk.
    cells = cells[:, sorted(range(len(extents)), key=lambda axis: int(extents[axis]))]
    index = hilbert_encode(cells, num_bits) if name == "hilbert" else hilbert_tables.interleave(cells.unbind(-1))
    return torch.argsort(index, stable=True)


def _check_numbers(name: str, x: Tensor, kind: str, *, floats: bool = False) -> None:
    check.check_values(name, x)
    if x.dtype not in _INTEGERS and not (floats and x.dtype in check.FLOAT_DTYPES):
        raise TypeError(f"expected {name} {kind}, got {x.dtype}")


def _within(name: str, x: Tensor, num_bits: int) -> Tensor:
    """Integers as int64, all of them in `[0, 2 ** num_bits)`."""
    x = x.to(torch.int64)
    low, high = (int(bound) for bound in x.aminmax()) if x.numel() else (0, 0)
    if not 0 <= low <= high < 1 << num_bits:
        raise ValueError(f"expected {name} in [0, 2 ** {num_bits}), got {low} to {high}")
    return x


def _check_bits(num_bits: int, num_dims: int) -> int:
    num_bits = check.check_positive_int("num_bits", num_bits)
    if num_bits > _MAX_BITS[num_dims]:
        raise ValueError(f"expected num_bits of at most {_MAX_BITS[num_dims]} in {num_dims}-D, got {num_bits}")
    return num_bits


def _permuted(x: Tensor, dim: int, order: Tensor) -> Tensor:
    if x.shape[dim] != order.shape[0]:
        raise ValueError(f"expected {order.shape[0]} tokens along dimension {dim}, got {tuple(x.shape)}")
    return x.index_select(dim, order.to(x.device))


@torch.library.custom_op("dilated_attention_pytorch::curve_order", mutates_args=())
def _curve_order_op(name: str, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`curve_order` of a grid as one op on the CPU: how often a curve turns depends on a number, not on a size."""
    order, inverse = _grid_order(name, tuple(grid))  # type: ignore[arg-type]
    return order.clone(), inverse.clone()


@_curve_order_op.register_fake
def _(name: str, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    num_tokens = math.prod(grid)
    order = torch.empty(num_tokens, dtype=torch.int64, device="cpu")
    return order, torch.empty_like(order)
