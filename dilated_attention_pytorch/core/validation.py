"""Checks of what users pass: each error names the argument, what was expected and what came."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from dilated_attention_pytorch.types import QKV, Masks

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_choice(name: str, value: Any, options: Any) -> Any:
    """One of the strings of the Literal `options`."""
    allowed = get_args(options)
    if value not in allowed:
        raise ValueError(f"expected {name} to be one of {list(allowed)}, got {value!r}")
    return value


def check_int(name: str, value: object, minimum: int) -> int:
    """The value as an int of 64 bits; bools and floats are refused."""
    if isinstance(value, (bool, Tensor)) or not (isinstance(value, int) or hasattr(type(value), "__index__")):
        raise TypeError(f"expected {name} to be an int, got {type(value).__name__} {value!r}")
    # A plain or traced int is kept as it is; other integer types (NumPy's) become one.
    number = value if isinstance(value, int) else operator.index(value)  # type: ignore[arg-type]
    if number < minimum:
        raise ValueError(f"expected {name} to be at least {minimum}, got {number}")
    if number >= 2**63:
        raise ValueError(f"expected {name} to be below 2**63, got {number}")
    return number


def check_bool(name: str, value: object) -> bool:
    """True or False, and nothing that merely equals them."""
    if not isinstance(value, bool):
        raise TypeError(f"expected {name} to be a bool, got {type(value).__name__} {value!r}")
    return value


def check_device(name: str, value: object) -> torch.device:
    """Parse a str or torch.device; does not check that the device exists."""
    if not isinstance(value, (str, torch.device)):
        raise TypeError(f"expected {name} to be a str or torch.device, got {type(value).__name__} {value!r}")
    try:
        return torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"expected {name} to name a device, as 'cpu' or 'cuda:0' do, got {value!r}") from error


def check_scale(scale: object, head_dim: int) -> float:
    """The factor on q . k: a number as it was given, or `head_dim ** -0.5` for None."""
    if scale is None:
        root: float = float(head_dim) ** -0.5
        return root
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"expected scale to be a float, got {type(scale).__name__} {scale!r}")
    if not abs(scale) <= sys.float_info.max:  # NaN is not, either
        raise ValueError(f"expected scale to be finite, got {scale}")
    return float(scale)


def check_seed(seed: object) -> None:
    """Raises unless the seed is None, a 64-bit int or an integer scalar tensor."""
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.is_floating_point() or seed.is_complex():
            raise TypeError(f"expected seed to be an int or an integer scalar tensor, got {seed.dtype} {seed.shape}")
    elif seed is not None:
        check_int("seed", seed, -(2**63))


def check_positive_int(name: str, value: object) -> int:
    """An int of at least 1."""
    return check_int(name, value, 1)


def check_index(name: str, value: object, size: int) -> int:
    """An int in [0, size)."""
    number = check_int(name, value, 0)
    if number >= size:
        raise ValueError(f"expected {name} in [0, {size}), got {number}")
    return number


def check_positive_ints(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """A non-empty sequence of ints of at least 1."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"expected {name} to be a sequence of ints, got {type(values).__name__} {values!r}")
    if len(values) == 0:
        raise ValueError(f"expected {name} to hold at least one branch, got an empty sequence")
    return tuple(check_positive_int(f"{name}[{i}]", v) for i, v in enumerate(values))


def check_float(name: str, value: object) -> float:
    """An int or float, as it was given; bools are refused."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected {name} to be a float, got {type(value).__name__} {value!r}")
    return value


def check_probability(name: str, value: object) -> float:
    """A float in [0, 1)."""
    number = check_float(name, value)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"expected {name} in [0, 1), got {value}")
    return float(number)


def check_dense(name: str, x: Tensor) -> None:
    """An ordinary tensor, whose elements lie at strides: not sparse, nested or of MKL-DNN."""
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"expected {name} to be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")


def check_qkv(inputs: QKV, *, packed: bool = False) -> QKV:
    """Three tensors whose ranks, dtypes, devices and sizes agree."""
    q, k, v = inputs
    layout = "(total, H, D)" if packed else "(B, N, H, D)"
    rank = 3 if packed else 4
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"expected {name} to be a Tensor, got {type(x).__name__}")
        if x.dim() != rank:
            raise ValueError(f"expected {name} of shape {layout}, got {x.dim()} dimensions {tuple(x.shape)}")
        if x.dtype not in FLOAT_DTYPES:
            raise TypeError(f"expected {name} to be float16, bfloat16, float32 or float64, got {x.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"expected {name} to have q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"expected {name} on q's device {q.device}, got {x.device}")
    if k.shape != v.shape:
        raise ValueError(f"expected k and v of one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if not packed and k.shape[0] != q.shape[0]:
        raise ValueError(f"expected q and k of one batch size, got {q.shape[0]} and {k.shape[0]}")
    if packed and k.shape[0] != q.shape[0]:
        raise ValueError(f"expected packed q and k of one total length, got {q.shape[0]} and {k.shape[0]}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"expected q and k of one head_dim, got {q.shape[-1]} and {k.shape[-1]}")
    if q.shape[-1] == 0 or k.shape[-2] == 0 or q.shape[-2] == 0:
        raise ValueError(f"expected at least one head and head_dim >= 1, got q {tuple(q.shape)}, k {tuple(k.shape)}")
    if q.shape[-2] % k.shape[-2] != 0:
        raise ValueError(
            f"expected q's heads to be a multiple of k's, got {q.shape[-2]} query and {k.shape[-2]} key heads"
        )
    return inputs


def check_range(x: QKV, q_start: object, k_start: object, seq_len: object) -> tuple[int, int, int]:
    """The positions of the first query and key, and N; by default the later end of the two ranges."""
    q_start, k_start = check_int("q_start", q_start, 0), check_int("k_start", k_start, 0)
    q_end, k_end = q_start + x.q.shape[1], k_start + x.k.shape[1]
    end = max(q_end, k_end)
    if seq_len is None:
        return q_start, k_start, end
    seq_len = check_int("seq_len", seq_len, 0)
    if seq_len < end:
        raise ValueError(
            f"expected seq_len of at least {end}, where queries [{q_start}, {q_end}) and keys [{k_start}, {k_end}) "
            f"end, got {seq_len}"
        )
    return q_start, k_start, seq_len


def check_packed_alone(masks: Masks, q_start: object, k_start: object, seq_len: object) -> None:
    """Raises where packed sequences come with what describes padded or partial ones."""
    if any(x is not None for x in (masks.key_padding, masks.row_start, seq_len)) or q_start or k_start:
        raise ValueError(
            "expected cu_seqlens alone: key_padding_mask, row_start, q_start, k_start and seq_len describe "
            "padded or partial sequences, packed ones are whole and have no padding"
        )


def check_masks(masks: Masks, q: Tensor, seq_len: int) -> None:
    """Masks of padded sequences fit q `(B, Nq, H, D)` and N."""
    if masks.key_padding is not None:
        check_key_padding_mask(masks.key_padding, q.shape[0], seq_len, q.device)
    if masks.row_start is not None:
        check_row_start(masks.row_start, q.shape[0])


def check_key_padding_mask(mask: Tensor, batch: int, seq_len: int, device: torch.device) -> None:
    """A bool (B, N) mask over the whole sequence, True = real."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"expected key_padding_mask to be a Tensor, got {type(mask).__name__}")
    check_dense("key_padding_mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"expected key_padding_mask of dtype torch.bool (True = real), got {mask.dtype}")
    if tuple(mask.shape) != (batch, seq_len):
        raise ValueError(f"expected key_padding_mask of shape (B, N) = {(batch, seq_len)}, got {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"expected key_padding_mask on q's device {device}, got {mask.device}")


def check_row_start(row_start: Tensor, batch: int) -> None:
    """Shape and dtype; the values are checked by `check_row_start_values` where they may be read."""
    if not isinstance(row_start, Tensor):
        raise TypeError(f"expected row_start to be a Tensor, got {type(row_start).__name__}")
    if row_start.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"expected row_start of dtype int32 or int64, got {row_start.dtype}")
    if tuple(row_start.shape) != (batch,):
        raise ValueError(f"expected row_start of shape (B,) = {(batch,)}, got {tuple(row_start.shape)}")


def check_row_start_values(row_start: Tensor) -> None:
    """None below 0; on a GPU they are not read, which would make the host wait."""
    if not row_start.is_cuda and not row_start.is_meta:
        for i, first in enumerate(row_start.tolist()):
            if first < 0:
                raise ValueError(f"expected row_start of at least 0, got {first} at index {i}")


def check_cu_seqlens(cu_seqlens: Tensor) -> None:
    """Shape and dtype; the values are checked by `check_cu_seqlens_values` where they may be read."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"expected cu_seqlens to be a Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"expected cu_seqlens of dtype int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"expected cu_seqlens of shape (num_sequences + 1,), got {tuple(cu_seqlens.shape)}")


def check_cu_seqlens_values(bounds: list[int], total: int) -> None:
    """Starts at 0, never falls, ends at the packed length."""
    if bounds[0] != 0 or bounds[-1] != total:
        raise ValueError(f"expected cu_seqlens to run from 0 to {total}, got {bounds[0]} to {bounds[-1]}")
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        if b < a:
            raise ValueError(f"expected cu_seqlens to be non-decreasing, got {a} then {b} at index {i + 1}")
