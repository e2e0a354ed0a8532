"""Prov-GigaPath-shaped checkpoints: the model's sizes from their shapes, and their position table, if there is one."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.models.slide.config import SlideEncoderConfig, slide_segment_lengths
from dilated_attention_pytorch.models.slide.positions import sincos
from dilated_attention_pytorch.models.weights import WEIGHTS, count_layers, read_config, read_safetensors, read_state

TABLE = "pos_embed"
_CHECKED_ROWS = 257


def config_and_state(
    source: str | os.PathLike[str] | Mapping[str, Any],
    max_wsi_size: int | None,
    tile_size: int | None,
    overrides: Mapping[str, Any],
) -> tuple[SlideEncoderConfig, dict[str, Tensor]]:
    """The config and the weights of a checkpoint; arguments as in `SlideEncoder.from_pretrained`."""
    options = dict(overrides)
    if tile_size is not None:
        options["tile_size"] = tile_size
    if max_wsi_size is not None or tile_size is not None:
        if "segment_lengths" in options:
            raise ValueError(
                "expected segment_lengths or else max_wsi_size and tile_size, from which they follow, got both"
            )
        options["segment_lengths"] = slide_segment_lengths(max_wsi_size or 262_144, tile_size or 256)
    if not isinstance(source, Mapping) and Path(source).is_dir():
        architecture, values = read_config(Path(source))
        if architecture != "SlideEncoder":
            raise ValueError(f"expected a SlideEncoder in {source}, got {architecture!r}; see load_pretrained")
        config = replace(SlideEncoderConfig.from_dict(values), **options)
        return config, read_safetensors(Path(source) / WEIGHTS)
    state = read_state(source)
    config = replace(SlideEncoderConfig(padding="zero_keys"), **(_sizes(state) | options))
    table = state.pop(TABLE, None)
    if table is not None:
        config = _checked_table(table, config, "slide_ngrids" in options)
    return config, state


def _sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes that shapes tell; the check of names and shapes finds what is missing."""
    found = {}
    for field, key, dim in (
        ("embed_dim", "cls_token", -1),
        ("in_chans", "patch_embed.proj.weight", -1),
        ("ffn_dim", "encoder.layers.0.ffn.fc1.weight", 0),
    ):
        if key in state and state[key].dim() > 1:
            found[field] = state[key].shape[dim]
    if depth := count_layers(state, "encoder"):
        found["depth"] = depth
    return found


def _checked_table(table: Tensor, config: SlideEncoderConfig, named: bool) -> SlideEncoderConfig:
    """The config with the table's grid. The table is not kept: 257 of its rows are compared with the computed ones."""
    side = math.isqrt(max(0, table.shape[-2] - 1)) if table.dim() == 3 else 0
    if table.dim() != 3 or table.shape != (1, side * side + 1, config.embed_dim) or side == 0:
        raise ValueError(f"expected {TABLE} of shape (1, G * G + 1, {config.embed_dim}), got {tuple(table.shape)}")
    if named and side != config.slide_ngrids:
        raise ValueError(f"expected slide_ngrids={side}, as the checkpoint's {TABLE} has it, got {config.slide_ngrids}")
    number = torch.linspace(0, side * side - 1, min(_CHECKED_ROWS, side * side), dtype=torch.float64).long()
    half = config.embed_dim // 2
    want = torch.cat((sincos(number % side, half), sincos(number // side, half)), -1)
    # The stored dtype's rounding of a number of size 1, and twice as much for another library's sine.
    allowed = 3 * torch.finfo(table.dtype).eps / 2 if table.is_floating_point() else -1.0
    error = float((table[0, number + 1].double() - want).abs().max())
    if not error <= allowed or bool((table[0, 0] != 0).any()):
        raise ValueError(
            f"expected the checkpoint's {TABLE} to be the sincos table of a {side} x {side} grid after a row of zeros, "
            f"which is computed here, got rows that differ by {error:.1e}: another model"
        )
    return replace(config, slide_ngrids=side)
