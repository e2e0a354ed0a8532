"""The slide encoder on a CUDA device: Triton against torch's own attention, batches, and what fine-tuning holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch.models import SlideEncoder
from dilated_attention_pytorch.testing import relative_norm

pytestmark = pytest.mark.gpu

SMALL: dict[str, Any] = {"in_chans": 64, "embed_dim": 192, "depth": 2, "num_heads": 4, "ffn_dim": 256}


def small(**options: Any) -> SlideEncoder:
    torch.manual_seed(0)
    return SlideEncoder(**SMALL | {"dropout": 0.0, "drop_path": 0.0} | options, device="cuda").eval()


def slide(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    coords = 256 * torch.randint(0, 1000, (1, n, 2), generator=generator)
    return torch.randn(1, n, 64, generator=generator).cuda(), coords.cuda()


@pytest.mark.parametrize("padding", ["none", "zero_keys"])
def test_bf16_is_as_near_to_fp32_as_with_torchs_attention(padding: Any) -> None:
    tiles, coords = slide(5792)
    results = []
    for backend, autocast in (("sdpa", False), ("sdpa", True), ("auto", True)):
        encoder = small(padding=padding, backend=backend)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out = encoder(tiles, coords)
        out.pooled.float().square().sum().backward()
        grads = torch.cat([p.grad.flatten() for p in encoder.parameters()])
        results.append((out.pooled.detach(), out.layers.detach(), out.tiles.detach(), grads))
    for want, base, got in zip(*results, strict=True):
        assert relative_norm(got, want) <= 2 * relative_norm(base, want)


@pytest.mark.parametrize("padding", ["none", "zero_keys"])
def test_a_batch_is_each_alone(padding: Any) -> None:
    lengths = [1069, 4002, 9731]
    slides = [slide(n) for n in lengths]
    shape = (3, max(lengths))
    tiles, coords = torch.zeros(*shape, 64, device="cuda"), torch.zeros(*shape, 2, dtype=torch.int64, device="cuda")
    mask = torch.arange(shape[1], device="cuda") < torch.tensor(lengths, device="cuda")[:, None]
    for b, n in enumerate(lengths):
        tiles[b, :n], coords[b, :n] = slides[b][0][0], slides[b][1][0]
    # fp32 on the device may still multiply with less; the reference of the difference is the same call in fp64.
    encoder, exact = small(padding=padding), small(padding=padding, backend="sdpa").double()
    with torch.inference_mode():
        together = encoder(tiles, coords, mask)
        for b, n in enumerate(lengths):
            alone, truth = encoder(*slides[b]), exact(slides[b][0].double(), slides[b][1])
            allowed = 2 * relative_norm(alone.tiles, truth.tiles)
            assert relative_norm(together.tiles[b, :n], truth.tiles[0]) <= allowed
            assert relative_norm(together.pooled[b], truth.pooled[0]) <= 2 * allowed


@pytest.mark.slow
def test_fine_tuning_the_largest_slide_stays_under_20_gib() -> None:
    n = 45_680
    encoder = SlideEncoder(padding="zero_keys", device="cuda").train()
    optimizer = torch.optim.AdamW(encoder.parameters(), fused=True)
    tiles = torch.randn(1, n, 1536, device="cuda", dtype=torch.bfloat16)
    coords = 256 * torch.randint(0, 1000, (1, n, 2), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # the second has the optimizer's moments
        with torch.autocast("cuda", torch.bfloat16):
            loss = encoder(tiles, coords).pooled.float().square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert torch.cuda.max_memory_allocated() < 20 * 2**30
