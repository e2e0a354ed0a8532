"""Launches a decoding step: one query per sequence over a buffer of fixed size."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dilated_attention_pytorch.core.positions import Rotation
from dilated_attention_pytorch.kernels.decode_layout import DecodeLayout
from dilated_attention_pytorch.kernels.triton import decode
from dilated_attention_pytorch.kernels.triton.support import interpreting
from dilated_attention_pytorch.kernels.triton.work import LOG2E
from dilated_attention_pytorch.types import QKV

_WARPS, _STAGES, _MOST_SPLITS = 4, 2, 64


def tile_of(block_d: int, itemsize: int) -> int:
    """Keys of a tile: 16 KiB of K, which leaves room for four of them in any device's shared memory."""
    return max(16, min(64, 16_384 // (block_d * itemsize)))


def num_splits(programs: int, tile: int, layout: DecodeLayout, device: torch.device) -> int:
    """Programs per key head of each row: two for each multiprocessor, no more than the fullest position has tiles."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(1, min(_MOST_SPLITS, triton.cdiv(2 * processors, programs), triton.cdiv(layout.bases[-1], tile)))


def step(x: QKV, rotation: Rotation | None, positions: Tensor, buffers: tuple[Tensor, Tensor], layout: DecodeLayout,
         scale: float) -> Tensor:  # fmt: skip
    """Writes the new keys and values, and attends.

    Args:
        x: q `(B, 1, H, D)`, k and v `(B, 1, H_kv, D)`, not rotated yet.
        rotation: of the queries' positions, `(B, 1, 1, D / 2)`; None without rotary positions.
        positions: int64 `(B,)` on the device.
        buffers: keys and values `(B, H_kv, rows, D)`, contiguous.
        layout: where positions lie in them.
        scale: the factor on q . k.

    Returns:
        `(B, 1, H, D)` in q's dtype.
    """
    q, k, v = (y if y[0, 0].is_contiguous() else y.contiguous() for y in x)
    batch, _, heads, width = q.shape
    kv_heads, block_d = k.shape[2], max(16, triton.next_power_of_2(width))
    tile = tile_of(block_d, q.element_size())
    splits = num_splits(batch * kv_heads, tile, layout, q.device)
    part = torch.empty(batch, heads, splits, width, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(batch, heads, splits, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    tables = (None,) * 4 if rotation is None else tuple(y.contiguous() for y in rotation)
    keys, values = buffers
    lengths, rates = zip(*layout.branches, strict=True)
    decode.decode_split[(batch * kv_heads, splits)](
        q, k, v, *tables, keys, values, positions, part, part_lse,
        q.stride(0), k.stride(0), v.stride(0), keys.stride(0), keys.stride(1), scale * LOG2E,
        LENGTHS=lengths, RATES=rates, BASES=layout.bases, RING=0 if layout.compact else layout.ring, SHIFT=layout.shift,
        MODULO=layout.pattern.offsets == "modulo", NUM_KV_HEADS=kv_heads, GROUP=heads // kv_heads,
        # tl.dot asks for 16 rows; the rows that are no head cost nothing that is not there already.
        BLOCK_G=max(16, triton.next_power_of_2(heads // kv_heads)), D=width, BLOCK_D=block_d, BN=tile, SPLITS=splits,
        ROTARY=rotation is not None,
        PRECISION="tf32x3" if q.dtype == torch.float32 and not interpreting() else "ieee", num_warps=_WARPS,
        num_stages=_STAGES,
    )  # fmt: skip
    decode.decode_merge[(batch * heads,)](
        part, part_lse, out, D=width, BLOCK_D=block_d, SPLITS=splits, BLOCK_S=triton.next_power_of_2(splits),
        num_warps=1,
    )  # fmt: skip
    return out
