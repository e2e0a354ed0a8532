"""Modules and their inputs at any length, and what an export of them is held to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim

from dilated_attention_pytorch import (
    DilatedAttention,
    LongNet,
    LongNetEncoder,
    LongNetLM,
    LongViT,
    MultiheadDilatedAttention,
    SlideEncoder,
)

# Lengths that one graph has to serve: shorter than each segment, one that nothing divides, several segments of each.
EXAMPLE, LENGTHS = 33, (7, 41, 200)
PATTERN = {"segment_lengths": [16, 50], "dilation_rates": [1, 4]}
N = Dim("n", min=6, max=100_000)


class Exported(NamedTuple):
    """A module, its keyword arguments at a length, and which of their dimensions that length is."""

    module: nn.Module
    inputs: Callable[[int], dict[str, Tensor]]
    dims: dict[str, int | None]

    @property
    def dynamic_shapes(self) -> dict[str, dict[int, Any] | None]:
        return {name: None if dim is None else {dim: N} for name, dim in self.dims.items()}


def padded(n: int) -> Tensor:
    """A mask of two rows, the first one shorter."""
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[0, n * 2 // 3 :] = False
    return mask


def qkv(n: int) -> dict[str, Tensor]:
    return {"query": torch.randn(2, n, 4, 8), "key": torch.randn(2, n, 2, 8), "value": torch.randn(2, n, 2, 8)}


def packed(n: int) -> dict[str, Tensor]:
    return {name: x[0] for name, x in qkv(n).items()} | {"cu_seqlens": torch.tensor([0, 3, n])}


def slides(n: int) -> dict[str, Tensor]:
    return {"tiles": torch.randn(2, n, 16), "coords": torch.randint(0, 100_000, (2, n, 2)).float()}


QKV = {"query": 1, "key": 1, "value": 1}
SIZES = {"d_model": 32, "nhead": 4, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 64, **PATTERN}
TILES = {"in_chans": 16, "embed_dim": 32, "depth": 1, "num_heads": 4, "ffn_dim": 64, **PATTERN}


def attention_cases() -> Iterator[tuple[str, Exported]]:
    row_start = {"row_start": torch.tensor([0, 3])}
    for backend in ("auto", "reference"):
        module = DilatedAttention(**PATTERN, backend=backend)
        yield backend, Exported(module, qkv, QKV)
        yield (
            f"{backend}-mask",
            Exported(module, lambda n: qkv(n) | {"key_padding_mask": padded(n)}, QKV | {"key_padding_mask": 1}),
        )
        yield f"{backend}-row_start", Exported(module, lambda n: qkv(n) | row_start, QKV | {"row_start": None})
        dims = {"query": 0, "key": 0, "value": 0, "cu_seqlens": None}
        yield f"{backend}-packed", Exported(module, packed, dims)
    legacy = DilatedAttention([16, 48], [1, 4], head_groups=True)
    yield "head_groups", Exported(legacy, qkv, QKV)
    yield (
        "head_groups-mask",
        Exported(legacy, lambda n: qkv(n) | {"key_padding_mask": padded(n)}, QKV | {"key_padding_mask": 1}),
    )
    multihead = MultiheadDilatedAttention(32, 4, **PATTERN, positions="rotary")
    yield (
        "multihead-mask",
        Exported(
            multihead,
            lambda n: dict.fromkeys(("query", "key", "value"), torch.randn(2, n, 32)) | {"key_padding_mask": padded(n)},
            QKV | {"key_padding_mask": 1},
        ),
    )


def model_cases() -> Iterator[tuple[str, Exported]]:
    for model in (LongNet(**SIZES), LongNetEncoder(**SIZES)):
        yield (
            type(model).__name__,
            Exported(
                model,
                lambda n: {"x": torch.randn(2, n, 32), "key_padding_mask": padded(n)},
                {"x": 1, "key_padding_mask": 1},
            ),
        )
    lm, row_start = LongNetLM(vocab_size=50, **SIZES), torch.tensor([0, 3])
    yield "LongNetLM", Exported(lm, lambda n: {"tokens": torch.randint(50, (2, n))}, {"tokens": 1})
    yield (
        "LongNetLM-mask",
        Exported(
            lm,
            lambda n: {"tokens": torch.randint(50, (2, n)), "key_padding_mask": padded(n)},
            {"tokens": 1, "key_padding_mask": 1},
        ),
    )
    yield (
        "LongNetLM-row_start",
        Exported(
            lm,
            lambda n: {"tokens": torch.randint(50, (2, n)), "row_start": row_start},
            {"tokens": 1, "row_start": None},
        ),
    )
    yield (
        "LongNetLM-packed",
        Exported(
            lm,
            lambda n: {"tokens": torch.randint(50, (n,)), "cu_seqlens": torch.tensor([0, 3, n])},
            {"tokens": 0, "cu_seqlens": None},
        ),
    )
    for padding in ("none", "zero_keys"):
        for global_pool in (False, True):
            encoder = SlideEncoder(**TILES, padding=padding, global_pool=global_pool)
            name = f"SlideEncoder-{padding}{'-mean' * global_pool}"
            yield name, Exported(encoder, slides, {"tiles": 1, "coords": 1})
            yield (
                f"{name}-mask",
                Exported(encoder, lambda n: slides(n) | {"mask": padded(n)}, {"tiles": 1, "coords": 1, "mask": 1}),
            )


CASES = dict(attention_cases()) | dict(model_cases())


def longvit(positions: str, order: str) -> LongViT:
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 4, "ffn_dim": 64, "position_grid": (4, 4), "num_classes": 3}
    return LongViT(patch_size=4, positions=positions, order=order, **sizes, **PATTERN)


def agree(got: Any, want: Any, tolerance: float) -> None:
    torch.testing.assert_close(tuple(got) if isinstance(want, tuple) else got, want, rtol=tolerance, atol=tolerance)
