"""Slide maps: the rows of attention matrices, rolled out or not, and what is left of them without the pattern."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import slide_files
import torch
from planted import looking, planted
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

from dilated_attention_pytorch.core.probabilities import attention_probabilities
from dilated_attention_pytorch.models import SlideEncoder
from dilated_attention_pytorch.models.slide.attention import queries_and_keys
from dilated_attention_pytorch.models.slide.maps import slide_map
from dilated_attention_pytorch.testing.memory import peak_bytes

TILES = 130
# Sums of up to 300 probabilities in fp32, in another order: 300 rounding errors of 6e-8 relative to each other.
CLOSE: dict[str, Any] = {"rtol": 2e-5, "atol": 1e-9}


def made(padding: str) -> tuple[SlideEncoder, Tensor, Tensor]:
    torch.manual_seed(1)
    encoder = SlideEncoder(**slide_files.TINY | {"padding": padding, "depth": 3}).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    coords = 256 * torch.cartesian_prod(torch.arange(13), torch.arange(10))
    return encoder, torch.randn(1, TILES, slide_files.WIDTH), coords[None]


@torch.no_grad()
def matrices(encoder: SlideEncoder, tiles: Tensor, coords: Tensor, *, uniform: bool) -> Tensor:
    """Every layer's and head's probabilities, written out query by query: `(layers, H, N, N)`."""
    config, found = encoder.config, []
    for i, x in enumerate(encoder.layer_inputs(tiles, coords, config.depth - 1)):
        q, k = queries_and_keys(encoder.encoder.layers[i], x, config)  # type: ignore[arg-type]
        scale = 0.0 if uniform else q.shape[-1] ** -0.5
        options: dict[str, Any] = {"queries": range(len(q)), "scale": scale, "padding": config.padding}
        pattern = config.layers.pattern
        heads = range(config.num_heads)
        found.append(
            torch.stack([attention_probabilities(q[:, h], k[:, h], pattern, head=h, **options)[0] for h in heads])
        )
    return torch.stack(found)


@pytest.mark.parametrize("padding", ["none", "zero_keys"])
@pytest.mark.parametrize("query", ["cls", 0, 77])
def test_a_map_is_a_row_of_the_matrices(padding: str, query: Any) -> None:
    encoder, tiles, coords = made(padding)
    learned, uniform = (matrices(encoder, tiles, coords, uniform=which) for which in (False, True))
    row = 0 if query == "cls" else query + 1
    for layer, heads in ((0, "mean"), (2, "mean"), (1, 3), (1, "max")):
        found = slide_map(encoder, tiles, coords, query=query, layer=layer, heads=heads)  # type: ignore[arg-type]
        p, u = (x[layer][:, row, 1:] for x in (learned, uniform))  # (H, L)
        if heads == "mean":
            p, u = p.mean(0, keepdim=True), u.mean(0, keepdim=True)
        elif heads != "max":
            p, u = p[[heads]], u[[heads]]
        torch.testing.assert_close(found.probability, p.amax(0), **CLOSE)
        seen = (u > 0).any(0)
        assert 0 < int(seen.sum()) < TILES and torch.equal(found.ratio.isnan(), ~seen)
        ratio = (p / u).nan_to_num(nan=0.0).amax(0)
        torch.testing.assert_close(found.ratio[seen], ratio[seen], **CLOSE)


@pytest.mark.parametrize("padding", ["none", "zero_keys"])
@pytest.mark.parametrize("heads", ["mean", 2])
def test_a_rollout_is_a_row_of_the_product(padding: str, heads: Any) -> None:
    encoder, tiles, coords = made(padding)
    for query, layer in (("cls", None), (40, 1)):
        found = slide_map(encoder, tiles, coords, query=query, layer=layer, heads=heads, rollout=True)  # type: ignore[arg-type]
        rows = []
        for uniform in (False, True):
            product = torch.eye(TILES + 1)
            for of_heads in matrices(encoder, tiles, coords, uniform=uniform)[: None if layer is None else layer + 1]:
                one = of_heads.mean(0) if heads == "mean" else of_heads[heads]
                product = (one + torch.eye(TILES + 1)) / 2 @ product
            rows.append(product[0 if query == "cls" else int(query) + 1, 1:])
        torch.testing.assert_close(found.probability, rows[0], **CLOSE)
        seen = rows[1] > 0
        assert torch.equal(found.ratio.isnan(), ~seen)
        torch.testing.assert_close(found.ratio[seen], (rows[0] / rows[1])[seen], **CLOSE)


@pytest.mark.parametrize("rollout", [False, True])
def test_attention_without_preference_is_one_everywhere(rollout: bool) -> None:
    encoder, slide = looking(0.0), planted(7)
    found = slide_map(encoder, slide.tiles, slide.coords, rollout=rollout)
    seen = ~found.ratio.isnan()
    assert bool(seen.all()) is rollout
    torch.testing.assert_close(found.ratio[seen], torch.ones(int(seen.sum())), rtol=1e-5, atol=0)
    assert found.probability.max() > 5 * found.probability[found.probability > 0].min()  # while this draws the pattern


def test_the_ratio_finds_the_region_that_decides_and_the_probability_does_not() -> None:
    encoder = looking(2.5)
    # The region decides: a linear probe on embeddings that look there is right more often than on those that do not.
    slides = [planted(1000 + i) for i in range(200)]
    labels = [slide.label for slide in slides]
    right = []
    for one in (encoder, looking(0.0)):
        with torch.inference_mode():
            x = torch.cat([one(slide.tiles, slide.coords).pooled for slide in slides]).numpy()
        probe = LogisticRegression(C=0.1, max_iter=2000).fit(x[:100], labels[:100])
        right.append(probe.score(x[100:], labels[100:]))
    assert right[0] >= 0.8 and right[0] >= right[1] + 0.08, right
    # Where that is, AUROC of each map against the region: ratio where the query sees, probability on all tiles.
    scores: dict[str, list[tuple[float, float]]] = {"one layer": [], "rollout": []}
    for slide in slides[:20]:
        for name, found in scores.items():
            p, ratio = slide_map(encoder, slide.tiles, slide.coords, rollout=name == "rollout")
            seen = ~ratio.isnan()
            assert name == "one layer" or bool(seen.all())
            found.append((roc_auc_score(slide.region[seen], ratio[seen]), roc_auc_score(slide.region, p)))
    for name, most in (("one layer", 0.55), ("rollout", 0.75)):
        ratios, raw = torch.tensor(scores[name]).unbind(1)
        assert ratios.mean() >= 0.99 and ratios.min() >= 0.95, (name, scores[name])
        assert raw.mean() <= most, (name, scores[name])


def test_a_rollout_over_many_tiles_forms_no_matrix() -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"in_chans": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "ffn_dim": 8}
    encoder = SlideEncoder(**shape, segment_lengths=(128, 20_000), dilation_rates=(1, 128)).eval()
    coords = 256 * torch.cartesian_prod(torch.arange(200), torch.arange(100))[None]
    tiles = torch.randn(1, 20_000, 4)
    slide_map(encoder, tiles[:, :200], coords[:, :200], rollout=True)  # what a first call loads
    peak = peak_bytes(lambda: slide_map(encoder, tiles, coords, rollout=True))
    assert peak < 4 * 20_000**2 / 8, f"{peak:,}"  # an eighth of one matrix; a query's row is 80 kB


def test_bad_input_is_named() -> None:
    encoder, tiles, coords = made("none")
    for options, message in (
        ({"heads": "median"}, "expected heads to be 'mean', 'max' or a head's number, got 'median'"),
        ({"heads": 4}, r"expected heads in \[0, 4\), got 4"),
        ({"heads": "max", "rollout": True}, "expected heads to be 'mean' or a head's number with rollout=True"),
        ({"layer": 3}, r"expected layer in \[0, 3\), got 3"),
        ({"query": 130}, r"expected query tiles in \[0, 130\)"),
        ({"query": [1, 2]}, "expected one query, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            slide_map(encoder, tiles, coords, **options)  # type: ignore[arg-type]
    for query in (torch.tensor(8, device="meta"), torch.tensor([8]).to_sparse()):
        with pytest.raises(TypeError, match="expected query "):
            slide_map(encoder, tiles, coords, query=query)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: a prototype
        nested = torch.nested.nested_tensor(list(tiles))
    with pytest.raises(TypeError, match="expected tiles to be a dense tensor, got a nested one"):
        slide_map(encoder, nested, coords)
