"""The sdpa backend against the reference: more than two thousand drawn calls in fp64, and half precision."""

import itertools
import sys
import tracemalloc

import pytest
import torch
from cases import MODES, Case, cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dilated_attention_pytorch import dilated_attention
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels.sdpa import backend as sdpa_backend
from dilated_attention_pytorch.kernels.sdpa import torch_calls
from dilated_attention_pytorch.kernels.sdpa.pieces import pieces
from dilated_attention_pytorch.testing import relative_norm


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=270, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_equals_the_reference(mode, data):
    case = data.draw(cases(mode))
    want = case.run("reference")
    errors = case.errors(case.run("sdpa"), want)
    assert max(errors.values()) <= 1e-10, errors


@pytest.mark.parametrize("causal", [False, True])
def test_every_range_of_a_short_segment(causal):
    """All ways in which queries [a, b) can lie against keys [c, d) of five positions, in one and in two branches."""
    ranges = [(a, b) for a in range(5) for b in range(a + 1, 6)]
    for (a, b), (c, d) in itertools.product(ranges, ranges):
        for lengths, rates in (([5], [1]), ([5, 3], [1, 1])):
            options = {"segment_lengths": lengths, "dilation_rates": rates, "is_causal": causal}
            case = Case((1, b - a, 1, 2), (1, d - c, 1, 2), options | {"q_start": a, "k_start": c, "seq_len": 5})
            want = case.run("reference")
            errors = case.errors(case.run("sdpa"), want)
            assert max(errors.values()) <= 1e-10, (a, b, c, d, errors)


@pytest.mark.parametrize("scale", [0.0, -0.4, -3, 5e-324, -5e-324])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("engine", ["flash", "eager"])
def test_scales_that_are_not_above_zero(scale, causal, engine):
    """torch's kernels hide later keys before they scale, which made NaN of them."""
    options = {"segment_lengths": [32, 100], "dilation_rates": [1, 3], "is_causal": causal, "scale": scale}
    options["key_padding_mask"] = torch.arange(70).expand(2, -1) % 5 > 0
    case = Case((2, 70, 4, 8), (2, 70, 2, 8), options, uses_lse=engine == "eager")
    want = case.run("reference")
    errors = case.errors(case.run("sdpa"), want)
    assert max(errors.values()) <= 1e-10, errors


@pytest.mark.parametrize("rate", [2**61, 2**62])  # times a stride of 4: beyond an int, and beyond all of its bits
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"padding": "zero_keys"}], ids=str)
def test_lengths_and_rates_as_long_as_an_int(options, rate):
    """No segment and no slot comes after the first, so the step to it is never taken."""
    options = options | {"segment_lengths": [8, sys.maxsize, 40], "dilation_rates": [1, 2, rate]}
    case = Case((2, 40, 2, 4), (2, 40, 2, 4), options)
    want = case.run("reference")
    errors = case.errors(case.run("sdpa"), want)
    assert max(errors.values()) <= 1e-10, errors


def test_eager_tiles_equal_one_tile(monkeypatch):
    """The eager engine cuts long calls; tiny tiles exercise every cut."""
    options = {"segment_lengths": [16, 40], "dilation_rates": [1, 3], "dropout_p": 0.3, "seed": 5, "is_causal": True}
    case = Case((2, 40, 4, 4), (2, 40, 2, 4), options, 0, True)
    whole = case.run("sdpa")
    for size in (1, 50, 700):
        monkeypatch.setattr(torch_calls, "_TILE_ELEMENTS", size)
        errors = case.errors(case.run("sdpa"), whole)
        assert max(errors.values()) <= 1e-13, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
def test_low_precision_is_as_good_as_the_reference(dtype, causal):
    """At most twice the error that the reference makes in the same dtype, both against fp64 on the same inputs."""
    options = {"segment_lengths": [32, 100], "dilation_rates": [1, 3], "is_causal": causal}
    case = Case((2, 130, 6, 16), (2, 130, 3, 16), options)
    rounded = tuple(x.to(dtype).double() for x in case.tensors(torch.float64))
    case.tensors = lambda target, device="cpu": tuple(x.to(device, target, copy=True) for x in rounded)
    truth = case.run("reference")
    ours, plain = case.run("sdpa", dtype), case.run("reference", dtype)
    ours_error, plain_error = case.errors(ours, truth), case.errors(plain, truth)
    # fp32 as plain torch computes it in another order: a few ulps either way are no fault.
    floor = 4 * torch.finfo(torch.float32).eps
    plain_error["lse"] = max(plain_error["lse"], flash_lse_error(dtype, causal))
    for name, error in ours_error.items():
        assert error <= 2 * plain_error[name] + floor, (name, error, plain_error[name])


def flash_lse_error(dtype, causal):
    """Of torch's own kernel on segments as long. In half precision AVX-512 has a faster formula for exponentials."""
    q, k, v = (torch.randn(16, 2, 32, 16, generator=torch.Generator().manual_seed(0)).to(dtype) for _ in range(3))
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    logits = q.double() @ k.double().mT / 4
    hidden = torch.ones(32, 32, dtype=torch.bool).triu(1) if causal else torch.zeros(32, 32, dtype=torch.bool)
    return relative_norm(lse, logits.masked_fill(hidden, float("-inf")).logsumexp(-1))


def test_any_strides():
    """Views of a packed QKV, transposed heads, an expanded upstream gradient: the same numbers."""
    qkv = torch.randn(2, 33, 3, 4, 8, dtype=torch.float64)
    views = [x.requires_grad_() for x in (qkv[:, :, i].detach() for i in range(3))]
    heads_first = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in views]
    plain = [x.detach().clone().requires_grad_() for x in views]
    results = []
    for q, k, v in (views, heads_first, plain):
        out = dilated_attention(q, k, v, segment_lengths=[8, 20], dilation_rates=[1, 2], is_causal=True)
        results.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    for other in results[:2]:
        for got, want in zip(other, results[2], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("causal", [False, True])
def test_inputs_and_rows_without_keys_stay_untouched(causal):
    """Rate 4 with one head covers every fourth row; the rest are 0 with lse -inf and no gradient."""
    q, k, v = (torch.randn(1, 30, 1, 4, requires_grad=True) for _ in range(3))
    before = [x.detach().clone() for x in (q, k, v)]
    out = dilated_attention(q, k, v, segment_lengths=[15], dilation_rates=[4], is_causal=causal)
    out.square().sum().backward()
    covered = (torch.arange(30) % 15) % 4 == 0
    assert out[:, ~covered].count_nonzero() == 0
    for x, old in zip((q, k, v), before, strict=True):
        assert torch.equal(x, old)
        assert torch.isfinite(x.grad).all()
        assert x.grad[:, ~covered].count_nonzero() == 0


@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (2, 0, 2, 4)])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_empty_inputs_give_empty_outputs(shape, backend):
    q = torch.randn(shape, requires_grad=True)
    out = dilated_attention(q, q, q, segment_lengths=[4], dilation_rates=[2], backend=backend)
    out.sum().backward()
    assert out.shape == q.shape == q.grad.shape


def test_half_precision_runs_in_fp32_on_a_cpu_without_amx(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert torch_calls.compute_dtype(cpu, torch.bfloat16) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert torch_calls.compute_dtype(cpu, torch.bfloat16) == torch.bfloat16
    assert torch_calls.compute_dtype(cpu, torch.float64) == torch.float64


N, H, D = 37, 2, 8
STRIDES = {
    "overlapping rows": lambda: torch.randn(N + D - 1).unfold(0, D, 1)[None, :, None],
    "overlapping heads": lambda: torch.randn(N * D + D).as_strided((1, N, H, D), (0, D, 4, 1)),
    "a last stride of 2": lambda: torch.randn(1, N, H, 2 * D)[..., ::2],
    "a last stride of 0": lambda: torch.randn(1, N, H, 1).expand(1, N, H, D),
    "equal heads": lambda: torch.randn(1, N, 1, D).expand(1, N, H, D),
    "width first": lambda: torch.randn(1, H, D, N).permute(0, 3, 1, 2),
    "heads first": lambda: torch.randn(1, H, N, D).transpose(1, 2),
    "rows backwards in memory": lambda: torch.randn(D, H, N, 1).permute(3, 2, 1, 0),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", [([64], [1]), ([16], [1]), ([16, 48], [1, 3])], ids=str)
@pytest.mark.parametrize("which", ["q", "k", "v", "grad_out"])
@pytest.mark.parametrize("kind", STRIDES)
def test_strides_of_every_kind(kind, which, pattern, dtype):
    """Of q, k, v and the gradient that comes in: the values decide, however they lie in memory.

    torch's CPU kernel gives its output q's strides. Where rows of q overlap it wrote rows of the result over others.
    """
    options = {"segment_lengths": pattern[0], "dilation_rates": pattern[1], "is_causal": True}
    odd = STRIDES[kind]().to(dtype)
    if kind.startswith("overlapping") and dtype != torch.float64:  # a conversion made it dense
        odd = torch.empty(4096, dtype=dtype).copy_(torch.randn(4096)).as_strided(odd.shape, STRIDES[kind]().stride())
    names = ("q", "k", "v", "grad_out")
    tensors = {name: torch.randn(odd.shape).to(dtype) for name in names} | {which: odd}

    def run(backend, tensors):
        leaves = [tensors[name].detach().requires_grad_() for name in names[:3]]
        out = dilated_attention(*leaves, **options, backend=backend)
        return out.detach(), *torch.autograd.grad(out, leaves, tensors["grad_out"])

    exact = run("reference", {name: x.double() for name, x in tensors.items()})
    dense = run("sdpa", {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()})
    for got, same, want in zip(run("sdpa", tensors), dense, exact, strict=True):
        # What the same values give when they lie densely, twice; and no less than some roundings.
        allowed = 2 * float((same - want).abs().max()) + 8 * torch.finfo(dtype).eps * float(want.abs().max())
        assert float((got - want).abs().max()) <= allowed


@pytest.mark.parametrize("kind", STRIDES)
def test_only_what_torch_cannot_take_is_copied(kind):
    x = STRIDES[kind]()
    assert (sdpa_backend._ready(x) is x) == (kind in ("heads first", "equal heads"))


def test_rows_that_cuda_kernels_cannot_load_are_copied():
    memory = torch.randn(4096).bfloat16()
    shape = 1, H, N, 16
    for strides, first, fits in [
        ((0, 16, 32, 1), 0, True),
        ((0, 16, 32, 1), 8, True),  # 16 bytes on
        ((3, 16, 32, 1), 0, True),  # a dimension of size 1 is not walked
        ((0, 16, 32, 1), 1, False),
        ((0, 16, 36, 1), 0, False),
        ((0, 4, 32, 1), 0, False),
        ((0, 16, 32, 2), 0, False),
    ]:
        x = memory.as_strided(shape, strides, first)
        loadable = torch_calls.loadable(x)
        assert (loadable is x) == fits and torch.equal(loadable, x)
        assert loadable.data_ptr() % 16 == 0 and loadable.stride(-1) == 1


def test_plans_of_many_lengths_take_bounded_memory():
    """As decoding or packed sequences bring them; 1,024 plans of 64 heads once stayed."""
    pattern = DilatedPattern((64, 512, 4096), (1, 16, 64), 64)
    pieces.cache_clear()
    tracemalloc.start()
    try:
        for n in range(100_000, 100_008):
            assert len(pieces(Problem(pattern, True, 0.1, seq_len=n), n, n)) > 150
        held = tracemalloc.get_traced_memory()[0] / 8
    finally:
        tracemalloc.stop()
    assert held * pieces.cache_info().maxsize < 64 << 20
