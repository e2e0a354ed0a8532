"""The kernels for one branch on a Hopper GPU: forward and gradients against fp64, flash attention and their twins."""

import importlib.util

import pytest
import torch
from hopper_calls import check, inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch import dilated_attention_with_lse

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")]

# Width, causal, dtype, offsets, query heads per key head: each is compiled once or twice, and takes calls of any
# lengths and rates.
VARIANTS = [
    (48, False, torch.bfloat16, "blocked", 1),
    (48, True, torch.bfloat16, "modulo", 2),
    (40, False, torch.float16, "modulo", 1),
    (64, False, torch.bfloat16, "blocked", 1),
    (64, True, torch.float16, "modulo", 3),
    (80, False, torch.bfloat16, "modulo", 1),
    (80, True, torch.bfloat16, "blocked", 1),
    (96, True, torch.bfloat16, "modulo", 2),
    (112, False, torch.float16, "blocked", 1),
    (128, False, torch.bfloat16, "modulo", 1),
    (128, True, torch.bfloat16, "blocked", 1),
    (160, False, torch.bfloat16, "modulo", 1),
    (192, True, torch.float16, "blocked", 1),
    (256, False, torch.bfloat16, "blocked", 1),
    (256, True, torch.bfloat16, "modulo", 2),
]


@st.composite
def calls(draw, variant):
    """Lengths that no rate divides, the last segment cut, residues that differ in length, slices of one tensor."""
    width, causal, dtype, offsets, group = variant
    count = draw(st.integers(1, 3))
    rates = sorted(draw(st.lists(st.integers(1, 6), min_size=count, max_size=count)))
    lengths = sorted(draw(st.lists(st.integers(1030, 9000), min_size=count, max_size=count)))
    kv_heads = draw(st.integers(1, 3))
    n = draw(st.integers(1030, 12_000))
    return {
        "pattern": {"segment_lengths": lengths, "dilation_rates": rates, "offsets": offsets},
        "is_causal": causal, "kv_heads": kv_heads, "shape": (draw(st.integers(1, 2)), n, kv_heads * group, width),
        "dtype": dtype, "scale": draw(st.sampled_from([None, 0.3])), "packed": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


def results(call, backend, dtype=None):
    """out, lse and gradients, of a total in which rows without keys do not count."""
    x, grad_out, grad_lse = inputs(call)
    leaves = [y.to(dtype or call["dtype"]).detach().requires_grad_() for y in x]
    out, lse = dilated_attention_with_lse(
        *leaves, is_causal=call["is_causal"], scale=call["scale"], backend=backend, **call["pattern"]
    )
    total = (out * grad_out.to(out.dtype)).sum() + (lse.clamp_min(-1e4) * grad_lse.to(lse.dtype)).sum()
    return out.detach(), lse.detach().clamp_min(-1e4), *torch.autograd.grad(total, leaves)


@pytest.fixture
def launched(monkeypatch):
    """What was launched. Short segments and short calls take the kernels too."""
    from dilated_attention_pytorch.kernels.triton import launch_aligned, replay
    from dilated_attention_pytorch.kernels.triton.hopper import launch_branch, support

    monkeypatch.setattr(support, "_FEW", dict.fromkeys(support._FEW, 5 * (64,)))
    monkeypatch.setattr(support, "_LITTLE", dict.fromkeys(support._LITTLE, 0))
    monkeypatch.setattr(support, "why_not", lambda _: ["a test wants a launch per branch"])
    monkeypatch.setattr(launch_aligned, "why_not", lambda *_: "a test wants a launch per branch")
    monkeypatch.setattr(replay, "_tapes", {})
    calls = []
    for name in ("forward", "backward_dq", "backward_dkv"):
        original = getattr(launch_branch, name)
        monkeypatch.setattr(
            launch_branch, name, lambda *args, name=name, original=original: calls.append(name) or original(*args)
        )
    return calls


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_drawn_calls(launched, variant, data):
    """At most twice the error of torch's flash attention, merged over branches in fp32; the same bits twice."""
    from dilated_attention_pytorch.kernels.triton import replay

    call = data.draw(calls(variant))
    launched.clear()
    replay._tapes.clear()  # a call like an earlier one is not to be replayed
    ours, again = results(call, "triton"), results(call, "triton")
    assert {"forward", "backward_dq"} | ({"backward_dkv"} if variant[0] <= 128 else set()) == set(launched)
    # In fp64 sdpa is the reference to 1e-10 (test_gpu.py), tile by tile.
    want, base = results(call, "sdpa", torch.float64), results(call, "sdpa")
    check(("out", "lse", "dq", "dk", "dv"), ours, again, want, base)


@pytest.mark.parametrize("width", [48, 96])
def test_later_tokens_change_no_earlier_bit(launched, width):
    """Outputs of early rows and their gradients, whatever the later rows hold."""
    pattern = {"segment_lengths": [1500, 4099], "dilation_rates": [1, 3]}
    leaves = [torch.randn(1, 8192, 2, width, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    cut, found = 3001, []
    for _ in range(2):
        out = dilated_attention_with_lse(*leaves, is_causal=True, backend="triton", **pattern).out
        grads = torch.autograd.grad(out[:, :cut].float().sum(), leaves)
        assert all(torch.equal(g[:, cut:], torch.zeros_like(g[:, cut:])) for g in grads)
        found.append([out[:, :cut].detach(), *(g[:, :cut] for g in grads)])
        with torch.no_grad():
            for x in leaves:
                x[:, cut:] = 50 * torch.randn_like(x[:, cut:])
    assert launched
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("causal", [False, True])
def test_a_graph_gives_the_same_bits(launched, causal):
    pattern = {"segment_lengths": [1500, 4099], "dilation_rates": [1, 3]}
    leaves = [torch.randn(1, 8193, 2, 80, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]

    def run():
        out = dilated_attention_with_lse(*leaves, is_causal=causal, backend="triton", **pattern).out
        # A graph of autograd that outlives the call would take its stream, the usual one, into the capture.
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

    first, second = run(), run()
    assert launched
    assert all(map(torch.equal, first, second))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        leaves[1].copy_(torch.randn_like(leaves[1]))
    graph.replay()
    assert all(map(torch.equal, captured, run()))


def test_offsets_past_two_to_the_thirty_one(launched, monkeypatch):
    """More than 2^31 elements in each tensor: the last rows are as right as the first."""
    n, heads, width = 442_368, 110, 48  # 27 segments of 16,384
    pattern = {"segment_lengths": [2048, 16_384], "dilation_rates": [1, 4], "offsets": "blocked"}
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, grad = (
        torch.randn(1, n, heads, width, device="cuda", generator=generator, dtype=torch.bfloat16) for _ in range(4)
    )
    assert q.numel() > 2**31

    def run(*x):
        leaves = [y.detach().requires_grad_() for y in x[:3]]
        out = dilated_attention_with_lse(*leaves, backend="triton", **pattern).out
        return out.detach(), *torch.autograd.grad(out, leaves, x[3])

    start = n - 16_384
    whole = [x[:, start:].clone() for x in run(q, k, v, grad)]
    assert {"forward", "backward_dq", "backward_dkv"} == set(launched)
    for a, b in zip(whole, run(*(x[:, start:] for x in (q, k, v, grad))), strict=True):
        assert torch.equal(a, b)
