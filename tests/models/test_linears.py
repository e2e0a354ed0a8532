"""Every module of a model is called, so hooks, adapters, quantised layers and shards put in its place count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ring_pool import Pool
from tiny_models import KINDS, MODELS, build, has_own, linears, values
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from dilated_attention_pytorch import SlideEncoder
from dilated_attention_pytorch.models import decoding
from dilated_attention_pytorch.testing import relative_norm


def lora(model: nn.Module, names: list[str]) -> dict[str, Any]:
    """Gives linear layers LoRA adapters of rank 2 that change something, in place; the adapted layers by name."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=names, init_lora_weights=False, r=2), model)
    found = {name: model.get_submodule(name) for name in names}
    assert all(isinstance(module, peft.tuners.lora.Linear) for module in found.values())
    return found


def called(model: nn.Module) -> set[str]:
    """The modules that compute something: all but lists of them."""
    return {name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_hook_fires(kind: str, grad: bool) -> None:
    """On every module, the model inside a model too; on a Linear once, and not again in the backward."""
    model, given = build(kind)
    fired: list[str] = []
    for name in called(model):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _m, _i, _o, name=name: fired.append(name))
        module.register_forward_pre_hook(lambda _m, _i, name=name: fired.append(name))
    with torch.set_grad_enabled(grad):
        out = values(model(*given))
    if grad:
        out.square().sum().backward()
    assert set(fired) == called(model)
    assert all(fired.count(name) == 2 for name in linears(model))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_hook_returns_counts(kind: str) -> None:
    """On every module with parameters of its own."""
    model, given = build(kind)
    before = values(model(*given))
    owners = {n: m for n, m in model.named_modules() if n and has_own(m)}
    assert len(owners) >= 5
    for name, module in owners.items():
        handle = module.register_forward_hook(lambda _m, _i, out: 1.1 * out)
        assert not torch.equal(values(model(*given)), before), name
        handle.remove()
        assert torch.equal(values(model(*given)), before), name


def test_a_hook_of_all_modules_fires_on_the_norm_that_is_computed_again() -> None:
    model, given = build("LongViT")
    fired: set[nn.Module] = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, _i, _o: fired.add(module))
    try:
        values(model(*given)).sum().backward()
    finally:
        handle.remove()
    assert fired == {model.get_submodule(name) for name in called(model)}


@pytest.mark.parametrize("again", [False, True])
def test_another_module_in_a_norms_place_is_called(again: bool) -> None:
    """It was read for its weight and bias, as if any module of that place were a LayerNorm."""
    outs = []
    for recompute in (True, False):
        model, given = build("SlideEncoder", gradient_checkpointing=again)
        for layer in model.encoder.layers:
            layer.ffn.ffn_layernorm = nn.RMSNorm(24, dtype=torch.float64)
            layer.ffn.recompute = recompute
        outs.append(values(model(*given)))
    assert torch.equal(*outs)


@pytest.mark.parametrize(("kind", "again"), [(kind, False) for kind in KINDS] + [(kind, True) for kind in MODELS])
def test_lora_computes_and_learns_what_merged_weights_do(kind: str, again: bool) -> None:
    """Output of W + B A; gradients B.t() dW and dW A.t() of it. Each adapter alone changes the output."""
    model, given = build(kind, **({"gradient_checkpointing": True} if again else {}))
    merged, _ = build(kind)
    adapters = lora(model, list(linears(model)))
    with torch.no_grad():
        for name, adapter in adapters.items():
            merged.get_submodule(name).weight += adapter.get_delta_weight("default")
    got, want = values(model(*given)), values(merged(*given))
    assert relative_norm(got, want) < 1e-12
    got.square().sum().backward()
    want.square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(adapters)
    for name, adapter in adapters.items():
        grad, scale = merged.get_submodule(name).weight.grad, adapter.scaling["default"]
        a, b = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
        for mine, theirs in ((a, scale * b.t() @ grad), (b, scale * grad @ a.t())):
            # A key's bias apart, gradients are far from 0; what is compared is each against the largest.
            assert mine.grad is not None and mine.grad.norm() > 0.0
            assert (mine.grad - theirs).norm() <= 1e-11 * (1 + theirs.norm()), name
        with torch.no_grad():
            kept = b.clone()
            b.zero_()
            assert not torch.equal(values(model(*given)), got), name
            b.copy_(kept)


def to_int8(model: nn.Module) -> nn.Module:
    """A copy with int8 linear layers whose inputs are quantised as they come."""
    int8: nn.Module = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    kind = torch.ao.nn.quantized.dynamic.Linear
    assert all(type(int8.get_submodule(name)) is kind for name in linears(model))
    return int8


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
class TestInt8:
    @torch.no_grad()
    @pytest.mark.parametrize("kind", KINDS)
    def test_near_fp32(self, kind: str) -> None:
        """Rounding to steps of d leaves d / sqrt(12). Weights have steps of 1/127 of their largest, some 3 deviations;
        inputs, in 7 bits, of 1/127 of their range, some 6: 0.7% and 1.4%, so 1.6% per layer. Errors of different
        layers add as squares."""
        model, given = build(kind, dtype=torch.float32)
        int8 = to_int8(model)
        error = relative_norm(values(int8(*given)), values(model(*given)))
        assert 0.0 < error < 0.016 * len(linears(model)) ** 0.5

    def test_generation(self) -> None:
        model, (tokens,) = build("LongNetLM", dtype=torch.float32)
        int8: Any = to_int8(model)
        new = int8.generate(tokens, 6, greedy=True)
        every = torch.cat((tokens, new), 1)
        with torch.no_grad():
            logits = int8(every)[:, tokens.shape[1] - 1 : -1]
        # Steps of inputs depend on what is computed together, so a cached step is near the whole's, not equal.
        best, drawn = logits.max(-1).values, logits.gather(-1, new[..., None])[..., 0]
        assert ((best - drawn) < 0.1 * logits.std()).all()
        assert not [reason for reason in decoding.why_not(int8, tokens) if "no kernel takes" in reason]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Pool]:
    pool = Pool(2, [2], "sharded_linear_tasks")
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("kind", "every", "again"),
    [(kind, every, False) for kind in KINDS for every in (False, True)] + [(kind, True, True) for kind in MODELS],
)
def test_sharded_one_by_one(ranks: Pool, kind: str, every: bool, again: bool) -> None:
    """FSDP2 around every Linear, or every module, on two ranks with a row of the batch each: equals one device."""
    model, given = build(kind)
    # A row at a time, since a model may give a batch's numbers in another order than its rows'.
    outs = [values(model(*(x[i : i + 1] for x in given))) for i in range(2)]
    sum(out.square().sum() for out in outs).div(2).backward()
    for out, found in zip(outs, ranks.run("step", kind, every, again), strict=True):
        assert relative_norm(found.pop("out"), out.detach()) < 1e-12
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert (found[name] - parameter.grad).norm() <= 1e-11 * (1 + parameter.grad.norm()), name


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
            lora(layer, ["ffn.fc2"])
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
