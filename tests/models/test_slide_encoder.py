"""The slide encoder: batches, positions, checkpoints, memory, attention maps, and how it fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_attention_pytorch import dilated_attention, legacy_mode
from dilated_attention_pytorch.models import (
    SlideEncoder,
    SlideEncoderConfig,
    SlideOutput,
    load_pretrained,
    save_pretrained,
)
from dilated_attention_pytorch.models.recompute import gelu_norm_linear
from dilated_attention_pytorch.models.slide.positions import position_rows
from dilated_attention_pytorch.testing import relative_norm
from dilated_attention_pytorch.viz import save, slide_figure

TINY: dict[str, Any] = {
    "in_chans": 12,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "ffn_dim": 48,
    "segment_lengths": (16, 45, 300),
    "dilation_rates": (1, 2, 5),
}
PADDINGS = ["none", "zero_keys"]


def tiny(**options: Any) -> SlideEncoder:
    encoder = SlideEncoder(**TINY | options)
    for parameter in encoder.parameters():  # biases and norms as well
        nn.init.normal_(parameter, std=0.3)
    return encoder.eval()


def slide(n: int, in_chans: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + n)
    places = torch.randperm(1000 * 1000, generator=generator)[:n]
    tiles = torch.randn(1, n, in_chans, generator=generator)
    return tiles, (torch.stack((places // 1000, places % 1000), 1) * 256 + 3)[None]


def batch(lengths: list[int], in_chans: int = 12) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor, Tensor]:
    """Slides, and the same padded on the right with what must not matter."""
    slides = [slide(n, in_chans, seed) for seed, n in enumerate(lengths)]
    shape = (len(lengths), max(lengths))
    tiles = torch.full((*shape, in_chans), torch.nan)
    coords, mask = torch.full((*shape, 2), -7), torch.zeros(shape, dtype=torch.bool)
    for b, (some, at) in enumerate(slides):
        tiles[b, : lengths[b]], coords[b, : lengths[b]], mask[b, : lengths[b]] = some[0], at[0], True
    return slides, tiles, coords, mask


def assert_equals_alone(encoder: SlideEncoder, lengths: list[int], tolerance: float) -> None:
    slides, tiles, coords, mask = batch(lengths, encoder.config.in_chans)
    together = encoder(tiles, coords, mask)
    assert isinstance(together, SlideOutput)
    for b, n in enumerate(lengths):
        alone = encoder(*slides[b])
        assert relative_norm(together.pooled[b], alone.pooled[0]) <= tolerance
        assert relative_norm(together.layers[:, b], alone.layers[:, 0]) <= tolerance
        if n:
            assert relative_norm(together.tiles[b, :n], alone.tiles[0]) <= tolerance
        assert not together.tiles[b, n:].any()


class TestBatches:
    # Products of matrices of other shapes sum in another order; 1e-5 is what fp32 is held to throughout.
    @pytest.mark.parametrize("padding", PADDINGS)
    @pytest.mark.parametrize("global_pool", [False, True])
    def test_each_slide_is_what_it_is_alone(self, padding: Any, global_pool: bool) -> None:
        encoder = tiny(padding=padding, global_pool=global_pool).double()
        assert_equals_alone(encoder, [1, 77, 300, 16, 143], 1e-12)

    @pytest.mark.parametrize("padding", PADDINGS)
    def test_real_lengths(self, padding: Any) -> None:
        """1,069, 4,002 and 9,731 tiles, the published pattern; benchmarks/slides.py does the full size."""
        encoder = SlideEncoder(in_chans=8, embed_dim=16, depth=1, num_heads=4, ffn_dim=16, padding=padding).eval()
        with torch.inference_mode():
            assert_equals_alone(encoder, [1069, 4002, 9731], 1e-5)

    @pytest.mark.parametrize("padding", PADDINGS)
    def test_gradients_too(self, padding: Any) -> None:
        encoder = tiny(padding=padding).double()
        slides, tiles, coords, mask = batch([5, 77, 30])
        together, alone = [], []
        encoder(tiles, coords, mask).pooled.square().sum().backward()
        together = [p.grad.clone() for p in encoder.parameters()]
        encoder.zero_grad()
        sum(encoder(*one).pooled.square().sum() for one in slides).backward()
        alone = [p.grad for p in encoder.parameters()]
        whole = torch.cat([x.flatten() for x in alone]).norm()
        for mine, theirs in zip(together, alone, strict=True):
            assert (mine - theirs).norm() <= 1e-12 * whole

    def test_a_mask_with_holes_hides_and_moves_nothing(self) -> None:
        encoder = tiny().double()
        tiles, coords = slide(90)
        mask = torch.rand(1, 90) < 0.7
        mask[0, 3], mask[0, 80] = False, True
        got = encoder(tiles.masked_fill(~mask[..., None], torch.nan), coords, mask)
        changed = torch.where(mask[..., None], tiles, torch.randn_like(tiles))
        again = encoder(changed, coords, mask)
        assert torch.equal(got.pooled, again.pooled) and torch.equal(got.tiles, again.tiles)
        # The op with the same mask, positions as they were: one layer by hand.
        x, rows = encoder.embed(tiles, coords, mask)
        assert x.shape[1] == 91 and rows.mask is not None and int(rows.mask.sum()) == 1 + int(mask.sum())
        assert not got.tiles[~mask].any() and relative_norm(got.pooled, encoder(tiles, coords).pooled) > 1e-6
        with pytest.raises(ValueError, match="padded on the right with padding='zero_keys', got one with holes"):
            tiny(padding="zero_keys")(tiles, coords, mask)

    def test_an_empty_slide(self) -> None:
        out = tiny()(*slide(0))
        assert out.pooled.shape == (1, 32) and out.tiles.shape == (1, 0, 32) and out.pooled.isfinite().all()
        _, tiles, coords, mask = batch([5, 0])
        with pytest.raises(ValueError, match=r"at least one tile in every slide with global_pool, got none in .*\[1\]"):
            tiny(global_pool=True)(tiles, coords, mask)


class TestTraining:
    @pytest.mark.parametrize("masked", [False, True])
    def test_gradient_checkpointing_changes_nothing(self, masked: bool) -> None:
        encoder = tiny(dropout=0.2, drop_path=0.5, depth=3).train()
        _, tiles, coords, mask = batch([40, 77])
        grads = []
        for again in (False, True):
            encoder.gradient_checkpointing = again
            encoder.zero_grad()
            torch.manual_seed(3)
            given = (tiles, coords, mask) if masked else (tiles[1:], coords[1:])
            encoder(*given).pooled.square().sum().backward()
            grads.append([p.grad.clone() for p in encoder.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    def test_evaluation_drops_nothing_and_training_does(self) -> None:
        encoder = tiny(dropout=0.3, drop_path=0.3)
        given = slide(50)
        assert torch.equal(encoder(*given).pooled, encoder(*given).pooled)
        encoder.train()
        assert not torch.equal(encoder(*given).pooled, encoder(*given).pooled)

    @pytest.mark.parametrize("masked", [False, True])
    def test_drop_path_leaves_out_whole_sublayers_of_a_slide(self, masked: bool) -> None:
        """The last layer drops with the full rate: a slide's state passes it as it was, or with all added, scaled."""
        encoder = tiny(dropout=0.0, drop_path=0.6, depth=2).train()
        _, tiles, coords, mask = batch([20] * 63 + [21])
        x, rows = encoder.embed(tiles, coords, mask if masked else None) if masked else encoder.embed(
            tiles[:63, :20], coords[:63, :20]
        )  # fmt: skip
        scales = encoder._drop_path(rows, x)
        assert scales is not None and scales.shape[:2] == (2, 2)
        assert torch.equal(scales[0], torch.ones_like(scales[0]))  # the first layer drops nothing
        of_slides = scales[1, 0, [*rows.bounds[:-1]], 0] if rows.bounds else scales[1, 0, :, 0, 0]
        values = of_slides.unique()
        torch.testing.assert_close(values, torch.tensor([0.0, 2.5]))
        kept = (of_slides > 0).float().mean().item()
        assert abs(kept - 0.4) < 4 * (0.24 / len(of_slides)) ** 0.5
        before, after = x, encoder.encoder.layers[1](x, is_causal=False, scales=scales[1], **rows.options(x.device))
        both = (scales[1] == 0).all(0).expand((*x.shape[:-1], 1))[..., 0]
        assert both.any() and torch.equal(after[both], before[both]) and not torch.equal(after[~both], before[~both])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_the_step_that_keeps_its_input_alone(self, dtype: torch.dtype) -> None:
        norm, linear = nn.LayerNorm(24, dtype=torch.float64), nn.Linear(24, 8, dtype=torch.float64)
        for parameter in [*norm.parameters(), *linear.parameters()]:
            nn.init.normal_(parameter)
        h, cotangent = torch.randn(2, 30, 24, dtype=torch.float64), torch.randn(2, 30, 8, dtype=torch.float64)
        results = {}
        for name, kind in (("exact", torch.float64), ("plain", dtype), ("ours", dtype)):
            norm, linear = norm.to(kind), linear.to(kind)
            leaves = [h.to(kind).requires_grad_(), *norm.parameters(), *linear.parameters()]
            call = gelu_norm_linear if name == "ours" else lambda x, a, b: b(a(F.gelu(x)))
            out = call(leaves[0], norm, linear)
            results[name] = [out, *torch.autograd.grad(out, leaves, cotangent.to(kind))]
            if name == "exact":  # rounded once, for all
                h, cotangent = h.to(dtype).double(), cotangent.to(dtype).double()
                norm, linear = norm.to(dtype).double(), linear.to(dtype).double()
                leaves = [h.requires_grad_(), *norm.parameters(), *linear.parameters()]
                out = linear(norm(F.gelu(h)))
                results[name] = [out, *torch.autograd.grad(out, leaves, cotangent)]
        for want, base, got in zip(results["exact"], results["plain"], results["ours"], strict=True):
            assert relative_norm(got, want) <= max(2 * relative_norm(base, want), 8 * torch.finfo(dtype).eps)

    def test_frozen_parts(self) -> None:
        encoder = tiny()
        for parameter in encoder.parameters():
            parameter.requires_grad_(False)
        encoder.encoder.layers[1].ffn.fc2.weight.requires_grad_(True)
        encoder(*slide(30)).pooled.sum().backward()
        assert [name for name, p in encoder.named_parameters() if p.grad is not None] == [
            "encoder.layers.1.ffn.fc2.weight"
        ]

    def test_what_is_kept_for_the_backward(self) -> None:
        """fp32 without autocast, in widths a token and layer: the residual twice, two LayerNorms' outputs, q, k, v, the
        attention's output, its LayerNorm's, and the feed-forward network's inner width once (not three times)."""
        width, inner, n, heads = 32, 128, 400, 4
        kept: dict[int, tuple[Any, int]] = {}
        numbers = []
        for depth in (1, 2):
            encoder = tiny(depth=depth, ffn_dim=inner, dropout=0.0, drop_path=0.0)
            owned = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
            kept.clear()

            def pack(x: Tensor, owned: set[int] = owned) -> Tensor:
                storage = x.untyped_storage()
                if storage.data_ptr() not in owned:
                    kept[storage.data_ptr()] = (storage, storage.nbytes())
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                out = encoder(*slide(n - 1))
            numbers.append(sum(size for _, size in kept.values()))
            del out
        per_token = (numbers[1] - numbers[0]) / n / 4
        statistics = 2 * 4 + heads  # mean and deviation of four LayerNorms, and the log-sum-exps
        assert per_token <= 9 * width + inner + statistics + 1


class TestPositions:
    def test_rows_are_those_of_the_official_table(self) -> None:
        side, width = 12, 32
        where = torch.arange(side, dtype=torch.float64)
        omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
        code = torch.cat(((where[:, None] * omega).sin(), (where[:, None] * omega).cos()), 1)
        # numpy.meshgrid(w, h) with w first: the first half follows the column.
        table = (
            torch.cat((code[None].expand(side, -1, -1), code[:, None].expand(-1, side, -1)), 2).flatten(0, 1).float()
        )
        x, y = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        for coords in (torch.stack((x, y), -1) * 256 + 255, torch.stack((x, y), -1) * 256.0 + 0.5):
            assert torch.equal(position_rows(coords.flatten(0, 1), width, 256, side), table)

    def test_coordinates_that_cannot_be(self) -> None:
        tiles, coords = slide(5)
        encoder = tiny()
        outside = [(256, -256), (-1, 0), (256_000, 0), (0, 256_000)]
        for x, y in outside:
            wrong = coords.clone()
            wrong[0, 3] = torch.tensor((x, y))
            for kind in (torch.int64, torch.float64):
                got = re.escape(f"got {tuple(wrong[0, 3].to(kind).tolist())}")
                with pytest.raises(ValueError, match=r"expected coords \(x, y\) in \[0, 256000\) pixels.*" + got):
                    encoder(tiles, wrong.to(kind))
        with pytest.raises(ValueError, match=r"got \(.*\) and 4 more outside"):
            encoder(tiles, coords - 256_000)
        with pytest.raises(ValueError, match="expected finite coords, got inf or nan"):
            encoder(tiles, torch.where(coords == coords[0, 2, 1], torch.nan, coords.double()))
        with pytest.raises(TypeError, match="a slide's pixels need 18 bits"):
            encoder(tiles, coords.bfloat16())
        assert torch.equal(encoder(tiles, coords).pooled, encoder(tiles, coords.double()).pooled)

    def test_tiles_that_share_their_places_are_told(self) -> None:
        encoder, tiles = tiny(), torch.randn(1, 600, 12)
        indices = torch.cartesian_prod(torch.arange(20), torch.arange(30))[None]
        with pytest.warns(UserWarning, match="got 600 tiles on 1 places of 256 x 256 pixels.*neither column and row"):
            encoder(tiles, indices)
        encoder.tile_size = 512
        with pytest.warns(UserWarning, match="got 600 tiles on 150 places of 512 x 512 pixels"):
            encoder(tiles, indices * 256)
        # Slides of a batch have their own places, padding has none; TRIDENT overlaps tiles by 64 of 256 pixels.
        encoder.tile_size = 256
        mask = torch.ones(2, 600, dtype=torch.bool)
        mask[1, 1:] = False
        both = torch.stack((indices[0] * 192, torch.zeros(600, 2, dtype=torch.long)))
        assert encoder(tiles.expand(2, -1, -1), both, mask).pooled.isfinite().all()

    def test_the_distance_of_tiles_scales_coordinates_and_leaves_segments(self, tmp_path: Path) -> None:
        encoder, (tiles, coords) = tiny(), slide(50)
        want, segments = encoder(tiles, coords).pooled, encoder.config.segment_lengths
        assert encoder.tile_size == 256
        encoder.tile_size = 128  # as TRIDENT sets it, slide by slide
        assert torch.equal(encoder(tiles, coords // 2).pooled, want)
        assert not torch.equal(encoder(tiles, coords // 4).pooled, want)
        assert encoder.config.tile_size == 256 and encoder.config.segment_lengths == segments
        save_pretrained(encoder, tmp_path)
        assert torch.equal(load_pretrained(tmp_path)(tiles, coords // 2).pooled, want)
        state = {"source": encoder.state_dict(), "num_heads": 4}
        given = SlideEncoder.from_pretrained(**state, level0_tile_size=512)
        assert given.tile_size == 512 and given.config.segment_lengths == SlideEncoderConfig().segment_lengths
        assert given.config.tile_size == 256
        for wrong in (0, -1, 2.5, None, "512"):
            with pytest.raises((TypeError, ValueError), match="expected tile_size to be"):
                encoder.tile_size = wrong
            if wrong is not None:
                with pytest.raises((TypeError, ValueError), match="expected level0_tile_size to be"):
                    tiny(level0_tile_size=wrong)

    def test_settings_of_a_built_model_act_or_are_refused(self) -> None:
        encoder, (tiles, coords) = tiny(), slide(50)
        encoder.global_pool = True  # the official model's attribute
        twin = tiny(global_pool=True)
        twin.load_state_dict(encoder.state_dict())
        assert torch.equal(encoder(tiles, coords).pooled, twin(tiles, coords).pooled)
        for name, value in (("slide_ngrids", 10), ("padding", "zero_keys"), ("segment_lengths", [8])):
            with pytest.raises(AttributeError, match=f"expected {name} to be given before SlideEncoder is built"):
                setattr(encoder, name, value)


class TestOfficialOutputs:
    """The official model returns a list: of one embedding, or of those of all layers."""

    def test_first_and_last_of_the_outputs_are_the_slides_embedding(self) -> None:
        encoder, (tiles, coords) = tiny(), slide(50)
        out = encoder(tiles, coords)
        pooled, layers, per_tile = out
        assert out[0] is out[-1] is out.pooled is pooled
        assert layers is out.layers and per_tile is out.tiles
        made = torch.compile(lambda x: SlideOutput(x, x + 1, x + 2)[-1], backend="eager")
        assert torch.equal(made(pooled.detach()), pooled)

    def test_all_layers(self) -> None:
        encoder, (tiles, coords) = tiny(), slide(50)
        out, each = encoder(tiles, coords), encoder(tiles, coords, all_layer_embed=True)
        assert isinstance(each, list) and len(each) == encoder.config.depth + 1
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(each, out.layers, strict=True))


class TestDtypes:
    @pytest.mark.parametrize("padding", PADDINGS)
    def test_bfloat16(self, padding: Any) -> None:
        """Judged by what rounding the weights and inputs alone does in exact arithmetic."""
        encoder, (tiles, coords) = tiny(padding=padding), slide(120)
        want = encoder.double()(tiles.double(), coords)
        half = encoder.bfloat16()
        rounded = {name: x.double() for name, x in half.state_dict().items()}
        base = tiny(padding=padding, dtype=torch.float64)
        base.load_state_dict(rounded)
        noise = relative_norm(base(tiles.bfloat16().double(), coords).pooled, want.pooled)
        got = half(tiles, coords)
        assert got.pooled.dtype == got.tiles.dtype == got.layers.dtype == torch.bfloat16
        assert relative_norm(got.pooled, want.pooled) <= 8 * noise

    def test_autocast_keeps_the_sum_in_fp32(self) -> None:
        encoder, given = tiny(), slide(60)
        with torch.autocast("cpu", torch.bfloat16):
            x, _ = encoder.embed(*given)
            states = list(encoder.encoder.states(x, is_causal=False))
            out = encoder(*given)
        assert x.dtype == torch.float32 and all(h.dtype == torch.float32 for h in states)
        assert relative_norm(out.pooled, encoder(*given).pooled) < 0.05
        out.pooled.sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in encoder.parameters())

    def test_half_precision_embeddings_are_taken_in(self) -> None:
        encoder, (tiles, coords) = tiny(), slide(20)
        assert torch.equal(encoder(tiles.half(), coords).pooled, encoder(tiles.half().float(), coords).pooled)


class TestAttentionMap:
    @pytest.mark.parametrize("padding", PADDINGS)
    @pytest.mark.parametrize("n", [1, 37, 200])
    def test_probabilities_give_the_attention(self, padding: Any, n: int) -> None:
        encoder = tiny(padding=padding, dtype=torch.float64)
        tiles, coords = slide(n)
        layer, head = 1, 2
        caught: list[Tensor] = []
        attention = encoder.encoder.layers[layer].self_attn.attention
        handle = attention.register_forward_pre_hook(lambda _, given: caught.extend(given[:3]))
        out = encoder(tiles, coords)
        handle.remove()
        assert out.pooled.isfinite().all()
        q, k, v = caught
        config = encoder.config
        want = dilated_attention(
            q, k, v, segment_lengths=config.segment_lengths, dilation_rates=config.dilation_rates,
            offsets="blocked", padding=padding,
        )[0, :, head]  # fmt: skip
        asked = list(range(n))
        found = encoder.attention_map(tiles, coords, layer=layer, head=head, query=asked)
        first = encoder.attention_map(tiles, coords, layer=layer, head=head)
        everything = torch.cat((found.cls[:, None], found.tiles), 1)
        assert relative_norm(everything @ v[0, :, head], want[1:]) < 1e-12
        assert relative_norm(torch.cat((first.cls, first.tiles[0])) @ v[0, :, head], want[0]) < 1e-12
        sums = everything.sum(1) + found.nothing
        torch.testing.assert_close(sums, torch.ones_like(sums))
        assert bool((found.nothing > 0).any()) == (padding == "zero_keys" and n > 1)

    def test_the_mean_over_heads(self) -> None:
        encoder, given = tiny(), slide(30)
        each = [encoder.attention_map(*given, layer=0, head=h, query=torch.tensor([7])).tiles for h in range(4)]
        torch.testing.assert_close(encoder.attention_map(*given, layer=0, query=7).tiles, torch.stack(each).mean(0))

    def test_mistakes(self) -> None:
        encoder, (tiles, coords) = tiny(), slide(10)
        for options, message in (
            ({"layer": 2}, r"expected layer in \[0, 2\), got 2"),
            ({"layer": 0, "head": 4}, r"expected head in \[0, 4\), got 4"),
            ({"layer": 0, "query": [3, 10]}, r"query tiles in \[0, 10\), got \[10\]"),
            ({"layer": 0, "query": "all"}, "tile numbers or 'cls', got 'all'"),
        ):
            with pytest.raises(ValueError, match=message):
                encoder.attention_map(tiles, coords, **options)
        with pytest.raises(ValueError, match="expected one slide"):
            encoder.attention_map(tiles.expand(2, -1, -1), coords.expand(2, -1, -1), layer=0)
        with pytest.raises(TypeError, match="expected tiles to be a Tensor, got list"):
            encoder.attention_map(tiles.tolist(), coords, layer=0)
        with pytest.raises(TypeError, match="expected query to be an int, got float"):
            encoder.attention_map(tiles, coords, layer=0, query=torch.tensor([1.0]))
        with pytest.raises(ValueError, match="evaluation mode"):
            encoder.train().attention_map(tiles, coords, layer=0)
        with pytest.warns(FutureWarning, match="legacy_mode is on"), legacy_mode():
            legacy = tiny(offsets="modulo")
        with pytest.raises(ValueError, match="expected an encoder with head_groups=False"):
            legacy.attention_map(tiles, coords, layer=0)

    def test_heat_map(self, tmp_path: Path) -> None:
        encoder, (tiles, coords) = tiny(), slide(40)
        found = encoder.attention_map(tiles, coords, layer=0, query=3)
        figure = slide_figure(coords[0], found.tiles[0], label="attention", marks=torch.tensor([3]))
        (image,) = figure.axes[0].images
        grid = image.get_array()
        place = (coords[0] // 256) - (coords[0] // 256).min(0).values
        assert grid.shape == tuple((place.max(0).values + 1).tolist()[::-1])
        drawn = torch.tensor([float(grid[int(y), int(x)]) for x, y in place])
        torch.testing.assert_close(drawn, found.tiles[0])
        assert int((~grid.mask).sum()) == 40
        assert save(figure, tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
        for values, message in ((torch.rand(3), r"coords \(L, 2\)"), (torch.full((40,), torch.nan), "got 40 that are")):
            with pytest.raises(ValueError, match=message):
                slide_figure(coords[0], values)
        with pytest.raises(ValueError, match="within a grid"):
            slide_figure(torch.tensor([[0, 0], [10**9, 10**9]]), torch.rand(2))


class TestCheckpoints:
    def test_names_and_count_of_the_official_file(self) -> None:
        names = set(SlideEncoder(device="meta").state_dict())
        want = {"cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}
        for name in ("norm", "encoder.layer_norm"):
            want |= {f"{name}.weight", f"{name}.bias"}
        for i in range(12):
            for part in (
                *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")), "self_attn.inner_attn_ln", "ffn.fc1",
                "ffn.fc2", "ffn.ffn_layernorm", "self_attn_layer_norm", "final_layer_norm",
            ):  # fmt: skip
                want |= {f"encoder.layers.{i}.{part}.weight", f"encoder.layers.{i}.{part}.bias"}
        assert names == want and len(names) == 247

    @pytest.mark.parametrize("form", ["pth", "bare", "safetensors", "mapping", "folder"])
    def test_round_trips(self, form: str, tmp_path: Path) -> None:
        encoder, given = tiny(padding="zero_keys"), slide(33)
        state, source = encoder.state_dict(), tmp_path / "slide.pth"
        if form == "pth":
            torch.save({"model": state, "epoch": 3}, source)
        elif form == "bare":
            torch.save(state, source)
        elif form == "safetensors":
            source = tmp_path / "slide.safetensors"
            pytest.importorskip("safetensors.torch").save_file(state, source)
        elif form == "folder":
            source = tmp_path / "folder"
            save_pretrained(encoder, source)
            assert load_pretrained(source).config == encoder.config
        pattern = {} if form == "folder" else {k: TINY[k] for k in ("num_heads", "segment_lengths", "dilation_rates")}
        twin = SlideEncoder.from_pretrained({"model": state} if form == "mapping" else source, **pattern)
        assert twin.config == encoder.config and not twin.training
        assert torch.equal(twin(*given).pooled, encoder(*given).pooled)
        assert all(p.requires_grad for p in twin.parameters())
        half = SlideEncoder.from_pretrained(source if form != "mapping" else state, dtype=torch.bfloat16, **pattern)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}

    def test_defaults(self) -> None:
        state = tiny().state_dict()
        pretrained = SlideEncoder.from_pretrained(state, 250_000, num_heads=4)
        assert pretrained.config.padding == "zero_keys" and SlideEncoderConfig().padding == "none"
        assert pretrained.config.segment_lengths == (1024, 4870, 23170, 110217, 524288)
        assert SlideEncoder.from_pretrained(state, num_heads=4, padding="none").config.padding == "none"
        assert SlideEncoder.from_pretrained(state, tile_size=512, num_heads=4).config.tile_size == 512
        with pytest.raises(ValueError, match="from which they follow, got both"):
            SlideEncoder.from_pretrained(state, 250_000, segment_lengths=(4,), dilation_rates=(1,))
        with pytest.raises(
            ValueError, match="expected 5 dilation_rates, as many as the segment_lengths that follow from max_wsi"
        ):
            SlideEncoder.from_pretrained(state, 250_000, dilation_rates=(1, 2))
        with pytest.raises(TypeError, match="segment_lengths to be a sequence of ints, got int"):
            SlideEncoder.from_pretrained(state, segment_lengths=5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="multiple of num_heads, got 36 and 16"):
            SlideEncoder.from_pretrained(tiny(embed_dim=36, num_heads=4).state_dict())

    def test_every_wrong_key_is_named(self) -> None:
        state = tiny().state_dict()
        del state["norm.bias"], state["encoder.layers.0.ffn.fc1.bias"]
        state["encoder.layers.1.self_attn.rotary"] = torch.zeros(2)
        state["encoder.layer_norm.weight"] = torch.zeros(31)
        with pytest.raises(ValueError, match="expected the weights of a SlideEncoder, got") as raised:
            SlideEncoder.from_pretrained(state, num_heads=4)
        for part in (
            "missing norm.bias",
            "missing encoder.layers.0.ffn.fc1.bias",
            "unexpected encoder.layers.1.self_attn.rotary",
            "encoder.layer_norm.weight of shape (31,), expected (32,)",
        ):
            assert part in str(raised.value)
        with pytest.raises(ValueError, match="missing cls_token"):
            SlideEncoder.from_pretrained({"weight": torch.zeros(1)})

    def test_a_stored_position_table(self) -> None:
        encoder = tiny(slide_ngrids=20)
        x, y = torch.meshgrid(torch.arange(20), torch.arange(20), indexing="ij")
        rows = position_rows(torch.stack((x, y), -1).flatten(0, 1) * 256, 32, 256, 20)
        table = torch.cat((torch.zeros(1, 32), rows))[None]
        state = encoder.state_dict() | {"pos_embed": table}
        pattern = {k: TINY[k] for k in ("num_heads", "segment_lengths", "dilation_rates")}
        twin = SlideEncoder.from_pretrained(state, **pattern)
        assert twin.config.slide_ngrids == 20 and "pos_embed" not in twin.state_dict()
        SlideEncoder.from_pretrained(state | {"pos_embed": table.half()}, **pattern)
        for wrong in (table + 1e-3, table[:, :-1], table.flip(1), table[..., :16]):
            with pytest.raises(ValueError, match="pos_embed"):
                SlideEncoder.from_pretrained(state | {"pos_embed": wrong}, **pattern)
        with pytest.raises(ValueError, match="expected slide_ngrids=20"):
            SlideEncoder.from_pretrained(state, slide_ngrids=1000, **pattern)

    def test_files_that_are_none(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="found none"):
            SlideEncoder.from_pretrained(tmp_path / "absent.pth")
        torch.save({"model": {"norm.weight": 3}}, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match=r"tensors by name, got beside them: norm\.weight \(int\)"):
            SlideEncoder.from_pretrained(tmp_path / "odd.pth")
        torch.save([1, 2], tmp_path / "list.pth")
        with pytest.raises(ValueError, match="tensors by name, got list"):
            SlideEncoder.from_pretrained(tmp_path / "list.pth")

    @pytest.mark.parametrize("content", ["nothing", "word", "pointer", "page", "half"])
    @pytest.mark.parametrize("form", ["pth", "safetensors"])
    def test_files_that_cannot_be_read(self, form: str, content: str, tmp_path: Path) -> None:
        path = tmp_path / f"slide.{form}"
        if content == "half":
            save = torch.save if form == "pth" else pytest.importorskip("safetensors.torch").save_file
            save({"cls_token": torch.zeros(1, 1, 32)}, path)
        path.write_bytes({
            "nothing": b"", "word": b"hello", "page": b"<!DOCTYPE html><html><body>Not found</body></html>",
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 345323520\n",
            "half": path.read_bytes()[:-100] if content == "half" else b"",
        }[content])  # fmt: skip
        with pytest.raises(
            ValueError, match=rf"expected {path} to hold tensors as \S+ writes them, got \w+"
        ) as refused:
            SlideEncoder.from_pretrained(path)
        assert "weights_only" not in str(refused.value)  # torch's advice to run what the file holds

    def test_a_mapping_stays_the_callers(self) -> None:
        state = tiny().state_dict()
        twins = [SlideEncoder.from_pretrained(state, num_heads=4) for _ in range(2)]
        places = [x.data_ptr() for model in twins for x in model.parameters()] + [x.data_ptr() for x in state.values()]
        assert len(set(places)) == 3 * len(state)

    @pytest.fixture
    def full_size(self, tmp_path: Path) -> dict[str, tuple[int, float]]:
        """KiB and seconds, the import left out of the time, that building and loading take."""
        if not Path("/proc/self/status").exists():
            pytest.skip("reads Linux's account of memory")
        script = textwrap.dedent(
            """
            import sys, time, torch
            from pathlib import Path
            from dilated_attention_pytorch.models import SlideEncoder
            start = time.process_time()
            if sys.argv[1] == "build":
                encoder = SlideEncoder()
                torch.save({"model": encoder.state_dict()}, sys.argv[2])
            else:
                encoder = SlideEncoder.from_pretrained(sys.argv[2])
            seconds = time.process_time() - start
            assert sum(p.numel() for p in encoder.parameters()) == 86_330_880
            status = Path("/proc/self/status").read_text().splitlines()
            print(next(line.split()[1] for line in status if line.startswith("VmHWM")), seconds)
            """
        )
        found = {}
        for step in ("build", "load"):
            command = [sys.executable, "-c", script, step, str(tmp_path / "slide.pth")]
            printed = subprocess.run(
                command, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"}
            )
            kib, seconds = printed.stdout.split()
            found[step] = int(kib), float(seconds)
        return found

    def test_the_full_size_takes_under_one_and_a_half_gib(self, full_size: dict[str, tuple[int, float]]) -> None:
        """The official code needs 16 GB."""
        assert max(kib for kib, _ in full_size.values()) < 1.5 * 2**20, full_size

    @pytest.mark.timing
    def test_the_full_size_takes_under_five_seconds(self, full_size: dict[str, tuple[int, float]]) -> None:
        """The official code needs a minute."""
        assert max(seconds for _, seconds in full_size.values()) < 5, full_size


def test_numpy_is_not_needed(tmp_path: Path) -> None:
    """So no version of it is the wrong one."""
    torch.save(tiny().state_dict(), tmp_path / "slide.pth")
    script = textwrap.dedent(
        """
        import sys
        sys.modules["numpy"] = None
        import torch
        from dilated_attention_pytorch import SlideEncoder
        encoder = SlideEncoder.from_pretrained(sys.argv[1], num_heads=4)
        coords = 256 * torch.cartesian_prod(torch.arange(6), torch.arange(5))[None]
        mask = torch.arange(30)[None] < torch.tensor([[30], [12]])
        out = encoder(torch.randn(2, 30, 12), coords.expand(2, -1, -1), mask)
        out.pooled.sum().backward()
        encoder.attention_map(torch.randn(1, 30, 12), coords, layer=1, query=[3])
        """
    )
    # torch itself warns of a missing numpy; that is all it does.
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "slide.pth")]
    subprocess.run(command, check=True, capture_output=True, text=True)


def test_bad_input() -> None:
    encoder, (tiles, coords) = tiny(), slide(10)
    for given, error, message in (
        ((tiles[0], coords[0]), ValueError, r"tiles of shape \(B, L, 12\), got \(10, 12\)"),
        ((tiles[..., :5], coords), ValueError, r"tiles of shape \(B, L, 12\), got \(1, 10, 5\)"),
        ((tiles, coords[:, :4]), ValueError, r"coords of shape \(1, 10, 2\), got \(1, 4, 2\)"),
        ((tiles.long(), coords), TypeError, "tiles of a floating dtype, got torch.int64"),
        ((tiles, coords, torch.ones(1, 10)), TypeError, "mask of dtype torch.bool"),
        ((tiles, coords, torch.ones(1, 9, dtype=torch.bool)), ValueError, r"mask of shape \(1, 10\), got \(1, 9\)"),
        ((tiles, [[0, 0]]), TypeError, "coords to be a Tensor, got list"),
        ((tiles, coords, [[True] * 10]), TypeError, "mask to be a Tensor, got list"),
    ):
        with pytest.raises(error, match=message):
            encoder(*given)
    for options, error, message in (
        ({"embed_dim": 30, "num_heads": 3}, ValueError, "multiple of 4"),
        ({"num_heads": 5}, ValueError, "multiple of num_heads, got 32 and 5"),
        ({"padding": "zeros"}, ValueError, "expected padding to be one of"),
        ({"drop_path": 1.0}, ValueError, r"drop_path in \[0, 1\)"),
        ({"global_pool": 1}, TypeError, "global_pool to be a bool"),
        ({"norm_eps": 0}, ValueError, "norm_eps above 0"),
        ({"depth": 0}, ValueError, "depth to be at least 1"),
    ):
        with pytest.raises(error, match=message):
            SlideEncoder(**TINY | options)
    for wrong in ("yes", 3, None):
        with pytest.raises(TypeError, match="expected gradient_checkpointing to be a bool, got"):
            SlideEncoder.from_pretrained(encoder.state_dict(), num_heads=4, gradient_checkpointing=wrong)
    with pytest.raises(ValueError, match="unknown keys"):
        SlideEncoderConfig.from_dict({"width": 3})
    with pytest.raises(TypeError, match="expected config to be a SlideEncoderConfig"):
        SlideEncoder({"depth": 3})  # type: ignore[arg-type]


def test_examples_of_the_models_run() -> None:
    import doctest

    import dilated_attention_pytorch.models as models

    names = {"torch": torch, **{name: getattr(models, name) for name in models.__all__}}
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner()
    tried = 0
    for name in ("SlideEncoder", "SlideEncoderConfig", "slide_segment_lengths", "LongViT", "convert"):
        for example in finder.find(getattr(models, name), name, globs=dict(names)):
            output: list[str] = []
            runner.run(example, out=output.append)
            assert runner.failures == 0, "".join(output)
            tried += len(example.examples)
    assert tried >= 5
