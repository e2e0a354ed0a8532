"""Skilling's Hilbert curve (AIP Conf. Proc. 707, 381, 2004) as a state machine over digits, in tables.

At each bit, from the highest down, his algorithm flips or exchanges the lower bits of some coordinates. The state is
what it has done so far; few are ever reached. A table holds, for each state and each few bits of every coordinate, the
digits of the index and the next state.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core.members import ceil_div

_BITS = {2: 4, 3: 3}  # of each coordinate per step


class CurveState(NamedTuple):
    """How the lower bits of the coordinates have been changed so far."""

    source: tuple[int, ...]  # which axis each transformed one is taken from
    flipped: tuple[int, ...]  # 1 if its bits are inverted
    inverted: int  # 1 if the digits themselves are


class Tables(NamedTuple):
    """The machine for D dimensions, k bits of each coordinate per step; entries are `state << D * k | rest`, int64."""

    encode: Tensor  # (states * 2 ** (D * k),): at a state and bits of axis 0, axis 1, ... the next state and the digits
    decode: Tensor  # likewise: at a state and digits the next state and the bits
    starts: tuple[int, ...]  # the first state, by the number of leading zeros modulo D

    def walk(self, like: Tensor, num_bits: int) -> tuple[Tensor, range]:
        """The first entry of a walk over so many bits, at every point, and the lowest bit of each of its steps."""
        num_dims, width = len(self.starts), _BITS[len(self.starts)]
        last = (ceil_div(num_bits, width) - 1) * width
        start = self.starts[(last + width - num_bits) % num_dims]
        return torch.full_like(like, start << num_dims * width), range(last, -1, -width)


def encode(axes: Sequence[Tensor], num_bits: int) -> Tensor:
    """The index of int64 coordinates, D tensors of one shape."""
    num_dims, width = len(axes), _BITS[len(axes)]
    tables, digits = _tables(num_dims, str(axes[0].device)), num_dims * width
    entry, shifts = tables.walk(axes[0], num_bits)
    index = torch.zeros_like(axes[0])
    for shift in shifts:
        key = entry >> digits
        for axis in axes:
            key = (key << width) | ((axis >> shift) & ((1 << width) - 1))
        entry = tables.encode[key]
        index = (index << digits) | (entry & ((1 << digits) - 1))
    return index


def decode(index: Tensor, num_dims: int, num_bits: int) -> list[Tensor]:
    """The coordinates of int64 indices."""
    width, tables = _BITS[num_dims], _tables(num_dims, str(index.device))
    digits = num_dims * width
    entry, shifts = tables.walk(index, num_bits)
    axes = [torch.zeros_like(index) for _ in range(num_dims)]
    for shift in shifts:
        entry = tables.decode[((entry >> digits) << digits) | ((index >> shift * num_dims) & ((1 << digits) - 1))]
        for a in range(num_dims):
            axes[a] = (axes[a] << width) | ((entry >> (num_dims - 1 - a) * width) & ((1 << width) - 1))
    return axes


def interleave(axes: Sequence[Tensor]) -> Tensor:
    """The Morton index: the bits of the axes in turn, the first axis highest."""
    num_dims = len(axes)
    index = torch.zeros_like(axes[0])
    highest = max(int(axis.max()) for axis in axes).bit_length() if axes[0].numel() else 0
    for bit in range(highest):
        for a, axis in enumerate(axes):
            index |= ((axis >> bit) & 1) << (num_dims * bit + num_dims - 1 - a)
    return index


def encode_with_hilbertsfc(axes: Sequence[Tensor], num_bits: int) -> Tensor | None:
    """`encode` by the hilbertsfc package; None if it is absent or another curve, and off the CPU."""
    is_theirs = len(axes) == 2 and axes[0].device.type == "cpu" and _hilbertsfc_agrees()
    return _by_hilbertsfc(axes, num_bits) if is_theirs else None


@lru_cache(maxsize=1)
def _hilbertsfc_agrees() -> bool:
    """True if the package is there and gives this curve: results may not depend on what is installed."""
    try:
        for num_bits in (1, 2, 3, 5, 6):
            side = torch.arange(1 << num_bits, device="cpu")
            axes = torch.cartesian_prod(side, side).unbind(-1)
            if not torch.equal(_by_hilbertsfc(axes, num_bits), encode(axes, num_bits)):
                return False
    except Exception:  # absent, or broken in some way of its own: the tables need nobody
        return False
    return True


def _by_hilbertsfc(axes: Sequence[Tensor], num_bits: int) -> Tensor:
    # Its 2-D curve (0.5.1) is this one with the axes exchanged for odd numbers of bits; its 3-D curve is another.
    x, y = reversed(axes) if num_bits % 2 else axes
    sfc = importlib.import_module("hilbertsfc.torch")
    index: Tensor = sfc.hilbert_encode_2d(x.contiguous(), y.contiguous(), nbits=num_bits)
    return index.to(torch.int64)


@lru_cache(maxsize=8)
def _tables(num_dims: int, device: str) -> Tables:
    width, moves = _BITS[num_dims], _machine(num_dims)
    digits = num_dims * width
    # Leading zeros turn the axes round; D of them come back to the start.
    turn = [0]
    while len(turn) < num_dims:
        turn.append(moves[turn[-1]][0][1])
    starts = tuple(turn[-n % num_dims] for n in range(num_dims))
    with torch.inference_mode(False):  # cached tables serve training too
        steps = torch.tensor(moves, device="cpu")  # (states, 2 ** D, 2)
        key = torch.arange(len(moves) << digits, device="cpu")
        now, bits, index = key >> digits, key & ((1 << digits) - 1), torch.zeros_like(key)
        for bit in range(width - 1, -1, -1):
            # One bit of each axis, axis 0 highest.
            corner = sum((bits >> (a * width + bit) & 1) << a for a in range(num_dims))
            digit, following = steps[now, corner].unbind(-1)
            index, now = index << num_dims | digit, following
        decoding = torch.empty_like(key)
        decoding[(key >> digits) << digits | index] = now << digits | bits
        return Tables((now << digits | index).to(device), decoding.to(device), starts)


def _machine(num_dims: int) -> list[list[tuple[int, int]]]:
    """Per state that is reached and corner of the cube the (digit, next state) read there, states by number."""
    states, moves = [CurveState(tuple(range(num_dims)), (0,) * num_dims, 0)], list[list[tuple[int, int]]]()
    for state in states:  # which grows meanwhile
        found = [_move(state, corner) for corner in range(1 << num_dims)]
        for _, following in found:
            if following not in states:
                states.append(following)
        moves.append([(digit, states.index(following)) for digit, following in found])
    return moves


def _move(state: CurveState, corner: int) -> tuple[int, CurveState]:
    """One bit of every coordinate, axis 0 highest in `corner`: its digit of the index, and the state after it."""
    num_dims = len(state.source)
    source, flipped = list(state.source), list(state.flipped)
    bits = [(corner >> (num_dims - 1 - s) & 1) ^ f for s, f in zip(source, flipped, strict=True)]
    for i, bit in enumerate(bits):
        if bit:
            flipped[0] ^= 1
        else:
            source[0], source[i] = source[i], source[0]
            flipped[0], flipped[i] = flipped[i], flipped[0]
    digit = running = 0
    for bit in bits:  # Gray code, undone
        running ^= bit
        digit = (digit << 1) | (running ^ state.inverted)
    return digit, CurveState(tuple(source), tuple(flipped), state.inverted ^ running)
