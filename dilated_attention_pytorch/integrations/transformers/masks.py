"""The mask says what a layer is: what `mask` makes reaches just the layers that it was made for.

| asked for | made | `attention` computes |
|---|---|---|
| causal | uint8 `(B, 1, 1, N)`, 1 = real; int16 if all are | dilated, causal |
| one token over a static cache | int64 `(B, 1, 1, 2)`: its position, the row's first real one | dilated, causal |
| bidirectional | bool `(B, 1, 1, K)` | dilated |
| packed documents | int32 `(B, 1, 1, K)`, the document of each token | dilated, causal, documents apart |
| a window, chunks, a prefix, image tokens | bool `(B, 1, Q, K)` | sdpa |

N counts the positions so far: a static cache has room behind them, a bounded one lacks the first. Where nothing is
hidden, the first and the third have stride 0 along the keys, which spares the kernels a mask. None is never made, so a
layer that gets none belongs to a model without masks (vision, audio).
"""

from __future__ import annotations

from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from dilated_attention_pytorch.integrations import packing
from dilated_attention_pytorch.integrations.transformers.pattern import WITH


class Form(NamedTuple):
    """What a mask says of a layer."""

    is_causal: bool
    real: Tensor | None = None  # (B, N) bool, None if nothing is hidden
    cu_seqlens: Tensor | None = None  # (documents + 1,) over all tokens of all rows
    length: int | None = None  # N; None where the keys are all there is
    step: tuple[Tensor, Tensor] | None = None  # the position of the one query, and each row's first real one (B,)

    @classmethod
    def read(cls, attention_mask: Tensor, num_queries: int) -> Form | None:
        """The form of a mask; None for a mask of a layer's own, with a row per query.

        Raises:
            ValueError: a mask that neither `mask` nor transformers' `sdpa_mask` makes.
        """
        if attention_mask.dim() == 4:
            row = attention_mask[:, 0, 0]
            real = None if attention_mask.stride(-1) == 0 else row
            if attention_mask.dtype in (torch.uint8, torch.int16):
                hidden = real is not None and attention_mask.dtype == torch.uint8
                return cls(True, row.bool() if hidden else None, length=row.shape[1])
            if attention_mask.dtype == torch.int64:
                return cls(True, step=(row[0, 0], row[:, 1]))
            if attention_mask.dtype == torch.int32:
                # Dynamo does not read the attribute.
                bounds = getattr(attention_mask, "cu_seqlens", None) if packing.is_readable(attention_mask) else None
                return cls(True, cu_seqlens=packing.bounds(row) if bounds is None else bounds)
            if attention_mask.dtype == torch.bool:
                # With one query, a window's mask looks the same, and dense is right for both.
                return cls(False, real) if attention_mask.shape[2] == 1 < num_queries else None
        raise ValueError(
            f"expected attention_mask of shape (batch, keys) {WITH}, got {attention_mask.dtype} of shape "
            f"{tuple(attention_mask.shape)}"
        )


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor:
    """The mask of `attention`, in one of five forms; arguments are those of transformers' `sdpa_mask`.

    Raises:
        ValueError: a cache that neither ends with the last query nor is static; right padding with a static one.
    """
    if local_size is None and not use_vmap:
        if mask_function is causal_mask_function and q_length == 1 and isinstance(q_offset, Tensor):
            # A step over a static cache, which transformers never allows to skip.
            first = _first_real(attention_mask, batch_size, device)
            return torch.stack((q_offset.expand(batch_size), first), 1)[:, None, None]
        if mask_function is causal_mask_function and allow_is_causal_skip:
            start = int(q_offset) if isinstance(q_offset, Tensor) else q_offset  # of a static cache, on the device
            length = start + q_length
            room = kv_offset + kv_length - length
            if room > 0 and attention_mask is not None and attention_mask.shape[1] == length:
                _check_left(attention_mask)
            elif room and (room < 0 or attention_mask is not None):
                raise ValueError(
                    f"expected a cache whose keys end with the last query, or a static one, {WITH}, got {kv_length} "
                    f"keys for {q_length} queries from position {start} on: prefix caches are not supported"
                )
            return _hidden(batch_size, length, attention_mask, device, torch.uint8)
        # A model that forbids to skip the mask joins it with another one.
        if mask_function is bidirectional_mask_function and allow_is_bidirectional_skip:
            return _hidden(batch_size, kv_length, attention_mask, device, torch.bool)
        if _is_packed(mask_function) and q_length == kv_length:
            return _documents(batch_size, kv_length, mask_function, device)
    own: Tensor = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size=local_size,
        allow_is_causal_skip=False, use_vmap=use_vmap, device=device,
    )  # fmt: skip
    return own


def _hidden(
    batch_size: int, kv_length: int, real: Tensor | None, device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """`(B, 1, 1, K)`, 1 = real."""
    if real is not None and tuple(real.shape) != (batch_size, kv_length):
        raise ValueError(
            f"expected attention_mask of shape (batch, keys) = {(batch_size, kv_length)} {WITH}, got "
            f"{tuple(real.shape)}"
        )
    if real is None or (packing.is_readable(real) and bool(real.all())):
        # int16 says it too: `generate` makes masks for static caches contiguous.
        dtype = torch.int16 if dtype == torch.uint8 else dtype
        return torch.ones((), dtype=dtype, device=device).expand(batch_size, 1, 1, kv_length)
    return real[:, None, None].to(dtype).contiguous()


def _first_real(real: Tensor | None, batch_size: int, device: torch.device | str) -> Tensor:
    """int64 `(B,)`."""
    if real is None:
        return torch.zeros(batch_size, dtype=torch.int64, device=device)
    return real.to(torch.uint8).argmax(1)


def _check_left(real: Tensor) -> None:
    """A step over a static cache looks at each row's first real token alone."""
    left = real == (real.cumsum(1) > 0)
    packing.check(left.all(), f"expected padding on the left alone with a static cache {WITH}, got 0 after 1")


def _is_packed(mask_function: Any) -> bool:
    # transformers combines no other functions without saying so by a size or by `use_vmap`; Dynamo reads this name, but
    # not what a closure holds.
    return isinstance(mask_function, FunctionType) and mask_function.__qualname__ == "and_masks.<locals>.and_mask"


def _documents(batch_size: int, length: int, mask_function: Any, device: torch.device | str) -> Tensor:
    """int32 `(B, 1, 1, K)`: two neighbours that see each other belong to one document."""
    rows = torch.arange(batch_size, device=device)[:, None]
    index = torch.arange(length, device=device)[None]
    begins = ~mask_function(rows, torch.zeros_like(rows), index, index - 1).expand(batch_size, length)
    numbers = begins.cumsum(1, dtype=torch.int32)
    form: Any = numbers[:, None, None]
    if packing.is_readable(numbers):
        form.cu_seqlens = packing.bounds(numbers)  # once for all layers
    made: Tensor = form
    return made
