"""The backward kernels for Hopper on a Hopper GPU: against fp64, flash attention and their Triton twins."""

import importlib.util

import pytest
import torch
from hopper_calls import check, inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch import dilated_attention_with_lse
from dilated_attention_pytorch.testing import relative_norm

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")]

PAPER = {"segment_lengths": [2048, 4096, 8192, 16384], "dilation_rates": [1, 2, 4, 8]}


# Lengths, rates, causal, head_dim, dtype, query heads per key head, whether the sequence is whole tiles: each is
# compiled once, and takes calls of any size.
VARIANTS = [
    ((256, 512, 1024), (1, 2, 2), False, 64, torch.bfloat16, 1, True),
    ((2048, 4096), (1, 16), False, 128, torch.bfloat16, 1, False),
    ((768, 2304), (1, 3), False, 64, torch.float16, 2, False),
    ((512, 1 << 20), (1, 4), False, 128, torch.bfloat16, 3, True),
    ((256, 512, 512), (1, 2, 2), True, 64, torch.bfloat16, 1, False),
    ((2048, 4096), (1, 16), True, 128, torch.bfloat16, 1, True),
    ((384, 1152), (1, 3), True, 64, torch.float16, 2, True),
    ((1024, 2048, 4096, 1 << 20), (1, 2, 4, 8), True, 128, torch.bfloat16, 3, False),
]


@st.composite
def calls(draw, variant):
    """Calls of a variant, longer than each segment but those that cover any sequence."""
    lengths, rates, causal, width, dtype, group, even = variant
    longest = max(x for x in lengths if x < 1 << 20)
    unit = max(lengths[0], 128 * rates[-1]) if even else rates[-1] if causal else 1
    n = draw(st.integers((longest + rates[-1]) // unit + 1, max(6000, 2 * longest) // unit + 1)) * unit
    kv_heads = draw(st.integers(1, 3))
    return {
        "pattern": {"segment_lengths": lengths, "dilation_rates": rates}, "is_causal": causal, "kv_heads": kv_heads,
        "shape": (draw(st.integers(1, 2)), n, kv_heads * group, width), "dtype": dtype,
        "scale": draw(st.sampled_from([None, 0.3])), "packed": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


def gradients(call, backend, dtype=None, lse=False):
    x, grad_out, grad_lse = inputs(call)
    leaves = [y.to(dtype or call["dtype"]).detach().requires_grad_() for y in x]
    result = dilated_attention_with_lse(
        *leaves, is_causal=call["is_causal"], scale=call["scale"], backend=backend, **call["pattern"]
    )
    total = (result.out * grad_out.to(result.out.dtype)).sum()
    if lse:
        total = total + (result.lse * grad_lse.to(result.lse.dtype)).sum()
    return torch.autograd.grad(total, leaves)


@pytest.fixture
def launched(monkeypatch):
    """How often the kernels were launched. Short calls take them too."""
    from dilated_attention_pytorch.kernels.triton import replay
    from dilated_attention_pytorch.kernels.triton.hopper import launch_backward, support

    monkeypatch.setattr(support, "_SHORT", {})
    monkeypatch.setattr(support, "_WASTE", 1.0)
    monkeypatch.setattr(replay, "_tapes", {})
    calls = []
    original = launch_backward.backward
    monkeypatch.setattr(launch_backward, "backward", lambda *args: calls.append(1) or original(*args))
    return calls


def without(monkeypatch):
    """From here on the Triton twins run."""
    from dilated_attention_pytorch.kernels.triton import replay
    from dilated_attention_pytorch.kernels.triton.hopper import support

    monkeypatch.setattr(replay, "_tapes", {})
    monkeypatch.setattr(support, "why_not", lambda _: ["a test wants the twins"])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_gradients_of_drawn_calls(launched, variant, data):
    """At most twice the error of torch's flash attention, merged over branches in fp32; the same bits twice."""
    from dilated_attention_pytorch.kernels.triton import replay

    call = data.draw(calls(variant))
    launched.clear()
    replay._tapes.clear()  # a call like an earlier one is not to be replayed
    # In fp64 sdpa is the reference to 1e-10 (test_gpu.py), tile by tile.
    want, base = gradients(call, "sdpa", torch.float64), gradients(call, "sdpa")
    ours, again = gradients(call, "triton"), gradients(call, "triton")
    assert launched, "other kernels ran"
    check(("dq", "dk", "dv"), ours, again, want, base)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_equal_to_the_twin(launched, monkeypatch, causal, width):
    """The paper's pattern, four branches: the twin rounds at the same places, in another order."""
    shape = (1, 16384, 4, width)
    call = {
        "pattern": PAPER, "is_causal": causal, "shape": shape, "kv_heads": 2, "dtype": torch.bfloat16, "scale": None,
        "packed": False, "seed": 1,
    }  # fmt: skip
    ours = gradients(call, "triton", lse=True)
    assert launched
    without(monkeypatch)
    for a, b in zip(ours, gradients(call, "triton", lse=True), strict=True):
        assert relative_norm(a, b) <= 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_wherever_the_pair_lies(launched, monkeypatch, causal, width):
    """In shared memory or in registers: the same products in the same order."""
    from dilated_attention_pytorch.kernels.triton import replay
    from dilated_attention_pytorch.kernels.triton.hopper import launch_backward

    call = {
        "pattern": PAPER, "is_causal": causal, "shape": (1, 16384, 4, width), "kv_heads": 2, "dtype": torch.bfloat16,
        "scale": None, "packed": False, "seed": 3,
    }  # fmt: skip
    dq, dkv = launch_backward._CONFIGS[width, causal]
    found = []
    for registers in (False, True):
        # At 128 columns two accumulators leave no registers for keys and values.
        chosen = dq._replace(block=64, registers=registers), dkv._replace(registers=registers and width == 64)
        monkeypatch.setitem(launch_backward._CONFIGS, (width, causal), chosen)
        monkeypatch.setattr(replay, "_tapes", {})
        found.append(gradients(call, "triton", lse=True))
    assert len(launched) == 2
    want, ours = found
    for a, b in zip(ours, want, strict=True):
        assert relative_norm(a, b) <= 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("causal", [False, True])
def test_a_later_call_and_a_graph_give_the_same_bits(launched, causal):
    """The second call is replayed from its tape; the third is captured."""
    call = {
        "pattern": PAPER, "is_causal": causal, "shape": (1, 16384, 2, 64), "kv_heads": 2, "dtype": torch.bfloat16,
        "scale": None, "packed": True, "seed": 2,
    }  # fmt: skip
    (q, k, v), grad, _ = inputs(call)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def run():
        out = dilated_attention_with_lse(*leaves, is_causal=causal, backend="triton", **PAPER).out
        return torch.autograd.grad(out, leaves, grad)

    first, second = run(), run()
    assert len(launched) == 1
    assert all(map(torch.equal, first, second))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    grad.copy_(torch.randn_like(grad))
    graph.replay()
    assert all(map(torch.equal, captured, run()))


@pytest.mark.parametrize("width", [64, 128])
def test_later_tokens_change_no_earlier_bit(launched, width):
    """Gradients of early rows' outputs, whatever the later rows hold; unwritten memory is not zero here."""
    poison = torch.full((1 << 28,), torch.nan, device="cuda")
    del poison
    leaves = [torch.randn(1, 8192, 2, width, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    cut, results = 3001, []
    for _ in range(2):
        out = dilated_attention_with_lse(*leaves, is_causal=True, backend="triton", **PAPER).out
        grads = torch.autograd.grad(out[:, :cut].float().sum(), leaves)
        assert all(torch.equal(g[:, cut:], torch.zeros_like(g[:, cut:])) for g in grads)
        results.append([g[:, :cut] for g in grads])
        with torch.no_grad():
            for x in leaves:
                x[:, cut:] = 50 * torch.randn_like(x[:, cut:])
    assert launched
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("causal", [False, True])
def test_offsets_past_two_to_the_thirty_one(launched, causal):
    """More than 2^31 elements in each gradient: the last rows are as right as the first."""
    n, heads = 1 << 19, 66
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, grad = (
        torch.randn(1, n, heads, 64, device="cuda", generator=generator, dtype=torch.bfloat16) for _ in range(4)
    )
    assert q.numel() > 2**31

    def run(*x):
        leaves = [y.detach().requires_grad_() for y in x[:3]]
        out = dilated_attention_with_lse(*leaves, is_causal=causal, backend="triton", **PAPER).out
        return torch.autograd.grad(out, leaves, x[3])

    start = n - 16384
    whole = [x[:, start:].clone() for x in run(q, k, v, grad)]
    assert len(launched) == 1
    for a, b in zip(whole, run(*(x[:, start:] for x in (q, k, v, grad))), strict=True):
        assert torch.equal(a, b)
