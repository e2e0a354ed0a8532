"""The interfaces of slide tools, without the tools: TRIDENT's batch, slide2vec's and the official pipeline's calls."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import official_rules
import pytest
import torch

from dilated_attention_pytorch.integrations.trident import GigaPathSlideEncoder
from dilated_attention_pytorch.models import SlideEncoder
from dilated_attention_pytorch.testing import relative_norm

SHAPE: dict[str, Any] = {"in_chans": 12, "embed_dim": 16, "depth": 2, "num_heads": 4, "ffn_dim": 24}
BRANCHES = list(zip(SlideEncoder(**SHAPE, device="meta").config.segment_lengths, (1, 2, 4, 8, 16), strict=True))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    encoder = SlideEncoder(**SHAPE)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.save({"model": encoder.state_dict()}, tmp_path / "slide_encoder.pth")
    return tmp_path / "slide_encoder.pth"


def slide(patch_size_level0: int) -> dict[str, Any]:
    """As TRIDENT makes it of a file: fp32 features, int64 level-0 coordinates, the attributes of `coords`."""
    places = torch.cartesian_prod(torch.arange(9), torch.arange(11))
    attributes = {"patch_size": 256, "patch_size_level0": patch_size_level0, "overlap": 0, "name": "slide"}
    coords = (places * patch_size_level0)[None]
    return {"features": torch.randn(1, 99, 12), "coords": coords, "attributes": attributes}


@pytest.mark.parametrize("patch_size_level0", [256, 512])
@pytest.mark.parametrize("layer", [1, 2, None])
def test_trident(patch_size_level0: int, layer: int | None, checkpoint: Path) -> None:
    """Against the official rules on coordinates at the tile encoder's level; 1e-5 is what fp32 is held to."""
    encoder = GigaPathSlideEncoder(checkpoint, layer=layer, num_heads=4)
    assert (encoder.enc_name, encoder.precision, encoder.embedding_dim) == ("gigapath", torch.float32, 16)
    assert not encoder.model.training
    assert not any(p.requires_grad for p in encoder.parameters())
    batch = slide(patch_size_level0)
    found = encoder(batch, "cpu")
    state = torch.load(checkpoint, weights_only=True)["model"]
    coords = batch["coords"][0] // (patch_size_level0 // 256)
    want, hidden = official_rules.encode(state, batch["features"][0], coords, BRANCHES, 4, global_pool=True)
    assert found.shape == (1, 16)
    assert relative_norm(found[0], want if layer is None else hidden[layer]) <= 1e-5


def test_tridents_own_class_can_hold_our_model(checkpoint: Path) -> None:
    """What its forward does to `self.model`, which may be a `SlideEncoder`."""
    model: Any = SlideEncoder.from_pretrained(checkpoint, num_heads=4, global_pool=True)
    batch = slide(512)
    model.tile_size = batch["attributes"]["patch_size_level0"]
    found = model(batch["features"], batch["coords"], all_layer_embed=True)[1]
    assert torch.equal(found, GigaPathSlideEncoder(checkpoint, layer=1, num_heads=4)(batch, "cpu"))


def test_slide2vec(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe of docs/slides.md, and what slide2vec does with the model."""
    made = SimpleNamespace(create_model=lambda *_: SlideEncoder.from_pretrained(checkpoint, num_heads=4))
    monkeypatch.setitem(sys.modules, "gigapath.slide_encoder", made)
    from gigapath.slide_encoder import create_model  # type: ignore[import-not-found]

    model, batch = create_model("hf_hub:prov-gigapath/prov-gigapath", "gigapath_slide_enc12l768d", 1536), slide(256)
    outputs = model(batch["features"], batch["coords"])
    assert isinstance(outputs, list | tuple)
    state = torch.load(checkpoint, weights_only=True)["model"]
    want, _ = official_rules.encode(state, batch["features"][0], batch["coords"][0], BRANCHES, 4)
    assert relative_norm(outputs[-1].squeeze(0), want) <= 1e-5


def test_mistakes(checkpoint: Path) -> None:
    for given in ({}, {"weights": checkpoint, "pretrained": False}):
        with pytest.raises(ValueError, match="expected weights, a file say, or else pretrained=False"):
            GigaPathSlideEncoder(**given)
    with pytest.raises(ValueError, match="expected layer to be at most 2, the model's depth, got 11"):
        GigaPathSlideEncoder(checkpoint, num_heads=4)
    with pytest.raises(TypeError, match="expected precision to be a floating dtype such as float32, got str 'fp16'"):
        GigaPathSlideEncoder(checkpoint, num_heads=4, layer=1, precision="fp16")
    with pytest.raises(TypeError, match="expected freeze to be a bool, got ndarray"):
        GigaPathSlideEncoder(checkpoint, num_heads=4, layer=1, freeze=np.ones(2))
    encoder, batch = GigaPathSlideEncoder(checkpoint, layer=1, num_heads=4, freeze=False), slide(256)
    assert all(p.requires_grad for p in encoder.parameters())
    for name in batch:
        with pytest.raises(ValueError, match=f"expected a batch of TRIDENT, got none of {name}"):
            encoder({key: value for key, value in batch.items() if key != name}, "cpu")
    with pytest.raises(ValueError, match=r"got none of attributes\['patch_size_level0'\]"):
        encoder(batch | {"attributes": {}}, "cpu")
    for wrong in (None, "512", 0):
        with pytest.raises((TypeError, ValueError), match="expected tile_size to be"):
            encoder(batch | {"attributes": {"patch_size_level0": wrong}}, "cpu")
