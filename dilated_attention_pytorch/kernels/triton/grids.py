"""The programs that a launch of a general kernel has."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels.triton.configs import Config
from dilated_attention_pytorch.kernels.triton.work import Work


class Grid(NamedTuple):
    """The programs of one branch.

    Attributes:
        num_sequences: rows of the batch, or packed sequences.
        num_segments: segments of each that the range may touch.
        num_tiles: tiles of each segment; of all sequences together when packed.
        tile_ends: when packed, how many tiles the sequences up to each have; int32 on the device.
        programs: number of programs for one head.
        length: positions of a segment, or of those that share a tile.
        rate: r_i.
        slots_each: rows that a head keeps of a segment, at most.
        joined: whether segments share a tile.
    """

    num_sequences: int
    num_segments: int
    num_tiles: int
    tile_ends: Tensor | None
    programs: int
    length: int
    rate: int
    slots_each: int
    joined: bool


def grid_of(work: Work, branch: int, config: Config, *, by_keys: bool) -> Grid:
    """The programs of a branch, one per tile of queries, or of keys."""
    problem, masks = work.problem, work.masks
    batch, count = (work.x.k if by_keys else work.x.q).shape[:2]
    tile = config.block_n if by_keys else config.block_m
    rate, shared = dilation_rate(problem, branch), _sharing(problem, branch, min(config.block_m, config.block_n))
    length = shared * segment_length(problem, branch)
    each = length, rate, slots_of(problem, branch), shared > 1
    if masks.cu_seqlens is not None:
        ends, sequences, bound = _packed_tiles(masks.cu_seqlens, problem.q_start, length, rate, tile, count)
        return Grid(sequences, 1, bound, ends, bound, *each)
    start = problem.k_start if by_keys else problem.q_start
    if masks.row_start is not None:
        # Positions move down by row_start, to anywhere in [0, start]: the range may touch one segment more.
        num_segments = triton.cdiv(count, length) + (1 if start else 0)
    else:
        num_segments = (start + count - 1) // length - start // length + 1
    slots = triton.cdiv(min(length, count), rate)
    num_tiles = triton.cdiv(slots, tile)
    return Grid(batch, num_segments, num_tiles, None, batch * num_segments * num_tiles, *each)


def _packed_tiles(
    cu_seqlens: Tensor, start: int, length: int, rate: int, tile: int, total: int
) -> tuple[Tensor, int, int]:
    """Ends of the tiles of every sequence, counted on the device without waiting for it; how many sequences there are,
    and a bound on the number of their tiles, which is all that the host knows of it."""
    lengths = cu_seqlens.diff()
    segment = lengths.clamp(1, length)
    # Of sequences that start inside a segment (a segment shift) the first segment is cut.
    segments = (lengths + segment - 1) // segment if start == 0 else _segments(lengths, start % length, length)
    tiles = segments * ((segment + rate - 1) // rate + tile - 1).div(tile, rounding_mode="floor")
    num_sequences = lengths.numel()
    # A sequence of n has at most 2n / g segments (n >= g), each of at most g / (rate * tile) + 1 tiles.
    # One that starts inside a segment has one segment more.
    at_most = 2 if start == 0 else 3
    bound = at_most * total // (rate * tile) + total // length + at_most * num_sequences + 1
    return tiles.cumsum(0).to(torch.int32), num_sequences, bound


def _segments(lengths: Tensor, inside: int, length: int) -> Tensor:
    """How many segments sequences touch that start at this place of their first one."""
    return (lengths + inside + length - 1) // length * (lengths > 0)


def segment_length(problem: Problem, branch: int) -> int:
    """A segment length that int32 arithmetic can take: one beyond the sequence is as good as the sequence's."""
    return min(problem.pattern.segment_lengths[branch], max(1, problem.seq_len))


def slots_of(problem: Problem, branch: int) -> int:
    """Rows of one segment that a head keeps, at most."""
    return triton.cdiv(segment_length(problem, branch), dilation_rate(problem, branch))


def _sharing(problem: Problem, branch: int, tile: int) -> int:
    """How many segments share a tile. The slots of one follow those of the one before where the rate divides w."""
    length, rate = segment_length(problem, branch), dilation_rate(problem, branch)
    if length % rate or problem.padding == "zero_keys":
        return 1
    return max(1, min(tile // (length // rate), problem.seq_len // length))


def dilation_rate(problem: Problem, branch: int) -> int:
    """A rate that int32 arithmetic can take, with no more residues than rows or heads: from the segment's length on
    each head keeps at most one slot of a segment, whatever the rate is."""
    # Segments filled up with zero keys are written a rate apart: there the sequence counts.
    length = max(1, problem.seq_len) if problem.padding == "zero_keys" else segment_length(problem, branch)
    return min(problem.pattern.dilation_rates[branch], max(length, problem.pattern.num_heads))
