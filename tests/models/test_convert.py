"""Weights of other implementations: names, refusals, and numbers against plain re-statements of their forwards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import official_rules
import pytest
import torch
import torch.nn.functional as F
from command import call, fails
from torch import Tensor

from dilated_attention_pytorch.models import LongNet, LongNetEncoder, LongNetLM, SlideEncoder, convert, load_pretrained
from dilated_attention_pytorch.models.convert import sniff
from dilated_attention_pytorch.testing import relative_norm

WIDTH, INNER, HEADS, DEPTH, VOCAB = 16, 24, 4, 2, 11
PATTERN: dict[str, Any] = {"num_heads": HEADS, "segment_lengths": [8, 32], "dilation_rates": [1, 2]}
BRANCHES = [(8, 1), (32, 2)]
State = dict[str, Tensor]


def drawn(shapes: dict[str, tuple[int, ...]]) -> State:
    return {name: 0.3 * torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def torchscale(*, tokens: bool = False, xpos: bool = False) -> State:
    """The names and shapes of torchscale's Encoder and Decoder with sub-LN."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(DEPTH):
        layer = f"layers.{i}"
        for p in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{p}", WIDTH, WIDTH)
        shapes |= norm(f"{layer}.self_attn.inner_attn_ln", WIDTH) | norm(f"{layer}.self_attn_layer_norm", WIDTH)
        shapes |= linear(f"{layer}.ffn.fc1", INNER, WIDTH) | linear(f"{layer}.ffn.fc2", WIDTH, INNER)
        shapes |= norm(f"{layer}.ffn.ffn_layernorm", INNER) | norm(f"{layer}.final_layer_norm", WIDTH)
    shapes |= norm("layer_norm", WIDTH)
    if tokens:
        shapes |= {"embed_tokens.weight": (VOCAB, WIDTH), "output_projection.weight": (VOCAB, WIDTH)}
    state = drawn(shapes)
    if xpos:
        width = WIDTH // HEADS
        scale = (torch.arange(0, width, 2) + 0.4 * width) / (1.4 * width)
        state |= {f"layers.{i}.self_attn.xpos.scale": scale for i in range(DEPTH)}
    return state


def xpos(x: Tensor, base: float, *, down: bool) -> Tensor:
    """The official rotation of `(N, H, D)`: neighbouring channels are pairs, and the origin is the middle."""
    n, _, width = x.shape
    scale = (torch.arange(0, width, 2, dtype=x.dtype) + 0.4 * width) / (1.4 * width)
    scale = scale ** ((torch.arange(n, dtype=x.dtype) - n // 2) / base)[:, None]
    angle = torch.arange(n, dtype=x.dtype)[:, None] * 10000.0 ** -(torch.arange(width // 2) / (width // 2)).to(x.dtype)
    scale = 1 / scale if down else scale
    sin, cos = ((f * scale).repeat_interleave(2, -1)[:, None] for f in (angle.sin(), angle.cos()))
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + turned * sin


def torchscale_forward(state: State, x: Tensor, *, causal: bool, xpos_base: float | None = None) -> Tensor:
    """torchscale's pre-LN layers with sub-LN over `(N, D)`, and the last LayerNorm."""

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def project(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    for i in range(DEPTH):
        layer = f"layers.{i}"
        h = layer_norm(x, f"{layer}.self_attn_layer_norm")
        q, k, v = (project(h, f"{layer}.self_attn.{p}_proj").unflatten(-1, (HEADS, -1)) for p in "qkv")
        if xpos_base is not None:
            q, k = xpos(q, xpos_base, down=False), xpos(k, xpos_base, down=True)
        h = official_rules.attention(q, k, v, BRANCHES, causal=causal).flatten(1)
        x = x + project(layer_norm(h, f"{layer}.self_attn.inner_attn_ln"), f"{layer}.self_attn.out_proj")
        h = F.gelu(project(layer_norm(x, f"{layer}.final_layer_norm"), f"{layer}.ffn.fc1"))
        x = x + project(layer_norm(h, f"{layer}.ffn.ffn_layernorm"), f"{layer}.ffn.fc2")
    return layer_norm(x, "layer_norm")


@pytest.mark.parametrize("prefix", ["", "encoder."])
@pytest.mark.parametrize("n", [5, 8, 64, 77])
def test_torchscale_encoder(n: int, prefix: str) -> None:
    state = torchscale()
    found = convert({prefix + name: x for name, x in state.items()}, **PATTERN)
    assert found.source == "torchscale-encoder" and isinstance(found.model, LongNetEncoder) and not found.notes
    assert not found.model.training and found.model.config.padding == "zero_keys"
    assert not {x.data_ptr() for x in state.values()} & {x.data_ptr() for x in found.model.parameters()}
    x = torch.randn(n, WIDTH, dtype=torch.float64)
    assert relative_norm(found.model(x[None])[0], torchscale_forward(state, x, causal=False)) < 1e-13


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("xpos_base", [None, 64.0])
def test_torchscale_decoder(xpos_base: float | None, scaled: bool, tied: bool) -> None:
    state = torchscale(tokens=True, xpos=xpos_base is not None)
    if tied:
        state["output_projection.weight"] = state["embed_tokens.weight"]
    options = {} if xpos_base is None else {"xpos_scale_base": xpos_base}
    found = convert(state, "torchscale-decoder", scale_embedding=scaled, **PATTERN, **options)
    model = found.model
    assert isinstance(model, LongNetLM) and model.config.tie_weights is (tied and scaled)
    for n in (1, 8, 45, 64):  # the last segment's zero keys come later than every query
        tokens = torch.randint(VOCAB, (n,))
        x = state["embed_tokens.weight"][tokens] * (math.sqrt(WIDTH) if scaled else 1.0)
        hidden = torchscale_forward(state, x, causal=True, xpos_base=xpos_base)
        assert relative_norm(model(tokens[None])[0], hidden @ state["output_projection.weight"].t()) < 1e-12


def fkodom(*, language_model: bool = False) -> State:
    """The names and shapes of fkodom's LongNet and LongNetLM."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(DEPTH):
        for stack in ("encoder", "decoder"):
            layer, cross = f"{stack}.layers.{i}", stack == "decoder"
            for name in ("self_attn", *(["multihead_attn"] if cross else [])):
                for p in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    shapes |= linear(f"{layer}.{name}.{p}", WIDTH, WIDTH)
            shapes |= norm(f"{layer}.{'multihead_attn' if cross else 'self_attn'}.norm", WIDTH)
            shapes |= linear(f"{layer}.linear1", INNER, WIDTH) | linear(f"{layer}.linear2", WIDTH, INNER)
            for name in ("norm1", "norm2", *(["norm3"] if cross else [])):
                shapes |= norm(f"{layer}.{name}", WIDTH)
            shapes |= norm(f"{layer}.{'norm4' if cross else 'norm3'}", INNER)
    if language_model:
        shapes = {f"long_net.{name}": shape for name, shape in shapes.items()} | norm("norm", WIDTH)
        shapes |= linear("out", VOCAB, WIDTH) | {
            "token_embedding.weight": (VOCAB, WIDTH),
            "pos_embedding.scale": (WIDTH // 2,),
        }
    return drawn(shapes)


def test_fkodom_is_refused_and_then_taken_as_a_start() -> None:
    state = fkodom()
    with pytest.raises(ValueError, match="expected as_initialisation=True with weights of fkodom, got False") as raised:
        convert(state, **PATTERN)
    assert "heads are shared out among the branches" in str(raised.value)
    found = convert(state, as_initialisation=True, **PATTERN)
    model = found.model
    assert found.source == "fkodom" and isinstance(model, LongNet)
    assert any("heads are shared out" in note for note in found.notes)
    # Every weight sits in its place: with attention of one value everywhere, both compute the same feed-forward step.
    layer = model.decoder.layers[1]
    for mine, theirs in (
        (layer.encoder_attn.k_proj.weight, "multihead_attn.k_proj.weight"),
        (layer.encoder_attn.inner_attn_ln.bias, "multihead_attn.norm.bias"),
        (layer.encoder_attn_layer_norm.weight, "norm2.weight"),
        (layer.final_layer_norm.weight, "norm3.weight"),
        (layer.ffn.ffn_layernorm.weight, "norm4.weight"),
        (layer.self_attn_layer_norm.bias, "norm1.bias"),
    ):
        assert torch.equal(mine, state[f"decoder.layers.1.{theirs}"]), theirs
    x = torch.randn(1, 20, WIDTH, dtype=torch.float64)
    name = "encoder.layers.0"
    h = F.layer_norm(x, (WIDTH,), state[f"{name}.norm2.weight"], state[f"{name}.norm2.bias"])
    h = F.linear(h, state[f"{name}.linear1.weight"], state[f"{name}.linear1.bias"]).relu()
    h = F.layer_norm(h, (INNER,), state[f"{name}.norm3.weight"], state[f"{name}.norm3.bias"])
    want = F.linear(h, state[f"{name}.linear2.weight"], state[f"{name}.linear2.bias"])
    first = model.encoder.layers[0]
    assert relative_norm(first.ffn(first.final_layer_norm(x)), want) < 1e-13
    assert torch.equal(model.decoder.layer_norm.weight, torch.ones(WIDTH))
    assert model(x).isfinite().all()


def test_fkodom_language_model() -> None:
    state = fkodom(language_model=True)
    found = convert(state, as_initialisation=True, **PATTERN)
    assert found.source == "fkodom-lm"
    assert torch.equal(found.model.decoder.layer_norm.weight, state["norm.weight"])
    for name in ("token_embedding.weight", "pos_embedding.scale", "out.weight", "out.bias"):
        assert any(note.endswith(name) for note in found.notes), name


def test_every_wrong_name_is_told() -> None:
    state = torchscale()
    del state["layers.1.ffn.fc2.bias"]
    with pytest.raises(ValueError, match=r"got: missing encoder\.layers\.1\.ffn\.fc2\.bias$"):
        convert(state, **PATTERN)
    state = torchscale() | {"embed_positions.weight": torch.zeros(3, WIDTH), "odd.name": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"unexpected embed_positions\.weight \(added positions, .*\); odd\.name$"):
        convert(state, **PATTERN)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.xpos\.scale \(xPos without causality"):
        convert(torchscale(xpos=True), **PATTERN)
    state = torchscale(tokens=True)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight \(an encoder's tokens"):
        convert(state, "torchscale-encoder", **PATTERN)
    del state["output_projection.weight"]
    with pytest.raises(ValueError, match=r"missing output_projection\.weight"):
        convert(state, "torchscale-decoder", **PATTERN)
    with pytest.raises(ValueError, match=r"multiples of their rates, got \[\(9, 2\)\]"):
        convert(torchscale(tokens=True), "torchscale-decoder", **PATTERN | {"segment_lengths": [8, 9]})


def test_sniffing() -> None:
    assert sniff({"cls_token": torch.zeros(1), "patch_embed.proj.weight": torch.zeros(1)}) == "gigapath"
    assert sniff({f"decoder.{name}": x for name, x in torchscale(tokens=True).items()}) == "torchscale-decoder"
    with pytest.raises(ValueError, match="do not tell which"):
        sniff(torchscale(tokens=True))
    with pytest.raises(ValueError, match="names that none of them has"):
        sniff({"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="expected source to be one of"):
        convert(torchscale(), "somebody", **PATTERN)


class TestCommandLine:
    def test_gigapath(self, tmp_path: Path) -> None:
        encoder = SlideEncoder(in_chans=12, embed_dim=32, depth=2, num_heads=4, ffn_dim=24).eval()
        torch.save({"model": encoder.state_dict()}, tmp_path / "slide.pth")
        printed = call("convert", tmp_path / "slide.pth", tmp_path / "out", "--heads", 4, "--max-wsi-size", 250_000)
        assert "gigapath to SlideEncoder" in printed
        for twin in (load_pretrained(tmp_path / "out"), SlideEncoder.from_pretrained(tmp_path / "out")):
            assert isinstance(twin, SlideEncoder) and twin.config.padding == "zero_keys"
            assert twin.config.segment_lengths[1] == 4870
            assert all(torch.equal(x, twin.state_dict()[name]) for name, x in encoder.state_dict().items())

    def test_torchscale(self, tmp_path: Path) -> None:
        state = torchscale(tokens=True)
        torch.save(state, tmp_path / "lm.pt")
        pattern = ["--heads", 4, "-w", "8,32", "-r", "1,2"]
        call("convert", tmp_path / "lm.pt", tmp_path / "out", "--from", "torchscale-decoder", *pattern)
        tokens = torch.randint(VOCAB, (1, 40))
        want = convert(state, "torchscale-decoder", **PATTERN).model(tokens)
        assert torch.equal(load_pretrained(tmp_path / "out")(tokens), want)

    def test_fkodom_says_what_is_not_kept(self, tmp_path: Path) -> None:
        from typer.testing import CliRunner

        from dilated_attention_pytorch.cli.app import app

        torch.save(fkodom(), tmp_path / "net.pt")
        arguments = ["convert", tmp_path / "net.pt", tmp_path / "out", "--as-initialisation"]
        arguments += ["--heads", 4, "-w", "8,32", "-r", "1,2"]
        result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == 0 and "note: not the numbers of fkodom, a start for training" in result.stderr

    def test_mistakes(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch.save(torchscale(), tmp_path / "encoder.pt")
        common = ("convert", tmp_path / "encoder.pt", tmp_path / "out")
        assert "--heads with weights of torchscale-encoder" in fails(capsys, monkeypatch, *common)
        assert "--from to be one of ['gigapath'" in fails(capsys, monkeypatch, *common, "--from", "bogus")
        everything = (*common, "--heads", 4, "-w", "8", "-r", "1")
        refused = fails(capsys, monkeypatch, *everything, "--scale-embedding")
        assert "expected no --scale-embedding with weights of torchscale-encoder" in refused
        torch.save(fkodom(), tmp_path / "encoder.pt")
        assert "expected --as-initialisation with weights" in fails(capsys, monkeypatch, *everything)
        (tmp_path / "encoder.pt").write_bytes(b"no weights")
        assert "to hold tensors as torch.save writes them" in fails(capsys, monkeypatch, *everything)
        assert "found none" in fails(capsys, monkeypatch, "convert", tmp_path / "absent.pt", tmp_path / "out")
        assert not (tmp_path / "out").exists()
