"""The op on a CUDA device, against the reference in fp64 on the same inputs."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import MODES, Case, cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dilated_attention_pytorch import MultiheadDilatedAttention, dilated_attention, dilated_attention_with_lse
from dilated_attention_pytorch.core.problem import one_segment
from dilated_attention_pytorch.kernels import ops
from dilated_attention_pytorch.kernels.choice import choose_backend
from dilated_attention_pytorch.kernels.sdpa import torch_calls
from dilated_attention_pytorch.testing import relative_norm
from dilated_attention_pytorch.types import QKV

pytestmark = [
    pytest.mark.gpu,
    # torch's own, when a backward thread is the first to need cuBLAS.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context:UserWarning"),
]

HALF = (torch.float16, torch.bfloat16)
SETTINGS = {"suppress_health_check": list(HealthCheck)}
DENSE = {"segment_lengths": [2048], "dilation_rates": [1]}
ALIGNED = {"segment_lengths": [512, 1024, 8192], "dilation_rates": [1, 2, 4]}
RAGGED = {"segment_lengths": [300, 1000, 5792], "dilation_rates": [1, 3, 6]}
SHORT = {"segment_lengths": [16, 64, 400], "dilation_rates": [1, 2, 8]}


def assert_within_rounding(case: Case, backend: str, dtype: torch.dtype) -> None:
    """At most twice the reference's own error in the same dtype, plus what rounding P and dS to it may add."""
    rounded = tuple(x.to(dtype).double() for x in case.tensors(torch.float64))
    case.tensors = lambda target, device="cpu": tuple(x.to(device, target, copy=True) for x in rounded)
    truth = case.run("reference", device="cuda")
    scales = case.scales
    ours, plain = case.run(backend, dtype, "cuda"), case.run("reference", dtype, "cuda")
    ulp = torch.finfo(dtype).eps
    q, k, _ = rounded
    logit = (
        0.0 if 0 in (q.numel(), k.numel()) else float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) * q.shape[-1] ** -0.5
    )
    for name, want in truth.items():
        finite = torch.isfinite(want)
        assert torch.equal(torch.isfinite(ours[name]), finite), name
        want, got, base = (torch.where(finite, x.double(), 0.0) for x in (want, ours[name], plain[name]))
        # Kernels round P and dS to the input's dtype before each product, and the device's exp2 adds two ulps of fp32
        # to those its argument carries; the plain reference does neither.
        weight = 2 * ulp + (2 + logit) * torch.finfo(torch.float32).eps
        allowed = 2 * (base - want).norm() + weight * (want.norm() + 0.25 * scales.get(name, 0.0))
        if name == "lse":  # the device's exp2 and log2 are good to a few ulps of 1, whatever the lse
            allowed = allowed + 4 * torch.finfo(torch.float32).eps * want.numel() ** 0.5
        assert (got - want).norm() <= allowed, (name, float((got - want).norm()), float(allowed))


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=25, **SETTINGS)
@given(data=st.data())
def test_sdpa_equals_the_reference_in_fp64(mode, data):
    case = data.draw(cases(mode))
    want = case.run("reference", device="cuda")
    errors = case.errors(case.run("sdpa", device="cuda"), want)
    assert max(errors.values()) <= 1e-10, errors


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=10, **SETTINGS)
@given(data=st.data(), width=st.sampled_from([8, 40, 64, 128]))
def test_sdpa_in_low_precision(dtype, mode, width, data):
    case = data.draw(cases(mode))
    case.q_shape, case.k_shape = (*case.q_shape[:-1], width), (*case.k_shape[:-1], width)
    assert_within_rounding(case, "sdpa", dtype)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "detached"])
@settings(max_examples=10, **SETTINGS)
@given(data=st.data(), width=st.sampled_from([16, 48, 64, 80, 128]))
def test_triton_equals_the_reference(dtype, mode, width, data):
    """Two hundred and ten configurations, gradients included."""
    case = data.draw(cases(mode))
    if case.options.get("mixing_gradient") == "detached":
        del case.options["mixing_gradient"]
    case.q_shape, case.k_shape = (*case.q_shape[:-1], width), (*case.k_shape[:-1], width)
    assert_within_rounding(case, "triton", dtype)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tails", ["gaussian", "heavy"])
@pytest.mark.parametrize("pattern", [DENSE, ALIGNED, RAGGED])
def test_errors_are_at_most_twice_those_of_torch_flash(pattern, tails, causal, width):
    """A dense branch against flash itself; several branches against flash calls merged in fp32, as sdpa makes them."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = functools.partial(torch.randn, 1, 2048, 2, width, device="cuda", generator=generator)
    # Products of three normals: most entries small, some very large.
    q, k, v = (draw() * draw() * draw() if tails == "heavy" else draw() for _ in range(3))
    assert_beside_flash(*(x.bfloat16() for x in (q, k, v, draw())), pattern, causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [48, 64, 96, 256])
@pytest.mark.parametrize("n", [2048, 2049, 3001])
@pytest.mark.parametrize("pattern", [ALIGNED, RAGGED, SHORT])
def test_lengths_that_rates_do_not_divide(pattern, n, width, causal):
    """Every kind of view, the rows that a ragged one lacks, and segments that share a tile."""
    generator = torch.Generator("cuda").manual_seed(n)
    make = functools.partial(torch.randn, 2, n, 2, width, device="cuda", dtype=torch.bfloat16, generator=generator)
    assert_beside_flash(*(make() for _ in range(4)), pattern, causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [48, 128, 256])
@pytest.mark.parametrize("n", [33, 960, 999])
def test_single_precision_at_lengths_that_rates_do_not_divide(n, width, causal):
    """Four ways to load rows; the same bits each time."""
    pattern = {"segment_lengths": [64, 200, 999], "dilation_rates": [3, 12, 8], "is_causal": causal}
    generator = torch.Generator("cuda").manual_seed(n)
    make = functools.partial(torch.randn, 2, n, 4, width, device="cuda", generator=generator)
    x, cotangent = [make() for _ in range(3)], make()

    def run(backend, dtype):
        leaves = [y.to(dtype).requires_grad_() for y in x]
        out = dilated_attention(*leaves, backend=backend, **pattern)
        return out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(dtype))

    want, first = run("reference", torch.float64), run("triton", torch.float32)
    # Three products of tf32 keep 21 bits of 24; sums of up to a thousand terms lose a few more.
    assert all(relative_norm(a, b) <= 2**-18 for a, b in zip(first, want, strict=True))
    for _ in range(5):
        assert all(map(torch.equal, first, run("triton", torch.float32)))


def assert_beside_flash(q, k, v, cotangent, pattern, causal):
    """Errors of out, dq, dk and dv from fp64 are at most twice those of torch's flash attention."""

    def flash(q, k, v):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal).transpose(
                1, 2
            )

    def ours(backend, q, k, v):
        return dilated_attention(q, k, v, is_causal=causal, backend=backend, **pattern)

    is_dense = len(pattern["segment_lengths"]) == 1
    results = []
    for call, dtype in (
        (functools.partial(ours, "reference"), torch.float64),
        (flash if is_dense else functools.partial(ours, "sdpa"), torch.bfloat16),
        (functools.partial(ours, "triton"), torch.bfloat16),
    ):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = call(*leaves)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(dtype))))
    for name, want, base, got in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert relative_norm(got, want) <= 2 * relative_norm(base, want), name


ROWS, HEADS, WIDTH = 150, 2, 64
STRIDES = {
    "overlapping rows": (0, 1, ROWS, 1),
    "overlapping heads": (0, WIDTH, WIDTH // 2, 1),
    "a last stride of 2": (0, 2 * HEADS * WIDTH, 2 * WIDTH, 2),
    "a last stride of 0": (0, HEADS, 1, 0),
    "equal heads": (0, WIDTH, 0, 1),
    "equal rows": (0, 0, WIDTH, 1),
    "heads first": (0, WIDTH, ROWS * WIDTH, 1),
    "width first": (0, 1, ROWS * WIDTH, ROWS),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("which", ["q", "k", "v", "grad_out"])
@pytest.mark.parametrize("kind", STRIDES)
def test_strides_of_every_kind(kind, which, backend, dtype):
    """Of q, k, v and the gradient that comes in: the values decide, however they lie in memory."""
    shape, names = (1, ROWS, HEADS, WIDTH), ("q", "k", "v", "grad_out")
    memory = torch.randn(2 * ROWS * HEADS * WIDTH + 1, device="cuda", dtype=dtype)
    tensors = {name: torch.randn(shape, device="cuda", dtype=dtype) for name in names}
    for first in (0, 1):  # the second is not aligned to 16 bytes
        tensors[which] = memory.as_strided(shape, STRIDES[kind], first)

        def run(backend, tensors):
            leaves = [tensors[name].detach().requires_grad_() for name in names[:3]]
            out = dilated_attention(*leaves, **RAGGED, is_causal=True, backend=backend)
            return out.detach(), *torch.autograd.grad(out, leaves, tensors["grad_out"])

        exact = run("reference", {name: x.double() for name, x in tensors.items()})
        dense = run(backend, {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()})
        for got, same, want in zip(run(backend, tensors), dense, exact, strict=True):
            # What the same values give when they lie densely, twice; and no less than some roundings.
            allowed = 2 * float((same - want).abs().max()) + 8 * torch.finfo(dtype).eps * float(want.abs().max())
            assert float((got - want).abs().max()) <= allowed


def test_every_cuda_engine_is_used():
    half = torch.empty(1, 1, 1, 64, device="cuda", dtype=torch.float16)
    names = {torch_calls.name(half), torch_calls.name(half.float()), torch_calls.name(half.double())}
    assert names == {"cuda_flash", "cuda_efficient", "eager"}


def test_auto_takes_triton_and_says_why_not():
    problem = one_segment(1, 1, 1, 1.0)
    half = torch.empty(1, 1, 1, 64, device="cuda", dtype=torch.bfloat16)
    assert choose_backend(QKV(half, half, half), problem).backend == "triton"
    assert "float64" in choose_backend(QKV(*(half.double(),) * 3), problem).reason
    assert "detached" in choose_backend(QKV(half, half, half), replace(problem, mixing_gradient="detached")).reason
    wide, long = QKV(*(torch.empty(1, 1, 1, 256, device="cuda", dtype=torch.bfloat16),) * 3), 1 << 18
    on_hopper = torch.cuda.get_device_capability() == (9, 0)
    assert choose_backend(wide, one_segment(long, long, 1, 1.0)).backend == ("triton" if on_hopper else "sdpa")
    assert choose_backend(wide, one_segment(long, long, 1, 1.0), "triton").backend == "triton"


def qkv(n=4096, heads=4, width=64, dtype=torch.bfloat16, grad=True):
    return tuple(torch.randn(1, n, heads, width, device="cuda", dtype=dtype, requires_grad=grad) for _ in range(3))


@pytest.mark.parametrize("pattern", [ALIGNED, RAGGED])
@pytest.mark.parametrize("causal", [False, True])
def test_two_backwards_give_identical_bits(pattern, causal):
    q, k, v = qkv()
    cotangent = torch.randn_like(q)
    first, second = (
        torch.autograd.grad(dilated_attention(q, k, v, is_causal=causal, **pattern), (q, k, v), cotangent)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("pattern", [ALIGNED, RAGGED])
@pytest.mark.parametrize("cut", [1, 700, 2048, 3001])
def test_later_tokens_change_no_earlier_bit(pattern, cut):
    q, k, v = qkv(grad=False)
    results = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        early = dilated_attention(*leaves, is_causal=True, **pattern)[:, :cut]
        grads = torch.autograd.grad(early.float().sum(), leaves)
        results.append((early, *(g[:, :cut] for g in grads)))
        for x in (q, k, v):
            x[:, cut:] = 50 * torch.randn_like(x[:, cut:])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("pattern", [ALIGNED, RAGGED])
@pytest.mark.parametrize("causal", [False, True])
def test_cuda_graph_capture_and_replay(pattern, causal):
    q, k, v = qkv(grad=False)
    call = functools.partial(dilated_attention, is_causal=causal, **pattern)
    for _ in range(2):
        call(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(q, k, v)
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, call(q, k, v))


@pytest.mark.parametrize("causal", [False, True])
def test_compiles_without_a_graph_break(causal):
    q, k, v = qkv()
    call = functools.partial(dilated_attention, is_causal=causal, **ALIGNED)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), call(q, k, v))
    compiled(q, k, v).float().sum().backward()
    assert torch.isfinite(q.grad).all()


def test_opcheck():
    q, k, v = qkv(n=200)
    arguments = (q, k, v, None, None, None, None, [64, 128], [1, 2], "modulo", True, 0.125, 0.0, 0, 0, 200, "exact")
    torch.library.opcheck(torch.ops.dilated_attention_pytorch.attention, (*arguments, "none", "triton"))


def test_offsets_past_two_to_the_thirty_one():
    """A packed QKV of more than 2^31 elements: the last rows are as right as the first."""
    n, heads, width = 360_000, 32, 64
    qkv_packed = torch.randn(1, n, 3, heads, width, device="cuda", dtype=torch.bfloat16)
    assert qkv_packed.numel() > 2**31
    q, k, v = qkv_packed.unbind(2)
    pattern = {"segment_lengths": [256, 1000], "dilation_rates": [1, 4]}
    out = dilated_attention(q, k, v, **pattern)
    tail = 359_000  # a multiple of 1000 is not one of 256, so compare from the next common start on
    start = tail // 32_000 * 32_000
    want = dilated_attention(*(x[:, start:] for x in (q, k, v)), **pattern)
    assert torch.equal(out[:, start:], want)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_peak_memory(causal, backward):
    """Forward: out, lse and 64 MiB. With the backward: the gradients, a delta row and 5% of it all."""
    n, heads, width = 262_144, 12, 64
    q, k, v = qkv(n, heads, width)
    cotangent = torch.randn_like(q)
    pattern = {"segment_lengths": [2048, 4096, 8192, 16384, 32768], "dilation_rates": [1, 2, 4, 8, 16]}

    def run():
        out = dilated_attention(q, k, v, is_causal=causal, **pattern)
        return torch.autograd.grad(out, (q, k, v), cotangent) if backward else out

    run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = run()
    added = torch.cuda.max_memory_allocated() - before
    one, row = n * heads * width * 2, n * heads * 4
    if backward:
        inputs = 4 * one  # q, k, v and the cotangent, allocated before
        assert added + inputs <= 1.05 * (inputs + one + row + 3 * one + row), added
    else:
        assert added <= one + row + 64 * 2**20, added
    del kept


def test_lse_is_that_of_the_reference():
    q, k, v = qkv(n=3000, grad=False)
    got = dilated_attention_with_lse(q, k, v, is_causal=True, **RAGGED).lse
    want = dilated_attention_with_lse(*(x.double() for x in (q, k, v)), is_causal=True, backend="reference", **RAGGED)
    assert relative_norm(got, want.lse) < 1e-4


def test_selective_checkpointing_keeps_the_op(monkeypatch):
    """A policy that names the op spares its second run, and the gradients stay the same bits."""
    from dilated_attention_pytorch.kernels.triton import backend

    op, runs, run = torch.ops.dilated_attention_pytorch.attention.default, [], backend.forward
    monkeypatch.setattr(backend, "forward", lambda *args, **kwargs: runs.append(1) or run(*args, **kwargs))
    q, k, v = (torch.randn(1, 4096, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def gradients(saved):
        runs.clear()

        def policy(context, func, *args, **kwargs):
            return saved if func is op else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        out = checkpoint(lambda *x: dilated_attention(*x, **ALIGNED), q, k, v, use_reentrant=False, context_fn=contexts)
        grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
        return len(runs), grads

    once, kept = gradients(CheckpointPolicy.MUST_SAVE)
    twice, recomputed = gradients(CheckpointPolicy.PREFER_RECOMPUTE)
    assert (once, twice) == (1, 2)
    for a, b in zip(kept, recomputed, strict=True):
        assert torch.equal(a, b)


def test_fsdp2_mixed_precision(tmp_path):
    """Parameters in fp32, compute in bf16: what a module in bf16 gives, with fp32 gradients."""
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    def module():
        torch.manual_seed(0)
        return MultiheadDilatedAttention(256, 4, backend="triton", device="cuda", **ALIGNED)

    x = torch.randn(1, 2048, 256, device="cuda", dtype=torch.bfloat16)
    plain = module().bfloat16()
    want = plain(x, x, x, is_causal=True)[0]
    want.float().square().sum().backward()
    dist.init_process_group("nccl", f"file://{tmp_path}/store", rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        sharded = module()
        fully_shard(sharded, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
        got = sharded(x, x, x, is_causal=True)[0]
        assert got.dtype == torch.bfloat16 and torch.equal(got, want)
        got.float().square().sum().backward()
        for ours, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
            grad = ours.grad.full_tensor()
            assert grad.dtype == torch.float32
            torch.testing.assert_close(grad, theirs.grad.float(), rtol=0, atol=0)
    finally:
        dist.destroy_process_group()


def test_a_known_kind_takes_the_kernels_directly(monkeypatch):
    """The second call skips validation and dispatch, and gives the same bits."""
    q, k, v = (torch.randn(1, 4096, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    first = dilated_attention_with_lse(q, k, v, **ALIGNED)
    monkeypatch.setattr(ops, "attention", None)
    second = dilated_attention_with_lse(q, k, v, **ALIGNED)
    assert torch.equal(first.out, second.out) and torch.equal(first.lse, second.lse)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_shard_equals_its_part(rank, causal):
    """The queries of a shard over its own keys, counted from its start, and over keys of another length."""
    n, whole = 4096, 16384
    pattern = {"segment_lengths": [512, 1024, whole], "dilation_rates": [1, 2, 8]}
    q, k, v = (torch.randn(1, n, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    options = {**pattern, "q_start": rank * n, "k_start": rank * n, "seq_len": whole, "is_causal": causal}
    got = dilated_attention_with_lse(q, k, v, backend="triton", **options)
    want = dilated_attention_with_lse(q.double(), k.double(), v.double(), backend="sdpa", **options)
    plain = dilated_attention_with_lse(q, k, v, backend="sdpa", **options)
    assert relative_norm(got.out, want.out) <= 2 * relative_norm(plain.out, want.out)
    assert relative_norm(got.lse, want.lse) <= 1e-5
