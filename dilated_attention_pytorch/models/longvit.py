"""LongViT (arXiv 2312.03558): a LongNet over the patches of an image, in raster order or along a curve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.functional import in_autocast_dtype
from dilated_attention_pytorch.models.config import Count, Depth, Model, Probability, VisionConfig, Width
from dilated_attention_pytorch.models.layers import LayerStack, stochastic_depth
from dilated_attention_pytorch.models.slide.positions import sincos_table
from dilated_attention_pytorch.models.weights import count_layers
from dilated_attention_pytorch.types import Padding

PatchPositions = Literal["learned", "sincos"]
PatchOrder = Literal["raster", "snake", "morton", "hilbert"]


@dataclass(frozen=True, kw_only=True)
class LongViTConfig(VisionConfig):
    """Everything that decides a `LongViT`'s parameters and what it computes from them.

    The other arguments, and the errors, are those of `SlideEncoderConfig`.

    Args:
        in_chans: channels of an image.
        patch_size: side of a patch, in pixels.
        segment_lengths: w_i in patches, one per branch.
        positions: `"learned"`, a table for `position_grid` that is interpolated to other grids, or `"sincos"`.
        position_grid: (rows, columns) of the learned table.
        order: in which patches follow one another: `"raster"`, `"snake"`, `"morton"` or `"hilbert"`.
        global_pool: an image's embedding is the mean over its patches; otherwise the cls token's.
        class_token: whether there is a cls token, before the patches; without one `global_pool` has to be True.
        final_norm: whether there is a LayerNorm after the last layer.
        fc_norm: that LayerNorm is taken of the embedding, after pooling, and not of the patches (`class_token`,
            `final_norm` and `fc_norm` are timm's names; the published fine-tuned models have False, True, True).
        padding: `"none"`, or `"zero_keys"` for the official code's numbers where segments are not full.
        num_classes: outputs of the head; 0 for none.
        offsets: `"blocked"` (the official code) or `"modulo"` (the paper).
        layer_norm_eps: epsilon of every LayerNorm.
    """

    in_chans: Width = 3
    patch_size: Depth = 32
    embed_dim: Width = 384
    ffn_dim: Width = 1536
    segment_lengths: tuple[int, ...] = (1024, 4096, 16384, 65536, 262144)
    positions: PatchPositions = "learned"
    position_grid: tuple[int, int] = (32, 32)
    order: PatchOrder = "raster"
    global_pool: bool = True
    class_token: bool = True
    final_norm: bool = True
    fc_norm: bool = False
    padding: Padding = "none"
    num_classes: Count = 0
    dropout: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        width, heads = self.embed_dim, self.num_heads
        if width % 4 or width % heads:
            raise ValueError(f"expected embed_dim to be a multiple of 4 and of num_heads, got {width} and {heads}")
        if not (self.class_token or self.global_pool):
            raise ValueError(
                "expected global_pool=True without a class_token, got False: there is nothing else to pool"
            )
        if self.fc_norm and not self.final_norm:
            raise ValueError("expected final_norm=True with fc_norm, which says where that LayerNorm is, got False")
        if len(self.position_grid) != 2:
            raise ValueError(f"expected position_grid to be (rows, columns), got {check.quoted(self.position_grid)}")
        for i, side in enumerate(self.position_grid):
            check.check_depth(f"position_grid[{i}]", side)
        _ = self.layers  # checks the rest


# The official code's segment lengths by the side of a model's images, in pixels; elsewhere the first.
_OFFICIAL = {
    1024: (64, 128, 256, 512, 1024),
    4096: (1024, 2048, 4096, 8192, 16384),
    8192: (1024, 4096, 8192, 16384, 65536),
    16384: (1024, 4096, 16384, 65536, 262144),
    32768: (1024, 4096, 32768, 262144, 1048576),
}


def official_config(state: dict[str, Tensor], **options: Any) -> LongViTConfig:
    """The config of an official checkpoint, whose tensors have the names they have here.

    Sizes come from shapes, segment lengths from the image side that the position table was made for. In `state` the
    table gets the shape it has here. `options` are fields of the config, in place of what was found.
    """
    for name in ("patch_embed.weight", "pos_embed", "encoder.layers.0.ffn.fc1.weight"):
        if name not in state:
            raise ValueError(f"expected the weights of LongViT, got none at {name}")
    patch, table = state["patch_embed.weight"], state["pos_embed"]
    side = math.isqrt(table.shape[1]) if table.dim() == 3 else 0
    if patch.dim() != 4 or table.shape != (1, side * side, patch.shape[0]):
        raise ValueError(
            f"expected pos_embed of shape (1, G * G, {patch.shape[0]}) and a patch_embed of 4 dimensions, got "
            f"{tuple(table.shape)} and {tuple(patch.shape)}"
        )
    state["pos_embed"] = table.unflatten(1, (side, side))
    found: dict[str, Any] = {
        "in_chans": patch.shape[1],
        "patch_size": patch.shape[-1],
        "embed_dim": patch.shape[0],
        "depth": count_layers(state, "encoder"),
        "ffn_dim": state["encoder.layers.0.ffn.fc1.weight"].shape[0],
        "segment_lengths": _OFFICIAL.get(side * patch.shape[-1], _OFFICIAL[1024]),
        "position_grid": (side, side),
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "class_token": False,
        "final_norm": "encoder.layer_norm.weight" in state,
        "fc_norm": "encoder.layer_norm.weight" in state,
        "padding": "zero_keys",
    }
    return LongViTConfig(**found | options)


class LongViTOutput(NamedTuple):
    """The output of `LongViT` for a batch of images.

    Attributes:
        pooled: `(B, embed_dim)`, each image's embedding.
        patches: `(B, rows, columns, embed_dim)`, each patch's output, where it lies in the image; with `fc_norm` the
            last layer's, before the LayerNorm.
        logits: `(B, num_classes)`; None without a head.
    """

    pooled: Tensor
    patches: Tensor
    logits: Tensor | None


class LongViT(Model[LongViTConfig]):
    """A vision transformer with dilated attention, for images of any size that patches fill (arXiv 2312.03558).

    Along a Hilbert curve a segment of the sequence is a compact region of the image, in raster order a thin strip. The
    order changes who attends to whom, and nothing else: positions are the patches' own. The feed-forward network keeps
    little for the backward, and has first derivatives only. The other arguments are those of `LongNet`.

    Args:
        config: the model's shape; `LongViTConfig()` by default.
        overrides: fields of `LongViTConfig` by name, in place of the config's.

    Example:
        >>> model = LongViT(patch_size=8, embed_dim=64, depth=2, num_heads=4, ffn_dim=128,
        ...                 positions="sincos")
        >>> out = model.eval()(torch.randn(1, 3, 64, 96))
        >>> out.pooled.shape, out.patches.shape
        (torch.Size([1, 64]), torch.Size([1, 8, 12, 64]))
    """

    def _build(self, **factory: Any) -> None:
        config, width, size = self.config, self.config.embed_dim, self.config.patch_size
        self.patch_embed = nn.Conv2d(config.in_chans, width, size, size, **factory)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width, **factory)) if config.class_token else None
        self.pos_embed = None
        if config.positions == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, *config.position_grid, width, **factory))
        gamma = math.sqrt(math.log(2 * config.depth))
        self.encoder = LayerStack(config.layers, config.depth, gamma, factory, recompute=True, backend=self._backend)
        if not config.final_norm:
            self.encoder.layer_norm = nn.Identity()  # type: ignore[assignment]
        self.head = nn.Linear(width, config.num_classes, **factory) if config.num_classes else None
        nn.init.xavier_uniform_(self.patch_embed.weight.view(width, -1))
        nn.init.zeros_(self.patch_embed.bias)  # type: ignore[arg-type]  # it has one
        for table in (self.cls_token, self.pos_embed):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)

    def forward(self, images: Tensor) -> LongViTOutput:
        """Encodes images.

        Args:
            images: `(B, in_chans, height, width)`, sides multiples of `patch_size`; in the parameters' dtype.

        Returns:
            `LongViTOutput(pooled, patches, logits)`.

        Raises:
            ValueError: another shape.
            TypeError: no tensor, or one of another dtype; under autocast it may be any that autocast converts.
        """
        config, size = self.config, self.config.patch_size
        check.check_dense("images", images)
        if images.dim() != 4 or images.shape[1] != config.in_chans:
            raise ValueError(f"expected images of shape (B, {config.in_chans}, H, W), got {tuple(images.shape)}")
        weight = self.patch_embed.weight
        check.check_beside("images", images, weight)
        images, like = in_autocast_dtype(images, weight)
        if images.dtype != like.dtype:
            raise TypeError(f"expected images of the parameters' dtype {like.dtype}, got {images.dtype}")
        if 0 in images.shape[2:] or images.shape[2] % size or images.shape[3] % size:
            raise ValueError(f"expected sides that are multiples of patch_size={size}, got {tuple(images.shape[2:])}")
        x = self.patch_embed(images).permute(0, 2, 3, 1)  # (B, rows, columns, D)
        grid = (x.shape[1], x.shape[2])
        x = (x + self._positions(grid, x.device)).to(weight.dtype).flatten(1, 2)
        order = inverse = None
        if config.order != "raster":
            from dilated_attention_pytorch.kernels.hilbert import curve_order

            order, inverse = (index.to(x.device) for index in curve_order(config.order, grid=grid))
            x = x.index_select(1, order)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)
        x = nn.functional.dropout(x, config.dropout, self.training)
        scales = None
        if self.training and config.drop_path > 0.0:
            scales = stochastic_depth(config.drop_path, config.depth, x.shape[0], x.device)[..., None, None]
        options: dict[str, Any] = {"scales": scales, "gradient_checkpointing": self.gradient_checkpointing}
        h = self.encoder(x, is_causal=False, normed=not config.fc_norm, **options)
        patches = h if self.cls_token is None else h[:, 1:]
        pooled = patches.mean(1) if config.global_pool else h[:, 0]
        if config.fc_norm:
            pooled = self.encoder.layer_norm(pooled)
        if inverse is not None:
            patches = patches.index_select(1, inverse)
        logits = None if self.head is None else self.head(pooled)
        return LongViTOutput(pooled, patches.unflatten(1, grid), logits)

    def _positions(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """`(1, rows, columns, D)`."""
        rows, columns = grid
        if self.pos_embed is None:
            half = self.config.embed_dim // 2
            across = sincos_table(columns, half, device)[None].expand(rows, -1, -1)
            down = sincos_table(rows, half, device)[:, None].expand(-1, columns, -1)
            return torch.cat((across, down), -1)[None]
        # A graph for all grids interpolates to this one too, which gives the table itself.
        if all(isinstance(n, int) for n in grid) and grid == self.config.position_grid:
            return self.pos_embed
        table = self.pos_embed.permute(0, 3, 1, 2)
        return nn.functional.interpolate(table, grid, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
