"""The op inside PyTorch: opcheck, compile, fake tensors, autocast, FLOPs, checkpointing, memory."""

import functools
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from dilated_attention_pytorch import DilatedPattern, dilated_attention, dilated_attention_with_lse

PATTERN = {"segment_lengths": [8, 20], "dilation_rates": [1, 2]}
OP = torch.ops.dilated_attention_pytorch.attention


def qkv(*shape, kv_heads=None, dtype=torch.float32, grad=True):
    kv_shape = (*shape[:-2], kv_heads or shape[-2], shape[-1])
    return tuple(torch.randn(s, dtype=dtype, requires_grad=grad) for s in (shape, kv_shape, kv_shape))


def op_arguments(
    q, k, v, *, mask=None, row_start=None, cu=None, seed=None, causal=True, p=0.0, gradient="exact", padding="none"
):
    return (
        q,
        k,
        v,
        mask,
        row_start,
        cu,
        seed,
        [8, 20],
        [1, 2],
        "modulo",
        causal,
        0.4,
        p,
        0,
        0,
        q.shape[1],
        gradient,
        padding,
        "sdpa",
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": torch.rand(2, 23) > 0.3},
        {"row_start": torch.tensor([0, 4])},
        {"seed": torch.tensor(3), "p": 0.2},
        {"gradient": "detached", "causal": False},
        {"padding": "zero_keys", "causal": False},
    ],
    ids=["plain", "mask", "row_start", "dropout", "detached", "zero_keys"],
)
def test_opcheck(options):
    torch.library.opcheck(OP, op_arguments(*qkv(2, 23, 4, 8, kv_heads=2), **options))


def test_opcheck_packed():
    torch.library.opcheck(OP, op_arguments(*qkv(1, 23, 4, 8), cu=torch.tensor([0, 9, 23])))


def test_opcheck_backward():
    q, k, v = qkv(2, 23, 4, 8, kv_heads=2, grad=False)
    arguments = op_arguments(q, k, v)
    out, lse = OP(*arguments)
    backward = torch.ops.dilated_attention_pytorch.attention_backward
    torch.library.opcheck(backward, (torch.randn_like(out), torch.randn_like(lse), out, lse, *arguments))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize(
    "options",
    [{}, {"dropout_p": 0.2, "seed": 4}, {"segment_shift": 3}, {"segment_shift": 16, "segment_lengths": [8, 32]}],
    ids=["plain", "dropout", "shift", "two parts"],
)
def test_compiles_without_a_graph_break(backend, options):
    def attend(q, k, v):
        return dilated_attention_with_lse(q, k, v, is_causal=True, backend=backend, **(PATTERN | options))

    q, k, v = qkv(2, 23, 4, 8, kv_heads=2)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    want, got = attend(q, k, v), compiled(q, k, v)
    cotangent = torch.randn_like(want.out)
    for a, b in zip(
        (*got, *torch.autograd.grad(got.out, (q, k, v), cotangent)),
        (*want, *torch.autograd.grad(want.out, (q, k, v), cotangent)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shift", [0, 3, 16, 43])
def test_compiles_with_dynamic_lengths(shift):
    torch._dynamo.reset()
    options = PATTERN | {"is_causal": True, "segment_shift": shift, "segment_lengths": [8, 20 if shift < 16 else 32]}
    compiled = torch.compile(
        lambda q, k, v: dilated_attention(q, k, v, **options),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for n in (17, 30, 61):
        q, k, v = qkv(1, n, 2, 8, grad=False)
        torch.testing.assert_close(compiled(q, k, v), dilated_attention(q, k, v, **options))


def test_fake_tensors_have_the_real_shapes():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        q, k, v = qkv(2, 1000, 4, 8, kv_heads=2, dtype=torch.bfloat16)
        out, lse = dilated_attention_with_lse(q, k, v, **PATTERN)
        out.sum().backward()
    assert out.shape == (2, 1000, 4, 8)
    assert out.dtype == torch.bfloat16
    assert lse.shape == (2, 4, 1000)
    assert lse.dtype == torch.float32
    assert k.grad.shape == k.shape


@pytest.mark.parametrize("causal", [False, True])
def test_counted_flops_are_those_of_the_pattern(causal):
    q, k, v = qkv(3, 50, 4, 8, kv_heads=2)
    with FlopCounterMode(display=False) as forward:
        out = dilated_attention(q, k, v, is_causal=causal, **PATTERN)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    pairs = 3 * 2 * DilatedPattern((8, 20), (1, 2), 2).pairs(50, is_causal=causal)
    assert forward.get_total_flops() == 4 * 8 * pairs
    assert backward.get_total_flops() == 10 * 8 * pairs


def test_counted_flops_of_packed_and_partial_calls():
    q, k, v = qkv(50, 2, 8)
    pattern = DilatedPattern((8, 20), (1, 2), 2)
    with FlopCounterMode(display=False) as packed:
        dilated_attention(q, k, v, cu_seqlens=torch.tensor([0, 11, 50]), **PATTERN)
    assert packed.get_total_flops() == 4 * 8 * (pattern.pairs(11) + pattern.pairs(39))
    with FlopCounterMode(display=False) as partial:
        dilated_attention(q[None, :7], k[None, :30], v[None, :30], q_start=23, is_causal=True, **PATTERN)
    assert partial.get_total_flops() == 4 * 8 * pattern.pairs(50, is_causal=True, q_range=(23, 30), k_range=(0, 30))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_autocast_takes_its_dtype_and_gradients_come_back_in_fp32(backend):
    q, k, v = qkv(1, 30, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = dilated_attention(q, k.bfloat16(), v, backend=backend, **PATTERN)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("use_lse", [False, True])
def test_autocast_ends_where_attention_starts(backend, use_lse):
    """Autocast rounds the inputs, as it does for torch's attention; the softmax and its gradients stay in fp32."""
    q, k, v = qkv(1, 30, 2, 8, dtype=torch.bfloat16)
    options = {"dropout_p": 0.2, "seed": 4, "backend": backend, **PATTERN}
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, lse = dilated_attention_with_lse(q, k, v, **options)
            objective = out.float().square().sum() + (lse.sum() if use_lse else 0.0)
            # The reference's own backward is autograd's, which autocast reaches where it is on.
            grads = torch.autograd.grad(objective, (q, k, v)) if backend == "sdpa" else ()
        results.append((out, lse, *grads))
    assert results[1][1].dtype == torch.float32
    for want, got in zip(*results, strict=True):
        assert torch.equal(want, got)


def test_double_backward_is_refused_not_wrong():
    q, k, v = qkv(1, 12, 2, 4)
    (grad,) = torch.autograd.grad(dilated_attention(q, k, v, **PATTERN).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), q)


def test_selective_checkpointing_by_op_name():
    """A policy that saves the op's result keeps it from running twice; gradients stay the same bits."""
    calls = []

    def policy(saved, context, op, *args, **kwargs):
        if op is OP.default:
            calls.append(context.is_recompute)
            return saved
        return CheckpointPolicy.PREFER_RECOMPUTE

    q, k, v = qkv(1, 30, 2, 8)
    gradients = []
    for saved in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE):
        contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(policy, saved))
        out = checkpoint(
            lambda q, k, v: dilated_attention(q, k, v, **PATTERN) * 2, q, k, v, use_reentrant=False, context_fn=contexts
        )
        gradients.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    assert calls
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


MEMORY = """
import sys, torch
from dilated_attention_pytorch import dilated_attention
from dilated_attention_pytorch.testing import peak_bytes
torch.set_num_threads(1)
n = int(sys.argv[1])
q, k, v = (torch.randn(1, n, 2, 16, requires_grad=True) for _ in range(3))
pattern = dict(segment_lengths=[64, n], dilation_rates=[1, 64], is_causal=True)
dilated_attention(*(x[:, :64] for x in (q, k, v)), **pattern).sum().backward()  # loads the kernels
cotangent = torch.randn_like(q)
print(peak_bytes(lambda: dilated_attention(q, k, v, **pattern).backward(cotangent)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's /proc")
def test_memory_is_linear_in_length():
    """Forward and backward over 262,144 tokens: out, its accumulator, three gradients and their accumulators, and no
    more than as much again in temporaries. The logits of the dense branch would be 256 GiB."""
    n = 2**18
    run = subprocess.run([sys.executable, "-c", MEMORY, str(n)], capture_output=True, text=True, check=True)
    one_input = n * 2 * 16 * 4
    assert 3 * one_input <= int(run.stdout) <= 12 * one_input
