"""Prov-GigaPath's slide encoder: tile embeddings with coordinates in, a slide's embedding out."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.core import torch_private
from dilated_attention_pytorch.core.validation import (
    FLOAT_DTYPES,
    check_beside,
    check_bool,
    check_dense,
    check_int,
    check_positive_int,
    quoted,
)
from dilated_attention_pytorch.models import hub
from dilated_attention_pytorch.models.layers import LayerStack, has_head_groups, stochastic_depth
from dilated_attention_pytorch.models.sharding import ShardedModel, sum_over_ranks
from dilated_attention_pytorch.models.slide.attention import AttentionMap, layer_attention, query_rows
from dilated_attention_pytorch.models.slide.config import SlideEncoderConfig, config_and_state
from dilated_attention_pytorch.models.slide.positions import position_rows
from dilated_attention_pytorch.models.slide.rows import SlideRows, as_tensor
from dilated_attention_pytorch.models.weights import WeightsSource, load_into
from dilated_attention_pytorch.types import BackendName


class SlideOutput(NamedTuple):
    """The output of `SlideEncoder` for a batch of slides.

    The official code returns a list of one embedding, which its users take as `outputs[0]` or `outputs[-1]`: both are
    `pooled` here. Take the others by name.

    Attributes:
        pooled: `(B, embed_dim)`, each slide's embedding: the official code's output.
        layers: `(depth + 1, B, embed_dim)`, the same of every hidden state, the embeddings' first: the official code's
            output with `all_layer_embed=True`. They pass only the outer norm and skip the encoder's own, so the last
            of them differs from `pooled`.
        tiles: `(B, L, embed_dim)`, each tile's output after both norms; zeros where the mask has none.
    """

    pooled: Tensor
    layers: Tensor
    tiles: Tensor

    def __getitem__(self, index: Any) -> Any:
        return tuple.__getitem__(self, 0 if index == -1 else index)


class SlideEncoder(ShardedModel[SlideEncoderConfig]):
    """A LongNet over the tiles of a slide, as in Prov-GigaPath (Nature 630, 181-188, 2024).

    Parameters have the official names, so state dicts fit both. Positions come from the tiles' coordinates and are made
    when needed: there is no table to store or load. Under autocast the sum that runs through the layers stays fp32,
    as in the official code. The feed-forward network keeps little for the backward, and has first derivatives only.
    The other arguments are those of `LongNet`.

    `tile_size` and `global_pool` may be set on the built model, as on the official one: `encoder.tile_size = 512` is
    `level0_tile_size` of the config, so coordinates are scaled and segments stay.

    After `shard_context` a rank holds some tiles of every slide, as many as it likes. With `padding="zero_keys"` it
    takes no mask, so the slides of a batch are of one length; and not several segments of a w that r does not divide,
    whose rows the official code moves (beyond 185,363 tokens with the published pattern). `forward` takes this rank's
    tiles, coordinates and mask; `pooled` and `layers` are the whole slide's, on every rank, and `tiles` are this
    rank's. Compute the same loss from `pooled` on every rank; the gradients of a head on top are whole on each.

    Args:
        config: the model's shape; `SlideEncoderConfig()` by default.
        overrides: fields of `SlideEncoderConfig` by name, in place of the config's.

    Example:
        >>> encoder = SlideEncoder(in_chans=32, embed_dim=64, depth=2, num_heads=4,
        ...                        ffn_dim=128).eval()
        >>> coords = 256 * torch.cartesian_prod(torch.arange(20), torch.arange(30))
        >>> out = encoder(torch.randn(1, 600, 32), coords[None])
        >>> out.pooled.shape, out.layers.shape, out.tiles.shape
        (torch.Size([1, 64]), torch.Size([3, 1, 64]), torch.Size([1, 600, 64]))
    """

    def _build(self, **factory: Any) -> None:
        config, width = self.config, self.config.embed_dim
        # Built without memory and then initialised once, the official way; a checkpoint's tensors take its place.
        meta = factory | {"device": "meta"}
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Linear(config.in_chans, width, **meta)))
        self.cls_token = nn.Parameter(torch.empty(1, 1, width, **meta))
        self.encoder = LayerStack(config.layers, config.depth, 1.0, meta, recompute=True, backend=self._backend)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps, **meta)
        self.to_empty(device=torch.get_default_device() if factory["device"] is None else factory["device"])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The official initialisation: xavier-uniform weights, zero biases, a cls token of deviation 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.normal_(self.cls_token, std=0.02)

    @property
    def tile_size(self) -> int:
        """Pixels between neighbouring tiles, at the level the coordinates are given in."""
        return self.config.level0_tile_size or self.config.tile_size

    @tile_size.setter
    def tile_size(self, pixels: int) -> None:
        self.config = replace(self.config, level0_tile_size=check_positive_int("tile_size", pixels))

    @property
    def global_pool(self) -> bool:
        """Whether a slide's embedding is the mean over its tiles, in place of the cls token's."""
        return self.config.global_pool

    @global_pool.setter
    def global_pool(self, mean: bool) -> None:
        self.config = replace(self.config, global_pool=mean)

    @classmethod
    def from_pretrained(
        cls,
        source: WeightsSource,
        max_wsi_size: int | None = None,
        tile_size: int | None = None,
        *,
        backend: BackendName = "auto",
        gradient_checkpointing: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        **overrides: Any,
    ) -> SlideEncoder:
        """A model with the weights of a Prov-GigaPath-shaped checkpoint, in evaluation mode.

        Width, depth and the widths of tiles and feed-forward network come from the weights' shapes; the number of heads
        is 16 unless said. `padding` is `"zero_keys"` unless said: published weights were trained with it, and its
        numbers are the official ones. Loading a file needs about the weights' own size in memory; tensors of a mapping
        are copied.

        Args:
            source: a checkpoint, `.pth` or `.safetensors`: `{"model": state_dict}` or the state dict itself; or that
                mapping; or a folder that `save_pretrained` wrote, whose config then holds; or `"hf-hub:ORG/NAME"`,
                a repository with `slide_encoder.pth` or such a folder's files (`@REVISION` may follow).
            max_wsi_size: side of the largest slide in pixels, which decides the segment lengths; 262,144 by default.
            tile_size: side of a tile in pixels; 256 by default.
            backend, gradient_checkpointing: as in the constructor.
            device: where the parameters go.
            dtype: of the parameters; the checkpoint's by default.
            overrides: fields of `SlideEncoderConfig` by name, such as `global_pool` and `padding`.

        Raises:
            FileNotFoundError: no such file, or no access to it.
            ImportError: `hf-hub:` without huggingface_hub.
            ValueError: keys or shapes that are not the model's, with the first of them; a stored position table that
                is not the one computed here.
        """
        source = hub.local(source)
        config, state = config_and_state(source, max_wsi_size, tile_size, overrides)
        model = cls(config, backend=backend, gradient_checkpointing=gradient_checkpointing, device="meta")
        load_into(model, state, copy=isinstance(source, Mapping), device=device, dtype=dtype)
        return model.eval()

    def forward(
        self, tiles: Tensor, coords: Tensor, mask: Tensor | None = None, *, all_layer_embed: bool = False
    ) -> SlideOutput | list[Tensor]:
        """Encodes a batch of slides.

        Args:
            tiles: `(B, L, in_chans)`, floating; taken into the parameters' dtype. A NumPy array is taken to the
                parameters' device, as are the next two.
            coords: `(B, L, 2)`, x and y of each tile's corner in pixels; ints, fp32 or fp64. A UserWarning tells of
                tiles that share their places in the grid, as all do where column and row numbers were given.
            mask: bool `(B, L)`, True = real. Padded on the right, each slide gives what it gives alone, in either
                padding mode. Holes hide tiles and move no position; `padding="zero_keys"` refuses them.
            all_layer_embed: the official code's argument; its list is then returned.

        Returns:
            `SlideOutput(pooled, layers, tiles)`; with `all_layer_embed` the list of `layers`, each `(B, embed_dim)`.

        Raises:
            ValueError: shapes or coordinates that do not fit; a slide without tiles with `global_pool`.
            TypeError: an argument of the wrong type or dtype.
        """
        check_bool("all_layer_embed", all_layer_embed)
        x, rows = self.embed(tiles, coords, mask)
        summary: list[Tensor] = []
        options = rows.options(x.device) | {"gradient_checkpointing": self.gradient_checkpointing}
        options |= {"scales": self._drop_path(rows, x), "each": lambda h: summary.append(self._summary(h, rows))}
        h = self.encoder(x, is_causal=False, **options)
        summary.append(self._summary(h, rows))
        pooled = self._outer_norm(self._over_ranks(torch.stack(summary)))
        if all_layer_embed:
            return list(pooled[:-1])
        return SlideOutput(pooled[-1], pooled[:-1], rows.tiles(self.norm(h)))

    def embed(self, tiles: Tensor, coords: Tensor, mask: Tensor | None = None) -> tuple[Tensor, SlideRows]:
        """The first layer's input, and how slides lie in its rows; arguments as in `forward`."""
        device = self.cls_token.device
        tiles, coords = as_tensor("tiles", tiles, device), as_tensor("coords", coords, device)
        mask = None if mask is None else as_tensor("mask", mask, device)
        self._check(tiles, coords, mask)
        config = self.config
        if self._shards is not None:
            self._shards.compare_again()
        packing = {"pack": self._shards is None, "zero_keys": config.padding == "zero_keys"}
        rows = SlideRows.of(tiles.shape[0], tiles.shape[1], mask, has_cls=self._is_first, **packing)
        if rows.mask is not None and rows.ends is None and config.padding == "zero_keys":
            if self._shards is not None:
                raise ValueError(
                    "expected no mask with padding='zero_keys' on a sharded model, got one: the number of zero keys "
                    "depends on each slide's own length; give one slide at a time, or take padding='none'"
                )
            raise ValueError(
                "expected mask to be padded on the right with padding='zero_keys', got one with holes: the official "
                "numbers know no hidden tiles; take them out of the slide, or take padding='none'"
            )
        if mask is not None:
            tiles = tiles.masked_fill(~mask[..., None], 0.0)  # padding may hold anything, NaN too
        x = self.patch_embed(tiles.to(self.cls_token.dtype))
        positions = position_rows(coords, config.embed_dim, self.tile_size, config.slide_ngrids, mask)
        x = (x + positions).to(self.cls_token.dtype)
        if rows.has_cls:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)
        x = rows.lay_out(x)
        return nn.functional.dropout(x, config.dropout, self.training), rows

    @torch.no_grad()
    def attention_map(
        self,
        tiles: Tensor,
        coords: Tensor,
        *,
        layer: int,
        head: int | None = None,
        query: int | Literal["cls"] | Sequence[int] | Tensor = "cls",
    ) -> AttentionMap:
        """The exact attention of some tiles, or of the cls token, to each tile in one layer.

        Only the rows asked for are formed: memory grows with the number of queries times the number of tiles.

        Args:
            tiles: `(1, L, in_chans)`, one slide.
            coords: `(1, L, 2)`.
            layer: which layer, from 0.
            head: which head, from 0; the mean over heads without it.
            query: a tile's number, several of them (an array or tensor too), or `"cls"`.

        Returns:
            `AttentionMap(tiles, cls, nothing)`; a row of the three sums to 1.

        Raises:
            ValueError: a layer, head or query that is not there, more than one slide, a sharded model.
        """
        inputs = self.layer_inputs(tiles, coords, layer, head)  # checks all but the query, and computes no layer yet
        queries = query_rows(query, len(tiles[0]))
        asked: Any = self.encoder.layers[layer]
        return layer_attention(asked, deque(inputs, maxlen=1).pop(), self.config, head, queries)

    def layer_inputs(self, tiles: Tensor, coords: Tensor, layer: int, head: int | None = None) -> Iterator[Tensor]:
        """What layers 0 to `layer` take of one slide, each `(1, 1 + L, embed_dim)`; arguments as in `attention_map`."""
        config = self.config
        if self._shards is not None:
            raise ValueError("expected a model that is not sharded for an attention map; load it once more on one rank")
        if has_head_groups(self):
            raise ValueError(
                "expected an encoder with head_groups=False, got one made in legacy mode, whose heads have one branch "
                "each"
            )
        if self.training:
            raise ValueError("expected a model in evaluation mode, got one in training: call eval() first")
        for name, number, stop in (
            ("layer", layer, config.depth),
            ("head", 0 if head is None else head, config.num_heads),
        ):
            if check_int(name, number, 0) >= stop:
                raise ValueError(f"expected {name} in [0, {stop}), got {number}")
        tiles = as_tensor("tiles", tiles, self.cls_token.device)
        check_dense("tiles", tiles)
        if tiles.dim() == 3 and tiles.shape[0] != 1:
            raise ValueError(f"expected one slide, tiles of shape (1, L, {config.in_chans}), got {tuple(tiles.shape)}")
        x, _ = self.embed(tiles, coords)  # checks both
        return islice(chain([x], self.encoder.states(x, is_causal=False)), layer + 1)

    @property
    def _is_first(self) -> bool:
        """Whether this rank has the first tiles, and the cls token before them."""
        return self._shards is None or self._shards.rank == 0

    def _drop_path(self, rows: SlideRows, x: Tensor) -> Tensor | None:
        """Factors for each layer and slide; None where nothing is dropped."""
        if not self.training or self.config.drop_path == 0.0:
            return None
        factors = stochastic_depth(self.config.drop_path, self.config.depth, rows.num_slides, x.device)
        if self._shards is not None:  # every rank leaves out the same
            factors = sum_over_ranks(factors * (self._shards.rank == 0), self._shards)
        return rows.per_row(factors)

    def _summary(self, h: Tensor, rows: SlideRows) -> Tensor:
        """This rank's part of each slide's embedding, before the norm: `(B, D)`, or with the count beside it."""
        if self.config.global_pool:
            sums, counts = rows.tile_sums(h)
            return torch.cat((sums, counts.to(sums.dtype)), 1)
        if rows.has_cls:
            return rows.cls_rows(h)
        return h[:, :0].sum(1)  # zeros that keep h in the graph, so that this rank joins the backward's collectives

    def _over_ranks(self, summary: Tensor) -> Tensor:
        """The embeddings of whole slides, before the norm: the first rank's cls tokens, or the mean over all tiles."""
        if self._shards is not None:
            summary = sum_over_ranks(summary, self._shards)
        if not self.config.global_pool:
            return summary
        sums, counts = summary[..., :-1], summary[..., -1:]
        if torch.compiler.is_compiling():
            torch_private.check_in_graph(
                (counts > 0).all(), "expected at least one tile in every slide with global_pool"
            )
        elif bool((counts == 0).any()):
            empty = (counts[0, :, 0] == 0).nonzero()[:, 0].tolist()
            raise ValueError(
                f"expected at least one tile in every slide with global_pool, got none in slides {quoted(empty)}"
            )
        return (sums / counts).to(self.cls_token.dtype)

    def _outer_norm(self, x: Tensor) -> Tensor:
        if self._is_first:
            return self.norm(x)  # type: ignore[no-any-return]
        # The same on every rank; the parameters' gradient is counted on the first alone.
        fixed = {name: parameter.detach() for name, parameter in self.norm.named_parameters()}
        return torch.func.functional_call(self.norm, fixed, (x,))  # type: ignore[no-any-return]

    def _check(self, tiles: Tensor, coords: Tensor, mask: Tensor | None) -> None:
        given = {"tiles": tiles, "coords": coords} | ({} if mask is None else {"mask": mask})
        for name, x in given.items():
            check_dense(name, x)
        if tiles.dtype not in FLOAT_DTYPES:
            raise TypeError(f"expected tiles of a floating dtype, got {tiles.dtype}")
        if tiles.dim() != 3 or tiles.shape[-1] != self.config.in_chans:
            raise ValueError(f"expected tiles of shape (B, L, {self.config.in_chans}), got {tuple(tiles.shape)}")
        shape = tuple(tiles.shape[:2])
        if coords.shape != (*shape, 2):
            raise ValueError(f"expected coords of shape {(*shape, 2)}, got {tuple(coords.shape)}")
        for name, x in given.items():
            check_beside(name, x, self.cls_token)
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"expected mask of dtype torch.bool (True = real), got {mask.dtype}")
        if mask is not None and mask.shape != shape:
            raise ValueError(f"expected mask of shape {shape}, got {tuple(mask.shape)}")
