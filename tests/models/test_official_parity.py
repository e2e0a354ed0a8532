"""The slide encoder and the op against the plain re-statement of the official rules, outputs and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import official_rules
import pytest
import torch
from official_rules import SLIDE, SLIDE_250000, Branches
from torch import Tensor

from dilated_attention_pytorch import dilated_attention, dilated_attention_with_lse
from dilated_attention_pytorch.models import SlideEncoder, slide_segment_lengths
from dilated_attention_pytorch.testing import gradient_scale, relative_norm

LIMIT = 1e-5  # what fp32 is held to; a wrong rule shows as 1e-2 or more

# Tokens (the cls token is one of them), the pattern, and heads: fewer where the dense re-statement is slow.
CASES = [
    pytest.param(1, SLIDE, 16, id="1"),
    pytest.param(5, SLIDE, 16, id="5"),
    pytest.param(1024, SLIDE, 16, id="1024"),
    pytest.param(1069, SLIDE, 16, id="1069"),
    pytest.param(5792, SLIDE, 4, id="5792"),
    pytest.param(10_007, SLIDE, 2, id="10007"),
    pytest.param(23_171, SLIDE_250000, 2, id="23171-of-250000"),
]


def ours(branches: Branches) -> dict[str, Any]:
    lengths, rates = zip(*branches, strict=True)
    return {"segment_lengths": lengths, "dilation_rates": rates, "padding": "zero_keys", "offsets": "blocked"}


def test_the_patterns_are_the_official_ones() -> None:
    assert slide_segment_lengths() == tuple(w for w, _ in SLIDE)
    assert slide_segment_lengths(250_000) == tuple(w for w, _ in SLIDE_250000)
    assert slide_segment_lengths(32 * 256, 256) == (1024,) * 5
    with pytest.raises(ValueError, match="at least 1024 tiles of tile_size, got 4096 and 256, which make 256"):
        slide_segment_lengths(4096)


@pytest.mark.parametrize(("n", "branches", "heads"), CASES)
def test_attention(n: int, branches: Branches, heads: int) -> None:
    """A head at a time: the re-statement's matrices of one head are all that fits."""
    width = 4
    q, k, v, cotangent = (torch.randn(n, heads, width) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want = official_rules.attention(*leaves, branches)
    want_grads = torch.autograd.grad(want, leaves, cotangent)
    again = [x[None].requires_grad_() for x in (q, k, v)]
    got = dilated_attention(*again, mixing_gradient="detached", **ours(branches))
    got_grads = torch.autograd.grad(got, again, cotangent[None])
    assert relative_norm(got[0], want) <= LIMIT
    for name, other, mine, theirs in zip("qkv", (k, q, None), got_grads, want_grads, strict=True):
        scale = 0.0 if other is None else gradient_scale(cotangent, None, v, other, width**-0.5)
        assert relative_norm(mine[0], theirs, scale=scale) <= LIMIT, name


def small(heads: int, depth: int = 2, **options: Any) -> SlideEncoder:
    options = {"ffn_dim": 24, "in_chans": 12, "mixing_gradient": "detached"} | options
    encoder = SlideEncoder(embed_dim=4 * heads, depth=depth, num_heads=heads, dropout=0.0, drop_path=0.0, **options)
    for parameter in encoder.parameters():  # biases and norms as well
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder.eval()


def compare(encoder: SlideEncoder, tiles: Tensor, coords: Tensor, branches: Branches, heads: int) -> None:
    state = {name: x.detach().clone().requires_grad_() for name, x in encoder.state_dict().items()}
    want, hidden = official_rules.encode(state, tiles, coords, branches, heads, encoder.config.global_pool)
    cotangent = torch.randn(len(hidden) + 1, want.shape[0], dtype=tiles.dtype)
    (torch.stack([want, *hidden]) * cotangent).sum().backward()
    out = encoder(tiles[None], coords[None])
    assert out.layers.shape[:2] == (encoder.config.depth + 1, 1)
    got = torch.cat([out.pooled, out.layers[:, 0]])
    (got * cotangent).sum().backward()
    assert relative_norm(got, torch.stack([want, *hidden])) <= LIMIT
    # One vector of all gradients, and each parameter with what rounding leaves where its own gradient cancels: a key's
    # bias has none, since it shifts all logits of a query alike but for the zero keys'.
    mine = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    whole = torch.cat([state[name].grad.flatten() for name in mine]).norm().item()
    for name, grad in mine.items():
        assert grad is not None and state[name].grad is not None, name
        error = (grad - state[name].grad).norm().item()
        assert error <= LIMIT * max(state[name].grad.norm().item(), 0.01 * whole), name


def slide(n: int, in_chans: int = 12) -> tuple[Tensor, Tensor]:
    """n tokens: n - 1 tiles at places of their own."""
    places = torch.randperm(1000 * 1000)[: n - 1]
    return torch.randn(n - 1, in_chans), torch.stack((places // 1000, places % 1000), 1) * 256 + 17


@pytest.mark.parametrize(("n", "global_pool"), [(1, False), (2, True), (5, False), (1024, False), (1069, True)])
def test_encoder(n: int, global_pool: bool) -> None:
    compare(small(4, global_pool=global_pool, **ours(SLIDE)), *slide(n), SLIDE, 4)


def test_encoder_at_a_longer_length() -> None:
    compare(small(2, 1, **ours(SLIDE_250000)), *slide(5792), SLIDE_250000, 2)


def test_the_masked_result_is_another() -> None:
    """The reason for the mode: on the demo slide's length the two differ by far more than rounding."""
    branches, n = SLIDE, 1069
    q, k, v = (torch.randn(1, n, 16, 4) for _ in range(3))
    official = official_rules.attention(q[0], k[0], v[0], branches)
    masked = dilated_attention(q, k, v, **(ours(branches) | {"padding": "none"}))
    assert relative_norm(masked[0], official) > 0.05


def test_the_exact_gradient_is_another() -> None:
    q, k, v = (torch.randn(1, 1069, 16, 4).requires_grad_() for _ in range(3))
    grads = {}
    for mixing in ("exact", "detached"):
        out = dilated_attention(q, k, v, mixing_gradient=mixing, **ours(SLIDE))
        (grads[mixing],) = torch.autograd.grad(out.square().sum(), q)
    assert relative_norm(grads["exact"], grads["detached"]) > 0.05


def test_the_harness_names_all_that_it_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/official_parity.py without the official package, and the attention that it lends it on a CPU."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import official_parity

    there = ("torch", "numpy")
    monkeypatch.setattr(official_parity.importlib.util, "find_spec", lambda name: name if name in there else None)
    with pytest.raises(SystemExit, match="found no gigapath, timm, fairscale, einops, huggingface_hub, flash_attn: "):
        official_parity.check_needs("cuda")
    with pytest.raises(SystemExit, match="found no gigapath, timm, fairscale, einops, huggingface_hub: "):
        official_parity.check_needs("cpu")
    q, k, v = (torch.randn(2, 33, 4, 8) for _ in range(3))
    out, lse = official_parity.plain_attention(q, k, v, is_causal=True)
    want = dilated_attention_with_lse(q, k, v, segment_lengths=[33], dilation_rates=[1], is_causal=True, backend="sdpa")
    torch.testing.assert_close(out, want.out)
    torch.testing.assert_close(lse, want.lse)
