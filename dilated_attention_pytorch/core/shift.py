"""Segment shift: borders of segments that differ from layer to layer (docs/spec.md, 2).

A shift c moves all borders: everything is computed with n + c in place of n. That is a range of a longer sequence whose
first position is c, which every backend computes, so a shift never reaches a kernel.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Literal

import torch

from dilated_attention_pytorch.core.validation import check_int, quoted
from dilated_attention_pytorch.types import Masks

_LONGEST = 1 << 31  # bits of a mask that stand for no position
# One number for all layers, one per layer, or half of the largest segment in every other layer.
SegmentShift = int | tuple[int, ...] | Literal["alternate"]


def check_segment_shift(name: str, value: object) -> SegmentShift:
    """An int of at least 0, a sequence of them, or "alternate"."""
    if isinstance(value, str):
        if value != "alternate":
            raise ValueError(f"expected {name} to be an int, one per layer or 'alternate', got {quoted(value)}")
        return "alternate"
    if isinstance(value, Sequence):
        if not value:
            raise ValueError(f"expected {name} to hold one int per layer, got an empty sequence")
        return tuple(check_int(f"{name}[{i}]", shift, 0) for i, shift in enumerate(value))
    return check_int(name, value, 0)


def check_shift(value: object, segment_lengths: Sequence[int]) -> int:
    """The shift of one layer, an int of at least 0: the least one that puts all borders where this one does."""
    return least_shift(check_int("segment_shift", value, 0), segment_lengths)


def least_shift(shift: int, segment_lengths: Sequence[int]) -> int:
    """The borders lie as without a shift where all segments start together: after their least common multiple."""
    if shift < max(segment_lengths):
        return shift
    return shift % math.lcm(*map(operator.index, segment_lengths))  # traced ints become plain ones


def layer_shifts(segment_shift: object, segment_lengths: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The least shift of each layer; `"alternate"` is half of the largest segment in the second, fourth, .. and else 0.

    Raises:
        ValueError: as many numbers as there are layers are wanted, a number below 0, another word.
        TypeError: something else.
    """
    shift = check_segment_shift("segment_shift", segment_shift)
    if shift == "alternate":
        return tuple(i % 2 * (max(segment_lengths) // 2) for i in range(num_layers))
    given = (shift,) * num_layers if isinstance(shift, int) else shift
    if len(given) != num_layers:
        raise ValueError(f"expected segment_shift of one int per layer, {num_layers}, got {len(given)}")
    return tuple(least_shift(each, segment_lengths) for each in given)


def check_room(shifts: Sequence[int], seq_len: int) -> None:
    """Every position of shifted sequences fits 64 bits."""
    if max(shifts) + seq_len >= 2**63:
        raise ValueError(f"expected segment_shift to leave every position below 2**63, got {max(shifts)}")


def two_parts(branches: Sequence[tuple[int, int]], shift: int) -> int | None:
    """The position at which a shifted sequence falls into two plain ones; None where it does not.

    That is the first border of the largest segment. The part behind it starts all segments anew where they nest in the
    largest. The part before it is plain too where the shift is a multiple of all other segments and, within the
    largest, of its rate.
    """
    largest = max(length for length, _ in branches)
    inside = shift % largest
    nested = all(largest % length == 0 for length, _ in branches)
    plain = all(inside % (rate if length == largest else length) == 0 for length, rate in branches)
    return (largest - inside) % largest if nested and plain else None


def shifted_masks(masks: Masks, shift: int, seq_len: int, device: torch.device) -> Masks:
    """The masks of a sequence of N whose first position is the shift: bits `(B, shift + N)`, False before it.

    Rows of left padding stand before their first real position, which no longer makes their positions negative: they
    are hidden by the mask.
    """
    shown_rows = masks.key_padding
    if masks.row_start is not None:
        real = torch.arange(seq_len, device=device) >= masks.row_start.to(device)[:, None]
        shown_rows = real if shown_rows is None else shown_rows & real
    if shown_rows is None:
        return masks
    if shift >= _LONGEST:
        raise ValueError(
            f"expected segment_shift below {_LONGEST} beside a mask, which has a bit for each, got {shift}"
        )
    return masks._replace(key_padding=torch.nn.functional.pad(shown_rows, (shift, 0)))
