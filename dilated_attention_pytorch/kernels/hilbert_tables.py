"""Skilling's Hilbert curve (AIP Conf. Proc. 707, 381, 2004) as a state machine over digits, in tables.

At each bit, from the highest down, his algorithm flips or exchanges the lower bits of some coordinates. The state is
what it has done so far; few are ever reached. A table holds, for each state and each few bits of every coordinate, the
digits of the index and the next state.
"""

from __future__ import annotations

import importlib
import itertools
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


def encode(axes: Sequence[Tensor], num_bits: int) -> Tensor:
    """The index of int64 coordinates, D tensors of one shape."""
    num_dims, width = len(axes), _BITS[len(axes)]
    steps = ceil_div(num_bits, width)
    tables = _tables(num_dims, str(axes[0].device))
    digits, low, mask = num_dims * width, (1 << width) - 1, (1 << num_dims * width) - 1
    entry = torch.full_like(axes[0], tables.starts[(steps * width - num_bits) % num_dims] << digits)
    index = torch.zeros_like(axes[0])
    for shift in range((steps - 1) * width, -1, -width):
        key = entry >> digits
        for axis in axes:
            key = (key << width) | ((axis >> shift) & low)
        entry = tables.encode[key]
        index = (index << digits) | (entry & mask)
    return index


def decode(index: Tensor, num_dims: int, num_bits: int) -> list[Tensor]:
    """The coordinates of int64 indices."""
    width = _BITS[num_dims]
    steps = ceil_div(num_bits, width)
    tables = _tables(num_dims, str(index.device))
    digits, low, mask = num_dims * width, (1 << width) - 1, (1 << num_dims * width) - 1
    entry = torch.full_like(index, tables.starts[(steps * width - num_bits) % num_dims] << digits)
    axes = [torch.zeros_like(index) for _ in range(num_dims)]
    for shift in range((steps - 1) * digits, -1, -digits):
        entry = tables.decode[((entry >> digits) << digits) | ((index >> shift) & mask)]
        for a in range(num_dims):
            axes[a] = (axes[a] << width) | ((entry >> (num_dims - 1 - a) * width) & low)
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


def encode_with_hilbertsfc(first: Tensor, second: Tensor, num_bits: int) -> Tensor | None:
    """`encode` by the hilbertsfc package; None if it is absent or another curve, and off the CPU."""
    if first.device.type != "cpu" or not _hilbertsfc_agrees():
        return None
    sfc = importlib.import_module("hilbertsfc.torch")
    # Its 2-D curve (0.5.1) is this one with the axes exchanged for odd numbers of bits; its 3-D curve is another.
    if num_bits % 2:
        first, second = second, first
    index: Tensor = sfc.hilbert_encode_2d(first.contiguous(), second.contiguous(), nbits=num_bits)
    return index.to(torch.int64)


@lru_cache(maxsize=1)
def _hilbertsfc_agrees() -> bool:
    """True if the package is there and gives this curve: results may not depend on what is installed."""
    try:
        sfc = importlib.import_module("hilbertsfc.torch")
        for num_bits in (1, 2, 3, 5, 6):
            side = torch.arange(1 << num_bits)
            x, y = side.repeat_interleave(len(side)), side.repeat(len(side))
            pair = (y, x) if num_bits % 2 else (x, y)
            if not torch.equal(sfc.hilbert_encode_2d(*pair, nbits=num_bits).to(torch.int64), encode((x, y), num_bits)):
                return False
    except Exception:  # absent, or broken in some way of its own: the tables need nobody
        return False
    return True


@lru_cache(maxsize=8)
def _tables(num_dims: int, device: str) -> Tables:
    numbers, moves = _machine(num_dims)
    width = _BITS[num_dims]
    digits = num_dims * width
    encoding = [0] * (len(numbers) << digits)
    decoding = [0] * (len(numbers) << digits)
    for state, bits in itertools.product(range(len(numbers)), range(1 << digits)):
        now, index = state, 0
        for bit in range(width - 1, -1, -1):
            point = 0
            for axis in range(num_dims):
                point = (point << 1) | (bits >> ((num_dims - 1 - axis) * width + bit) & 1)
            digit, now = moves[now][point]
            index = (index << num_dims) | digit
        encoding[state << digits | bits] = now << digits | index
        decoding[state << digits | index] = now << digits | bits
    # Leading zeros turn the axes round; D of them come back to the start.
    turn = [0]
    while len(turn) < num_dims:
        turn.append(moves[turn[-1]][0][1])
    starts = tuple(turn[-n % num_dims] for n in range(num_dims))
    with torch.inference_mode(False):  # cached tables serve training too
        return Tables(torch.tensor(encoding, device=device), torch.tensor(decoding, device=device), starts)


def _machine(num_dims: int) -> tuple[dict[CurveState, int], list[list[tuple[int, int]]]]:
    """Numbers every state that is reached; per state and corner of the cube, the (digit, next state) read there."""
    start = CurveState(tuple(range(num_dims)), (0,) * num_dims, 0)
    numbers, moves, waiting = {start: 0}, [], [start]
    while waiting:
        state = waiting.pop(0)
        found = []
        for corner in range(1 << num_dims):
            digit, following = _move(state, corner)
            if following not in numbers:
                numbers[following] = len(numbers)
                waiting.append(following)
            found.append((digit, numbers[following]))
        moves.append(found)
    return numbers, moves


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
