"""The shape of a slide encoder, as one frozen value."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.models.config import LongNetConfig, ModelConfig, encoder_layers
from dilated_attention_pytorch.types import MixingGradient, Offsets, Padding

_SHORTEST, _BRANCHES = 1024, 5


def slide_segment_lengths(max_wsi_size: int = 262_144, tile_size: int = 256) -> tuple[int, ...]:
    """The five segment lengths that the official code derives from the largest slide.

    They run geometrically from 1,024 to the largest power of two within the tiles of a square slide of that size,
    each rounded down.

    Args:
        max_wsi_size: side of the largest slide, in pixels.
        tile_size: side of a tile, in pixels.

    Raises:
        ValueError: a slide of fewer than 1,024 tiles.

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
    low, high = math.log2(_SHORTEST), math.floor(math.log2(tiles))
    return tuple(int(2.0 ** (low + i * (high - low) / (_BRANCHES - 1))) for i in range(_BRANCHES))


@dataclass(frozen=True, kw_only=True)
class SlideEncoderConfig(ModelConfig):
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
        tile_size: pixels between neighbouring tiles, at the level the coordinates are given in.
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

    in_chans: int = 1536
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 16
    ffn_dim: int = 3072
    segment_lengths: tuple[int, ...] = slide_segment_lengths()
    dilation_rates: tuple[int, ...] = (1, 2, 4, 8, 16)
    tile_size: int = 256
    slide_ngrids: int = 1000
    global_pool: bool = False
    dropout: float = 0.25
    drop_path: float = 0.1
    padding: Padding = "none"
    mixing_gradient: MixingGradient = "exact"
    offsets: Offsets = "blocked"
    layer_norm_eps: float = 1e-5
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        self._keep(check.check_width, "in_chans", "embed_dim", "num_heads", "ffn_dim", "slide_ngrids")
        self._keep(check.check_depth, "depth")
        self._keep(check.check_positive_int, "tile_size")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"expected embed_dim to be a multiple of num_heads, got {self.embed_dim} and {self.num_heads}"
            )
        layers = self.layers  # checks what it shares with LongNet
        if self.embed_dim % 4:
            raise ValueError(f"expected embed_dim to be a multiple of 4, for two sincos codes, got {self.embed_dim}")
        self._keep(check.check_probability, "drop_path")
        self._keep(check.check_above_zero, "norm_eps")
        self._keep(check.check_bool, "global_pool")
        shared = "segment_lengths dilation_rates dropout padding mixing_gradient offsets layer_norm_eps"
        self._set(**{name: getattr(layers, name) for name in shared.split()})

    @property
    def layers(self) -> LongNetConfig:
        """The same layers as LongNet names them."""
        return encoder_layers(self, mixing_gradient=self.mixing_gradient, padding=self.padding)
