"""Every nn.Linear of a model is called as a module, so hooks, adapters and quantised layers put in its place count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dilated_attention_pytorch.models import LongNet, LongNetEncoder, LongNetLM, LongViT, SlideEncoder
from dilated_attention_pytorch.testing import relative_norm

PATTERN: dict[str, Any] = {"segment_lengths": (6, 16), "dilation_rates": (1, 2), "dtype": torch.float64}
LONGNET: dict[str, Any] = {
    **PATTERN,
    "d_model": 16,
    "nhead": 4,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "dim_feedforward": 24,
    "activation": "gelu",
}
VISION: dict[str, Any] = {**PATTERN, "embed_dim": 16, "depth": 2, "num_heads": 4, "ffn_dim": 24, "drop_path": 0.0}
KINDS = ["LongNet", "LongNetEncoder", "LongNetLM", "SlideEncoder", "LongViT"]


def build(kind: str, **options: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    """A model whose biases and norms are not at their start, and what it takes."""
    generator = torch.Generator().manual_seed(0)
    if kind == "SlideEncoder":
        model: nn.Module = SlideEncoder(**VISION, in_chans=6, dropout=0.0, **options)
        tiles = torch.randn(2, 20, 6, dtype=torch.float64, generator=generator)
        given: tuple[Any, ...] = (tiles, torch.randint(200_000, (2, 20, 2), generator=generator))
    elif kind == "LongViT":
        model = LongViT(**VISION, patch_size=4, num_classes=3, **options)
        given = (torch.randn(2, 3, 16, 20, dtype=torch.float64, generator=generator),)
    elif kind == "LongNetLM":
        model = LongNetLM(**LONGNET, vocab_size=11, **options)
        given = (torch.randint(11, (2, 20), generator=generator),)
    else:
        model = {"LongNet": LongNet, "LongNetEncoder": LongNetEncoder}[kind](**LONGNET, **options)
        given = (torch.randn(2, 20, 16, dtype=torch.float64, generator=generator),)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model, given


def values(out: Any) -> Tensor:
    """Everything that a model gives, in one tensor."""
    return torch.cat([x.flatten() for x in out if x is not None]) if isinstance(out, tuple) else out.flatten()


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


class Adapted(nn.Module):
    """A frozen Linear with a trained product of low rank beside it (LoRA, arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype) / 4)
        self.up = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype) / 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + x @ self.down.t() @ self.up.t()
        return out


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_hook_fires(kind: str, grad: bool) -> None:
    model, given = build(kind)
    want = set(linears(model))
    fired: list[str] = []
    for name, module in linears(model).items():
        module.register_forward_hook(lambda _m, _i, _o, name=name: fired.append(name))
    with torch.set_grad_enabled(grad):
        values(model(*given))
    assert set(fired) == want and len(fired) == len(want)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_hook_returns_counts(kind: str) -> None:
    model, given = build(kind)
    before = values(model(*given))
    for module in linears(model).values():
        handle = module.register_forward_hook(lambda _m, _i, out: 1.1 * out)
        assert not torch.equal(values(model(*given)), before)
        handle.remove()
        assert torch.equal(values(model(*given)), before)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_compute_and_learn_what_merged_weights_do(kind: str, again: bool) -> None:
    """Output of W + up @ down; gradients up.t() @ dW and dW @ down.t() of it."""
    torch.manual_seed(0)
    model, given = build(kind, gradient_checkpointing=again)
    merged, _ = build(kind)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapters: dict[str, Adapted] = {}
    for name, module in linears(model).items():
        parent, _, last = name.rpartition(".")
        adapters[name] = Adapted(module)
        setattr(model.get_submodule(parent), last, adapters[name])
    with torch.no_grad():
        for name, adapter in adapters.items():
            merged.get_submodule(name).weight += adapter.up @ adapter.down
    got, want = values(model(*given)), values(merged(*given))
    assert relative_norm(got, want) < 1e-12
    got.square().sum().backward()
    want.square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(adapters)
    for name, adapter in adapters.items():
        grad = merged.get_submodule(name).weight.grad
        for mine, theirs in ((adapter.down, adapter.up.t() @ grad), (adapter.up, grad @ adapter.down.t())):
            # A key's bias apart, gradients are far from 0; what is compared is each against the largest.
            assert mine.grad is not None and (mine.grad - theirs).norm() <= 1e-11 * (1 + theirs.norm()), name


def test_a_dropping_adapter_draws_the_same_in_the_backward() -> None:
    """The feed-forward network of slide encoders computes its inner rows twice; both times must drop alike."""
    model, given = build("SlideEncoder")
    assert isinstance(model, SlideEncoder)
    for layer in model.encoder.layers:
        layer.ffn.fc2 = nn.Sequential(nn.Dropout(0.5), layer.ffn.fc2)
    model.train()
    results = []
    for recompute in (True, False):
        for layer in model.encoder.layers:
            layer.ffn.recompute = recompute
        model.zero_grad()
        torch.manual_seed(3)
        values(model(*given)).square().sum().backward()
        results.append([p.grad.clone() for p in model.parameters()])
    for mine, plain in zip(*results, strict=True):
        assert relative_norm(mine, plain) < 1e-12


def test_second_derivatives_are_there() -> None:
    ffn = build("LongViT")[0].encoder.layers[0].ffn
    x = torch.randn(1, 3, 16, dtype=torch.float64, requires_grad=True)
    assert ffn.recompute and torch.autograd.gradgradcheck(ffn, (x,))
