"""LongViT: sizes, orders, positions, and that only the order of the sequence differs between orders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dilated_attention_pytorch.kernels.hilbert import curve_order
from dilated_attention_pytorch.models import LongViT, LongViTConfig, load_pretrained, save_pretrained
from dilated_attention_pytorch.testing import relative_norm

TINY: dict[str, Any] = {
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 4,
    "ffn_dim": 24,
    "segment_lengths": (8, 40),
    "dilation_rates": (1, 3),
    "position_grid": (5, 7),
    "drop_path": 0.0,
}
ORDERS = ["raster", "snake", "morton", "hilbert"]


def tiny(**options: Any) -> LongViT:
    model = LongViT(**TINY | options, dtype=torch.float64)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("positions", ["learned", "sincos"])
@pytest.mark.parametrize("order", ORDERS)
def test_any_size_that_patches_fill(order: Any, positions: Any) -> None:
    model = tiny(order=order, positions=positions, num_classes=3)
    for rows, columns in ((5, 7), (1, 1), (2, 9), (8, 8)):
        out = model(torch.randn(2, 3, 4 * rows, 4 * columns, dtype=torch.float64))
        assert out.pooled.shape == (2, 16) and out.patches.shape == (2, rows, columns, 16)
        assert out.logits is not None and out.logits.shape == (2, 3)
    for shape in ((1, 3, 18, 20), (1, 3, 0, 20), (1, 1, 20, 20), (3, 20, 20)):
        with pytest.raises(ValueError, match="expected"):
            model(torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("global_pool", [False, True])
def test_the_order_is_that_of_the_sequence_alone(order: Any, global_pool: bool) -> None:
    """The layers over patches in the curve's order, put back where they were."""
    model, grid = tiny(order=order, global_pool=global_pool), (5, 7)
    images = torch.randn(2, 3, 20, 28, dtype=torch.float64)
    curve = curve_order(order, grid=grid).order
    x = (model.patch_embed(images).permute(0, 2, 3, 1) + model.pos_embed).flatten(1, 2)[:, curve]
    x = torch.cat((model.cls_token.expand(2, -1, -1), x), 1)
    h = model.encoder(x, is_causal=False)
    want = torch.empty_like(h[:, 1:])
    want[:, curve] = h[:, 1:]
    out = model(images)
    assert relative_norm(out.patches, want.unflatten(1, grid)) < 1e-13
    assert relative_norm(out.pooled, want.mean(1) if global_pool else h[:, 0]) < 1e-13


def test_orders_differ_where_segments_are_short_and_agree_where_one_holds_all() -> None:
    images = torch.randn(1, 3, 20, 28, dtype=torch.float64)
    state = tiny().state_dict()
    for pattern, same in (({}, False), ({"segment_lengths": (64,), "dilation_rates": (1,)}, True)):
        results = []
        for order in ("raster", "hilbert"):
            model = tiny(order=order, **pattern)
            model.load_state_dict(state)
            results.append(model(images).patches)
        assert (relative_norm(*results) < 1e-12) is same


def test_learned_positions_at_their_own_grid_and_another() -> None:
    model = tiny()
    assert torch.equal(model._positions((5, 7), torch.device("cpu")), model.pos_embed)
    with torch.no_grad():
        model.pos_embed.fill_(0.25)
    other = model._positions((9, 4), torch.device("cpu"))
    assert other.shape == (1, 9, 4, 16)
    torch.testing.assert_close(other, torch.full_like(other, 0.25))


def test_training_and_saving(tmp_path: Path) -> None:
    model = tiny(order="hilbert", dropout=0.1, drop_path=0.3, num_classes=2).train()
    images = torch.randn(2, 3, 20, 28, dtype=torch.float64)
    grads = []
    for again in (False, True):
        model.gradient_checkpointing = again
        model.zero_grad()
        torch.manual_seed(1)
        out = model(images)
        (out.logits.sum() + out.patches.square().sum()).backward()
        # The last layer's key bias among them: every parameter takes part.
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    save_pretrained(model.eval(), tmp_path)
    twin = load_pretrained(tmp_path)
    assert isinstance(twin, LongViT) and twin.config == model.config
    assert torch.equal(twin(images).pooled, model(images).pooled)


def test_meta_tensors() -> None:
    model = LongViT(**TINY, device="meta")
    assert model(torch.zeros(2, 3, 16, 8, device="meta")).pooled.shape == (2, model.config.embed_dim)


def test_bad_configs() -> None:
    for options, message in (
        ({"order": "spiral"}, "expected order to be one of"),
        ({"positions": "none"}, "expected positions to be one of"),
        ({"position_grid": (3,)}, r"position_grid to be \(rows, columns\)"),
        ({"embed_dim": 18, "num_heads": 3}, "multiple of 4 and of num_heads"),
        ({"num_classes": -1}, "num_classes to be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            LongViTConfig(**TINY | options)
    with pytest.raises(TypeError, match="images to be a Tensor"):
        tiny()([1, 2])
    for dtype in (torch.uint8, torch.float32):
        with pytest.raises(TypeError, match=f"the parameters' dtype torch.float64, got {dtype}"):
            tiny()(torch.zeros(1, 3, 8, 8, dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny().float()(torch.zeros(1, 3, 8, 8).bfloat16()).pooled.isfinite().all()
    with pytest.raises(TypeError, match="gradient_checkpointing to be a bool, got str 'yes'"):
        LongViT(**TINY, gradient_checkpointing="yes")
