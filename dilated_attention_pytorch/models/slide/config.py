"""The shape of a slide encoder, as one frozen value: given, or read from a Prov-GigaPath-shaped checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.files import check_path
from dilated_attention_pytorch.models import weights
from dilated_attention_pytorch.models.config import AboveZero, Probability, VisionConfig, Width
from dilated_attention_pytorch.models.slide.positions import sincos
from dilated_attention_pytorch.types import MixingGradient, Padding

_SHORTEST, _BRANCHES = 1024, 5
_CHECKED_ROWS = 257


def slide_segment_lengths(max_wsi_size: int = 262_144, tile_size: int = 256) -> tuple[int, ...]:
    """The five segment lengths that the official code derives from the largest slide.

    They run geometrically from 1,024 to the largest power of two within the tiles of a square slide of that size,
    each rounded down.

    Args:
        max_wsi_size: side of the largest slide, in pixels.
        tile_size: side of a tile, in pixels.

    Raises:
        ValueError: a slide of fewer than 1,024 tiles, or of 2**63 and more.

    Example:
        >>> slide_segment_lengths()
        (1024, 5792, 32768, 185363, 1048576)
    """
    max_wsi_size = check.check_positive_int("max_wsi_size", max_wsi_size)
    tile_size = check.check_positive_int("tile_size", tile_size)
    tiles = (max_wsi_size // tile_size) ** 2
    if tiles < _SHORTEST:
        raise ValueError(
            f"expected max_wsi_size to hold at least {_SHORTEST} tiles of tile_size, got {max_wsi_size} and "
            f"{tile_size}, which make {tiles}"
        )
    if tiles >= 2**63:
        raise ValueError(f"expected max_wsi_size and tile_size to make fewer than 2**63 tiles, got {tiles}")
    low, high = math.log2(_SHORTEST), math.floor(math.log2(tiles))
    return tuple(int(2.0 ** (low + i * (high - low) / (_BRANCHES - 1))) for i in range(_BRANCHES))


@dataclass(frozen=True, kw_only=True)
class SlideEncoderConfig(VisionConfig):
    """Everything that decides a `SlideEncoder`'s parameters and what it computes from them.

    Defaults are Prov-GigaPath's 12-layer, 768-wide encoder, except for `padding`: a model made from a config leaves out
    the official code's keys of zeros; `SlideEncoder.from_pretrained` keeps them.

    Args:
        in_chans: width of a tile's embedding.
        embed_dim: width of the encoder; a multiple of 4.
        depth: layers.
        num_heads: attention heads, a divisor of embed_dim.
        ffn_dim: width inside the feed-forward network.
        segment_lengths: w_i, one per branch; `slide_segment_lengths` gives those of another slide size.
        dilation_rates: r_i, one per branch.
        tile_size: side of a tile in pixels, at the level that the tile encoder saw. In `from_pretrained` segment
            lengths follow from it.
        level0_tile_size: pixels between neighbouring tiles, at the level the coordinates are given in; `tile_size` by
            default. For a slide scanned at 40x and cut at 20x, with level-0 coordinates, that is 512. It scales
            coordinates alone.
        slide_ngrids: side of the grid of positions, in tiles.
        global_pool: a slide's embedding is the mean over its tiles; otherwise the cls token's.
        dropout: of embeddings and of what each sublayer adds, in training mode.
        drop_path: probability that the last layer's additions are left out for a slide, in training mode; it rises
            linearly from 0 at the first layer.
        padding: `"none"`, or `"zero_keys"` for the numbers of published checkpoints.
        mixing_gradient: `"exact"`, or `"detached"` for the official code's gradient.
        offsets: `"blocked"`, as in every published checkpoint, or `"modulo"`.
        layer_norm_eps: epsilon of the LayerNorms inside the encoder.
        norm_eps: epsilon of the outer norm.

    Raises:
        ValueError: a value out of range; an unknown option.
        TypeError: a value of the wrong type.

    Example:
        >>> from dilated_attention_pytorch.models import slide_segment_lengths
        >>> SlideEncoderConfig(segment_lengths=slide_segment_lengths(250_000)).segment_lengths
        (1024, 4870, 23170, 110217, 524288)
    """

    in_chans: Width = 1536
    embed_dim: Width = 768
    ffn_dim: Width = 3072
    segment_lengths: tuple[int, ...] = slide_segment_lengths()
    tile_size: int = 256
    level0_tile_size: int | None = None
    slide_ngrids: Width = 1000
    global_pool: bool = False
    dropout: Probability = 0.25
    padding: Padding = "none"
    mixing_gradient: MixingGradient = "exact"
    norm_eps: AboveZero = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        width, heads = self.embed_dim, self.num_heads
        if width % heads:
            raise ValueError(f"expected embed_dim to be a multiple of num_heads, got {width} and {heads}")
        if width % 4:
            raise ValueError(f"expected embed_dim to be a multiple of 4, for two sincos codes, got {width}")
        _ = self.layers  # checks the rest


def config_and_state(
    source: weights.WeightsSource, max_wsi_size: int | None, tile_size: int | None, overrides: Mapping[str, Any]
) -> tuple[SlideEncoderConfig, dict[str, Tensor]]:
    """The config and the weights of a checkpoint; arguments as in `SlideEncoder.from_pretrained`."""
    options, made = dict(overrides), tuple[int, ...]()
    if tile_size is not None:
        options["tile_size"] = tile_size
    if max_wsi_size is not None or tile_size is not None:
        if "segment_lengths" in options:
            raise ValueError(
                "expected segment_lengths or else max_wsi_size and tile_size, from which they follow, got both"
            )
        sizes = {"max_wsi_size": max_wsi_size, "tile_size": tile_size}
        given = {name: size for name, size in sizes.items() if size is not None}
        options["segment_lengths"] = made = slide_segment_lengths(**given)
    if not isinstance(source, Mapping):
        is_path = isinstance(source, str | os.PathLike)
        source = check_path("weights" if is_path else "weights, unless they are a mapping,", source)
    if isinstance(source, Path) and source.is_dir():
        architecture, values = weights.read_config(source)
        if architecture != "SlideEncoder":
            raise ValueError(f"expected a SlideEncoder in {source}, got {check.quoted(architecture)}")
        with weights.naming(source / weights.CONFIG):
            config = SlideEncoderConfig.from_dict(values)
        _check_count(made, options.get("dilation_rates", config.dilation_rates))
        return replace(config, **options), weights.read_safetensors(source / weights.WEIGHTS)
    state = weights.read_state(source)
    # Sizes that shapes tell; the check of names and shapes finds what is missing.
    shapes = {"embed_dim": ("cls_token", -1), "in_chans": ("patch_embed.proj.weight", -1)}
    shapes |= {"ffn_dim": ("encoder.layers.0.ffn.fc1.weight", 0)}
    sizes = {
        name: state[key].shape[dim] for name, (key, dim) in shapes.items() if key in state and state[key].dim() > 1
    }
    if depth := weights.count_layers(state, "encoder"):
        sizes["depth"] = depth
    config = SlideEncoderConfig(padding="zero_keys")
    _check_count(made, options.get("dilation_rates", config.dilation_rates))
    config = replace(config, **(sizes | options))
    if (table := state.pop("pos_embed", None)) is not None:
        config = _checked_table(table, config, "slide_ngrids" in options)
    return config, state


def _check_count(made: tuple[int, ...], rates: Any) -> None:
    """Raise a ValueError where segment lengths that a slide's size made are more or fewer than the rates."""
    if made and isinstance(rates, tuple | list) and len(rates) != len(made):
        raise ValueError(
            f"expected {len(made)} dilation_rates, as many as the segment_lengths that follow from max_wsi_size and "
            f"tile_size, got {check.listed(rates)}"
        )


def _checked_table(table: Tensor, config: SlideEncoderConfig, named: bool) -> SlideEncoderConfig:
    """The config with the table's grid. The table is not kept: 257 of its rows are compared with the computed ones."""
    side = math.isqrt(max(0, table.shape[-2] - 1)) if table.dim() == 3 else 0
    if table.dim() != 3 or table.shape != (1, side * side + 1, config.embed_dim) or side == 0:
        raise ValueError(f"expected pos_embed of shape (1, G * G + 1, {config.embed_dim}), got {tuple(table.shape)}")
    if named and side != config.slide_ngrids:
        got = config.slide_ngrids
        raise ValueError(f"expected slide_ngrids={side}, as the checkpoint's pos_embed has it, got {got}")
    rows = min(_CHECKED_ROWS, side * side)
    number = torch.linspace(0, side * side - 1, rows, dtype=torch.float64, device="cpu").long()
    half = config.embed_dim // 2
    want = torch.cat((sincos(number % side, half), sincos(number // side, half)), -1)
    # The stored dtype's rounding of a number of size 1, and twice as much for another library's sine.
    allowed = 3 * torch.finfo(table.dtype).eps / 2 if table.is_floating_point() else -1.0
    error = float((table[0, number + 1].double() - want).abs().max())
    if not error <= allowed or bool((table[0, 0] != 0).any()):
        raise ValueError(
            f"expected the checkpoint's pos_embed to be the sincos table of a {side} x {side} grid after a row of "
            f"zeros, which is computed here, got rows that differ by {error:.1e}: another model"
        )
    return replace(config, slide_ngrids=side)
