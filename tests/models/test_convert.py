"""Weights of other implementations: names, refusals, and numbers against plain re-statements of their forwards."""

from __future__ import annotations

import argparse
import json
import math
import re
import types
from pathlib import Path
from typing import Any

import official_rules
import pytest
import torch
import torch.nn.functional as F
from command import call, fails
from torch import Tensor
from typer.testing import CliRunner

from dilated_attention_pytorch.cli.app import app
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


def torchscale_forward(
    state: State,
    x: Tensor,
    *,
    causal: bool,
    xpos_base: float | None = None,
    activation: Any = F.gelu,
    eps: float = 1e-5,
) -> Tensor:
    """torchscale's pre-LN layers with sub-LN over `(N, D)`, and the last LayerNorm where there is one."""

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

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
        h = activation(project(layer_norm(x, f"{layer}.final_layer_norm"), f"{layer}.ffn.fc1"))
        x = x + project(layer_norm(h, f"{layer}.ffn.ffn_layernorm"), f"{layer}.ffn.fc2")
    return layer_norm(x, "layer_norm") if "layer_norm.weight" in state else x


@pytest.mark.parametrize("prefix", ["", "encoder."])
@pytest.mark.parametrize("n", [5, 8, 64, 77])
def test_torchscale_encoder(n: int, prefix: str) -> None:
    state = torchscale()
    found = convert({prefix + name: x for name, x in state.items()}, **PATTERN)
    assert found.source == "torchscale-encoder" and isinstance(found.model, LongNetEncoder)
    # A relu network of another epsilon has the same weights.
    assumed = "assumed, since weights do not tell: activation='gelu', layer_norm_eps=1e-05, scale_embedding=False"
    assert found.notes == (assumed,)
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


SETTINGS = {
    "activation_fn": "relu",
    "layernorm_eps": 1e-3,
    "segment_length": "[8, 32]",
    "dilated_ratio": [1, 2],
    "no_scale_embedding": False,
    "xpos_scale_base": 64,
    "decoder_attention_heads": HEADS,
    "encoder_attention_heads": HEADS,
    "dropout": 0.1,
}


@pytest.mark.parametrize("how", ["config", "namespace", "in the file", "options", "command line", "json"])
def test_what_weights_do_not_tell(how: str, tmp_path: Path) -> None:
    """Each way of saying it gives the numbers of torchscale's forward, and nothing has to be assumed."""
    state = torchscale(tokens=True, xpos=True)
    options: dict[str, Any] = {
        "activation": "relu", "layer_norm_eps": 1e-3, "scale_embedding": True, "xpos_scale_base": 64.0, **PATTERN
    }  # fmt: skip
    source = "torchscale-decoder"
    if how in ("command line", "json"):
        torch.save(state, tmp_path / "lm.pt")
        given: list[Any] = ["--heads", 4, "-w", "8,32", "-r", "1,2", "--activation", "relu", "--layer-norm-eps", 1e-3]
        given += ["--scale-embedding", "--xpos-scale-base", 64]
        if how == "json":
            (tmp_path / "args.json").write_text(json.dumps(SETTINGS))
            given = ["--args", tmp_path / "args.json"]
        call("convert", tmp_path / "lm.pt", tmp_path / "out", "--from", source, *given)
        model: Any = load_pretrained(tmp_path / "out")
    else:
        if how == "in the file":
            torch.save({"model": state, "args": argparse.Namespace(**SETTINGS)}, tmp_path / "lm.pt")
            found = convert(tmp_path / "lm.pt", source)
        elif how == "options":
            found = convert(state, source, **options)
        else:
            kind: Any = argparse.Namespace if how == "namespace" else types.SimpleNamespace
            found = convert(state, source, args=kind(**SETTINGS))
        assert not found.notes
        model = found.model
    tokens = torch.randint(VOCAB, (1, 45))
    x = state["embed_tokens.weight"][tokens[0]] * math.sqrt(WIDTH)
    hidden = torchscale_forward(state, x, causal=True, xpos_base=64.0, activation=F.relu, eps=1e-3)
    assert relative_norm(model(tokens)[0], hidden @ state["output_projection.weight"].t()) < 1e-12
    # Options come before the settings.
    twin = convert(state, source, args=SETTINGS, layer_norm_eps=1e-5).model
    assert twin.config.layer_norm_eps == 1e-5 and twin.config.activation == "relu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"deepnorm": True}, "this is a post-LN/deepnorm checkpoint"),
        ({"deepnorm": True, "subln": True}, "this is a post-LN/deepnorm checkpoint"),
        ({"subln": False, "decoder_normalize_before": False}, "this is a post-LN/deepnorm checkpoint"),
        ({"subln": False}, "this is a pre-LN checkpoint without sub-LN"),
        ({"activation_fn": "swish"}, "expected activation_fn to be 'relu' or 'gelu', got 'swish'"),
        ({"moe_freq": 2}, "expected moe_freq to be off, got 2: a mixture of experts"),
        ({"multiway": True}, "multiway layers"),
        ({"rel_pos_buckets": 32}, "a bias of relative positions"),
        ({"layernorm_embedding": True}, "a LayerNorm of the embeddings"),
        ({"segment_length": "2048;4096"}, "expected segment_lengths as a list of ints, got '2048;4096'"),
        ({"dilated_ratio": "__import__('os')"}, "expected dilation_rates as a list of ints"),
    ],
)
def test_settings_of_other_networks_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(torchscale(tokens=True), "torchscale-decoder", args=SETTINGS | change)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_weights_of_other_networks_are_refused_by_name(stack: str) -> None:
    source: Any = f"torchscale-{stack}"
    whole = torchscale(tokens=stack == "decoder")
    without = {name: x for name, x in whole.items() if "inner_attn_ln" not in name and "ffn_layernorm" not in name}
    with pytest.raises(ValueError, match="this is a pre-LN checkpoint without sub-LN") as raised:
        convert(without, source, **PATTERN)
    assert "missing" not in str(raised.value)
    post = {name: x for name, x in without.items() if not name.startswith("layer_norm.")}
    with pytest.raises(ValueError, match="this is a post-LN/deepnorm checkpoint"):
        convert(post, source, **PATTERN)
    if stack == "encoder":
        bare = {name: x for name, x in whole.items() if not name.startswith("layer_norm.")}
        with pytest.raises(ValueError, match=r"without a LayerNorm at the end.*'longvit'"):
            convert(bare, source, **PATTERN)


def test_an_encoder_that_scales_its_embeddings_is_told() -> None:
    found = convert(torchscale(), args=SETTINGS)
    assert found.notes == (
        "LongNetEncoder takes embeddings as they are: multiply them by sqrt(d_model), as the source did",
    )
    with pytest.raises(ValueError, match="expected xpos_rel_pos to be off in an encoder"):
        convert(torchscale(), args=SETTINGS | {"xpos_rel_pos": True})


@pytest.mark.parametrize("source", ["gigapath", "torchscale-encoder", "torchscale-decoder", "longvit", "fkodom"])
def test_a_wrong_checkpoint_gives_a_short_message(source: Any) -> None:
    wrong = {f"blocks.{i}.attn.qkv_of_another_model.weight": torch.zeros(1) for i in range(5000)}
    tokens = {"embed_tokens.weight": torch.zeros(1, 1), "output_projection.weight": torch.zeros(1, 1)}
    options = {} if source in ("gigapath", "longvit") else PATTERN
    options = options | ({"as_initialisation": True} if source == "fkodom" else {})
    for state in (wrong, wrong | tokens):
        with pytest.raises(ValueError, match="expected") as raised:
            convert(state, source, **options)
        text = str(raised.value)
        assert len(text) < 1500 and "blocks.0.attn" in text and re.search(r"and 4,99\d more", text), text
    with pytest.raises(ValueError, match="names that none of them has") as raised:
        convert(wrong)
    assert len(str(raised.value)) < 1500


def longvit(side: int, *, head: bool) -> State:
    """The names and shapes of the official LongViT, for `side * side` patches of 4 pixels."""
    shapes = {name: tuple(x.shape) for name, x in torchscale().items() if name.startswith("layers.")}
    shapes = {f"encoder.{name}": shape for name, shape in shapes.items()}
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, 4, 4), "patch_embed.proj.bias": (WIDTH,)}
    shapes |= {"pos_embed": (1, side * side, WIDTH)}
    if head:
        shapes = {f"model.{name}": shape for name, shape in shapes.items()}
        shapes |= norm("fc_norm", WIDTH) | linear("head", 3, WIDTH)
    return drawn(shapes)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("side", [8, 5])
def test_longvit(side: int, head: bool) -> None:
    """The official forward: patches and their table, layers without a last LayerNorm; mean, LayerNorm and head."""
    state = longvit(side, head=head)
    found = convert(state, num_heads=HEADS, segment_lengths=[8, 32], dilation_rates=[1, 2])
    model: Any = found.model
    assert found.source == "longvit" and found.notes == ("assumed, since weights do not tell: layer_norm_eps=1e-05",)
    bare = {name.removeprefix("model.").removeprefix("encoder."): x for name, x in state.items()}
    images = torch.randn(1, 3, 4 * side, 4 * side, dtype=torch.float64)
    x = F.conv2d(images, bare["patch_embed.proj.weight"], bare["patch_embed.proj.bias"], stride=4)[0].flatten(1).t()
    hidden = torchscale_forward(bare, x + bare["pos_embed"][0], causal=False)
    out = model(images)
    assert relative_norm(out.patches[0].flatten(0, 1), hidden) < 1e-13
    if head:
        pooled = F.layer_norm(hidden.mean(0), (WIDTH,), bare["fc_norm.weight"], bare["fc_norm.bias"])
        assert relative_norm(out.pooled[0], pooled) < 1e-13
        assert relative_norm(out.logits[0], bare["head.weight"] @ pooled + bare["head.bias"]) < 1e-13
    else:
        assert out.logits is None and relative_norm(out.pooled[0], hidden.mean(0)) < 1e-13


def test_longvit_has_the_segments_of_its_image(tmp_path: Path) -> None:
    state = longvit(32, head=True)
    state["model.patch_embed.proj.weight"] = torch.zeros(WIDTH, 3, 128, 128)  # 32 patches of 128 pixels: 4096
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "longvit.pth")
    assert "longvit to LongViT" in call("convert", tmp_path / "longvit.pth", tmp_path / "out", "--heads", 4)
    model: Any = load_pretrained(tmp_path / "out")
    assert model.config.segment_lengths == (1024, 2048, 4096, 8192, 16384) and model.config.num_classes == 3
    with pytest.raises(ValueError, match=r"expected pos_embed of shape \(1, G \* G, 16\)"):
        convert(state | {"model.pos_embed": torch.zeros(1, 10, WIDTH)})


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


def invoke(*arguments: Any) -> str:
    """What a command says on stderr."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stderr


class TestCommandLine:
    def test_gigapath(self, tmp_path: Path) -> None:
        encoder = SlideEncoder(in_chans=12, embed_dim=32, depth=2, num_heads=4, ffn_dim=24).eval()
        torch.save({"model": encoder.state_dict()}, tmp_path / "slide.pth")
        printed = call("convert", tmp_path / "slide.pth", tmp_path / "out", "--heads", 4, "--max-wsi-size", 250_000)
        assert "gigapath to SlideEncoder" in printed
        result = invoke("convert", tmp_path / "slide.pth", tmp_path / "mean", "--heads", 4, "--global-pool")
        assert "note: assumed, since weights do not tell: max_wsi_size=262144, tile_size=256, layer_norm_eps" in result
        assert load_pretrained(tmp_path / "mean").config.global_pool
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
        torch.save(fkodom(), tmp_path / "net.pt")
        arguments = ["convert", tmp_path / "net.pt", tmp_path / "out", "--as-initialisation"]
        arguments += ["--heads", 4, "-w", "8,32", "-r", "1,2"]
        assert "note: not the numbers of fkodom, a start for training" in invoke(*arguments)

    def test_mistakes(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch.save(torchscale(), tmp_path / "encoder.pt")
        common = ("convert", tmp_path / "encoder.pt", tmp_path / "out")
        assert "--heads with weights of torchscale-encoder" in fails(capsys, monkeypatch, *common)
        assert "--from to be one of ['gigapath'" in fails(capsys, monkeypatch, *common, "--from", "bogus")
        everything = (*common, "--heads", 4, "-w", "8", "-r", "1")
        refused = fails(capsys, monkeypatch, *everything, "--xpos-scale-base", 64)
        assert "expected no --xpos-scale-base with weights of torchscale-encoder" in refused
        assert "'relu', 'gelu'], got 'swish'" in fails(capsys, monkeypatch, *everything, "--activation", "swish")
        (tmp_path / "args.json").write_text("[1]")
        assert "--args to hold values by name" in fails(capsys, monkeypatch, *common, "--args", tmp_path / "args.json")
        (tmp_path / "args.json").write_text("{")
        assert "--args to be a JSON file" in fails(capsys, monkeypatch, *common, "--args", tmp_path / "args.json")
        torch.save(fkodom(), tmp_path / "encoder.pt")
        assert "expected --as-initialisation with weights" in fails(capsys, monkeypatch, *everything)
        (tmp_path / "encoder.pt").write_bytes(b"no weights")
        assert "to hold tensors as torch.save writes them" in fails(capsys, monkeypatch, *everything)
        assert "found none" in fails(capsys, monkeypatch, "convert", tmp_path / "absent.pt", tmp_path / "out")
        assert not (tmp_path / "out").exists()
