"""Every nn.Linear of a model is called as a module, so hooks, adapters and quantised layers put in its place count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

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
        module.register_forward_pre_hook(lambda _m, _i, name=name: fired.append(name))
    with torch.set_grad_enabled(grad):
        out = values(model(*given))
    if grad:
        out.square().sum().backward()  # calls none of them again
    assert set(fired) == want and len(fired) == 2 * len(want)


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


@pytest.mark.parametrize(
    "before",
    [nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Identity(), nn.Flatten(0, -2)],
    ids=["drops", "writes in place", "passes on", "takes a view"],
)
def test_modules_before_the_projection(before: nn.Module) -> None:
    """The backward computes the projection's input again; what is done to that input must not be lost."""
    model, given = build("SlideEncoder")
    assert isinstance(model, SlideEncoder)
    layers = [layer.ffn for layer in model.encoder.layers]
    for ffn in layers:
        back = nn.Unflatten(0, (2, 21)) if isinstance(before, nn.Flatten) else nn.Identity()
        ffn.fc2 = nn.Sequential(before, ffn.fc2, back)
    model.train()
    results = []
    for recompute, again in ((True, False), (True, True), (False, False)):
        model.gradient_checkpointing = again
        for ffn in layers:
            ffn.recompute = recompute
        model.zero_grad()
        torch.manual_seed(3)
        values(model(*given)).square().sum().backward()
        results.append([p.grad.clone() for p in model.parameters()])
    whole = torch.cat([x.flatten() for x in results[-1]]).norm()
    for mine, checkpointed, plain in zip(*results, strict=True):
        assert torch.equal(mine, checkpointed)
        assert (mine - plain).norm() <= 1e-12 * whole


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_the_projections_input_is_gone_after_the_forward(again: bool, adapted: bool) -> None:
    """Of a feed-forward network's inner tensors fc1's output alone stays, and with checkpointing none."""
    model, given = build("SlideEncoder", gradient_checkpointing=again)
    assert isinstance(model, SlideEncoder)
    kept: dict[str, list[StorageWeakRef]] = {"fc1": [], "fc2": []}
    for layer in model.encoder.layers:
        if adapted:
            layer.ffn.fc2 = Adapted(layer.ffn.fc2)
        layer.ffn.fc1.register_forward_hook(
            lambda _m, _i, out: kept["fc1"].append(StorageWeakRef(out.untyped_storage()))
        )
        layer.ffn.fc2.register_forward_pre_hook(
            lambda _m, given: kept["fc2"].append(StorageWeakRef(given[0].untyped_storage()))
        )
    out = values(model(*given))
    assert len(kept["fc1"]) == len(kept["fc2"]) == 2
    assert all(storage.expired() for storage in kept["fc2"])
    assert all(storage.expired() is again for storage in kept["fc1"])
    out.sum().backward()


def test_backwards_that_go_through_the_projection_alone_or_twice() -> None:
    ffn = build("LongViT")[0].encoder.layers[0].ffn
    x = torch.randn(1, 3, 16, dtype=torch.float64, requires_grad=True)
    results = []
    for recompute in (True, False):
        ffn.recompute = recompute
        out = ffn(x).square().sum()
        some = torch.autograd.grad(out, [ffn.fc2.weight], retain_graph=True)
        every = [torch.autograd.grad(out, [x, *ffn.parameters()], retain_graph=True) for _ in range(2)]
        results.append([*some, *every[0], *every[1]])
    for mine, plain in zip(*results, strict=True):
        assert relative_norm(mine, plain) < 1e-12


def test_second_derivatives_are_refused() -> None:
    ffn = build("LongViT")[0].encoder.layers[0].ffn
    x = torch.randn(1, 3, 16, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(ffn(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_long_vit_compiles_as_one_graph() -> None:
    model, given = build("LongViT")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, want = values(compiled(*given)), values(model(*given))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    got.sum().backward()
