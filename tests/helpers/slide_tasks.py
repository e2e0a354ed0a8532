"""What the workers of test_slide_ring.py run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dilated_attention_pytorch.models import SlideEncoder

TINY: dict[str, Any] = {
    "in_chans": 6,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 4,
    "ffn_dim": 24,
    "segment_lengths": (8, 20, 100),
    "dilation_rates": (1, 2, 3),
    "dropout": 0.0,
}


def model(**options: Any) -> SlideEncoder:
    torch.manual_seed(0)
    encoder = SlideEncoder(**TINY | options, dtype=torch.float64)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


def slides(num_tiles: int, masked: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(num_tiles)
    tiles = torch.randn(2, num_tiles, 6, dtype=torch.float64, generator=generator)
    coords = torch.randint(0, 200_000, (2, num_tiles, 2), generator=generator)
    mask = torch.arange(num_tiles) < torch.tensor([[num_tiles], [num_tiles - 9]]) if masked else None
    return tiles, coords, mask


def objective(pooled: Tensor, layers: Tensor) -> Tensor:
    """A loss with a different weight on everything."""
    everything = torch.cat((pooled[None], layers))
    weights = torch.linspace(-1, 1, everything.numel(), dtype=everything.dtype).view_as(everything)
    return (everything * weights).sum() + everything.square().sum()


def encode(
    groups: dict[int, dist.ProcessGroup], bounds: list[list[int]], masked: bool, options: dict[str, Any], again: bool
) -> list[dict[str, Tensor]]:
    """One model, one slide after the other, cut at different places; results and gradients of this rank."""
    rank = dist.get_rank()
    encoder = model(**options)
    encoder.gradient_checkpointing = again
    encoder.shard_context(groups[len(bounds[0]) - 1], timeout=30)
    encoder.train()
    found = []
    for cuts in bounds:
        tiles, coords, mask = slides(cuts[-1], masked)
        rows = slice(cuts[rank], cuts[rank + 1])
        out = encoder(tiles[:, rows], coords[:, rows], None if mask is None else mask[:, rows])
        encoder.zero_grad()
        objective(out.pooled, out.layers).backward()
        grads = {}
        for name, parameter in encoder.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            dist.all_reduce(grad, group=groups[len(cuts) - 1])
            grads[name] = grad.detach()
        found.append(
            {"pooled": out.pooled.detach(), "layers": out.layers.detach(), "tiles": out.tiles.detach()} | grads
        )
    return found


def drop_alike(groups: dict[int, dist.ProcessGroup]) -> list[Tensor]:
    """Ranks with generators of their own leave out the same sublayers."""
    torch.manual_seed(100 + dist.get_rank())
    encoder = model(drop_path=0.5).train()
    torch.manual_seed(100 + dist.get_rank())
    encoder.shard_context(groups[2], timeout=30)
    tiles, coords, _ = slides(20, False)
    x, rows = encoder.embed(tiles, coords)
    factors = [encoder._drop_path(rows, x) for _ in range(8)]
    return [f for f in factors if f is not None]
