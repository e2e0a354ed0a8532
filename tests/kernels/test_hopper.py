"""The forward kernels for Hopper on an H100 or H200: against fp64, and against the Triton kernels that are their twins.

python -m pytest tests/kernels/test_hopper.py          # about a minute
"""

import functools
import math
import random

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("no Hopper GPU", allow_module_level=True)

from dilated_attention_pytorch import dilated_attention, dilated_attention_with_lse
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels.triton import backend, launch_aligned, launch_branches
from dilated_attention_pytorch.kernels.triton.hopper import launch, support
from dilated_attention_pytorch.kernels.triton.replay import Tape
from dilated_attention_pytorch.kernels.triton.work import Work
from dilated_attention_pytorch.testing import relative_norm
from dilated_attention_pytorch.types import NO_MASKS, QKV

pytestmark = pytest.mark.gpu

PAPER = {"segment_lengths": [2048, 4096, 8192, 16384, 32768], "dilation_rates": [1, 2, 4, 8, 16]}


@pytest.fixture(autouse=True)
def long_enough(monkeypatch):
    """Short calls take them too."""
    monkeypatch.setattr(support, "_SHORT", {})
    monkeypatch.setattr(support, "_WASTE", 1.0)


def draw(seed):
    """(lengths, rates, N, batch, heads, key heads, D, dtype, causal) that the kernels take."""
    chance = random.Random(seed)
    causal = seed % 2 == 1
    rates = [1]
    branches = chance.randint(1, 5)
    while len(rates) < branches and rates[-1] < 16:
        rates.append(rates[-1] * chance.choice([1, 2, 2, 3, 4]))
    lengths = [128 * rates[-1] * chance.randint(1, 2)]
    while len(lengths) < len(rates):
        lengths.append(lengths[-1] * chance.choice([1, 2, 2, 3]))
    n = chance.randint(max(lengths[0] + rates[-1], 128 * rates[-1]), max(12_000, 2 * lengths[0]))
    if chance.random() < 0.3:
        n = 128 * rates[-1] * (n // (128 * rates[-1]) + 1)
    kv_heads = chance.randint(1, 3)
    heads = kv_heads * chance.choice([1, 1, 2, 4])
    dtype = chance.choice([torch.bfloat16, torch.float16])
    return lengths, rates, n, chance.randint(1, 2), heads, kv_heads, chance.choice([64, 128]), dtype, causal


def tensors(batch, n, heads, kv_heads, width, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return QKV(
        *(
            torch.randn(batch, n, h, width, device="cuda", generator=generator).to(dtype)
            for h in (heads, kv_heads, kv_heads)
        )
    )


def work_of(x, lengths, rates, causal):
    n, width = x.q.shape[1], x.q.shape[3]
    pattern = DilatedPattern(lengths, rates, x.k.shape[2])
    return Work(x, Problem(pattern, causal, width**-0.5, 0.0, 0, 0, n, "exact", "none"), NO_MASKS)


def hopper(work):
    return launch.forward(work, Tape(), *launch.configs_for(work))


def twin(work):
    family = launch_branches if launch_aligned.why_not(work, "forward") else launch_aligned
    return family.forward(work, Tape(), *family.configs_for(work, "forward"))


@pytest.mark.parametrize("seed", range(60))
def test_drawn_calls(seed):
    lengths, rates, n, batch, heads, kv_heads, width, dtype, causal = draw(seed)
    x = tensors(batch, n, heads, kv_heads, width, dtype, seed)
    work = work_of(x, lengths, rates, causal)
    assert support.why_not(work) == []
    got, other = hopper(work), twin(work)
    pattern = {"segment_lengths": lengths, "dilation_rates": rates, "is_causal": causal, "backend": "sdpa"}
    want = dilated_attention_with_lse(*(y.double() for y in x), **pattern)
    assert torch.isfinite(got.out).all() and torch.isfinite(got.lse).all()
    ours, theirs = relative_norm(got.out, want.out), relative_norm(other.out, want.out)
    # Both round P and out once; the twin that goes branch by branch rounds out oftener.
    assert ours <= 1.1 * theirs, (ours, theirs)
    assert relative_norm(got.lse, want.lse) <= 1e-6
    again = hopper(work)
    assert torch.equal(got.out, again.out) and torch.equal(got.lse, again.lse)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_the_paper_s_pattern_at_length(causal, width):
    """Every level and ring, against the twin."""
    x = tensors(1, 1 << 16, 2, 2, width)
    got = dilated_attention_with_lse(*x, **PAPER, is_causal=causal)
    want = twin(work_of(x, *PAPER.values(), causal))
    assert relative_norm(got.out, want.out) <= 2 * torch.finfo(torch.bfloat16).eps
    assert relative_norm(got.lse, want.lse) <= 1e-6


@pytest.mark.parametrize("causal", [False, True])
def test_auto_takes_them_and_trains(causal, monkeypatch):
    runs, run = [], launch.forward
    monkeypatch.setattr(launch, "forward", lambda *args: runs.append(1) or run(*args))
    # A length of its own: a tape of the same kind would not come here.
    x = QKV(*(y.requires_grad_() for y in tensors(1, 24_576, 3, 3, 64)))
    out = dilated_attention(*x, **PAPER, is_causal=causal)
    assert runs == [1]
    cotangent = torch.randn_like(out)
    got = torch.autograd.grad(out, x, cotangent)
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [y.detach().to(dtype).requires_grad_() for y in x]
        plain = dilated_attention(*leaves, **PAPER, is_causal=causal, backend="sdpa")
        results.append(torch.autograd.grad(plain, leaves, cotangent.to(dtype)))
    for name, ours, want, base in zip("qkv", got, *results, strict=True):
        assert relative_norm(ours, want) <= 2 * relative_norm(base, want), name


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("growth", [-3.0, 0.1, 3.0, 30.0])
def test_logits_that_grow_along_the_sequence(growth, causal, width):
    """By so many powers of two per 64 keys: a running maximum that moves never, seldom, or with every block."""
    x, n = tensors(1, 4096, 1, 1, width), 4096
    x.q[..., 0] = 4.0
    x.k[..., 0] = growth * math.log(2) / 64 * torch.arange(n, device="cuda").view(1, n, 1) / (4.0 * width**-0.5)
    work = work_of(x, (1024, 4096), (1, 2), causal)
    got, other = hopper(work), twin(work)
    pattern = {"segment_lengths": (1024, 4096), "dilation_rates": (1, 2), "is_causal": causal, "backend": "sdpa"}
    want = dilated_attention_with_lse(*(y.double() for y in x), **pattern)
    assert relative_norm(got.out, want.out) <= 2 * relative_norm(other.out, want.out)
    assert relative_norm(got.lse, want.lse) <= 1e-6


@pytest.mark.parametrize("cut", [1, 700, 2048, 3001, 20_001])
@pytest.mark.parametrize("width", [64, 128])
def test_later_tokens_change_no_earlier_bit(cut, width):
    x = tensors(1, 32_768, 2, 2, width)
    work = work_of(x, *PAPER.values(), True)
    before = hopper(work).out[:, :cut].clone()
    for y in x:
        y[:, cut:] = 50 * torch.randn_like(y[:, cut:])
    assert torch.equal(hopper(work).out[:, :cut], before)


@pytest.mark.parametrize("causal", [False, True])
def test_cuda_graph_and_tape(causal):
    """A second call plays the tape, a third is captured; both give what a first call gives."""
    x = tensors(1, 40_000, 2, 2, 64)
    call = functools.partial(dilated_attention, is_causal=causal, **PAPER)
    first = call(*x)
    assert torch.equal(first, call(*x))
    other = QKV(*(torch.randn_like(y) for y in x))
    want = hopper(work_of(other, *PAPER.values(), causal)).out
    assert torch.equal(call(*other), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*x)
    for y, z in zip(x, other, strict=True):
        y.copy_(z)
    graph.replay()
    assert torch.equal(out, want)


@pytest.mark.parametrize("causal", [False, True])
def test_strided_inputs(causal):
    """Packed QKV, heads before rows, and a batch that is one row repeated: read where they lie."""
    packed = torch.randn(2, 16_384, 3, 2, 64, device="cuda", dtype=torch.bfloat16)
    heads_first = [torch.randn(2, 2, 16_384, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]
    repeated = [torch.randn(1, 16_384, 2, 64, device="cuda", dtype=torch.bfloat16).expand(2, -1, -1, -1)] * 3
    for x in (packed.unbind(2), heads_first, repeated):
        lengths, rates = [2048, 8192], [1, 4]
        got = hopper(work_of(QKV(*x), lengths, rates, causal))
        want = hopper(work_of(QKV(*(y.contiguous() for y in x)), lengths, rates, causal))
        assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse)


@pytest.mark.parametrize("causal", [False, True])
def test_offsets_past_two_to_the_thirty_one(causal):
    """A packed QKV of more than 2^31 elements: the last segments are as right as the first."""
    packed = torch.randn(1, 368_640, 3, 32, 64, device="cuda", dtype=torch.bfloat16)
    assert packed.numel() > 1 << 31
    x = QKV(*packed.unbind(2))
    lengths, rates = [2048, 8192], [1, 4]
    start = 368_640 - 8192
    got = hopper(work_of(x, lengths, rates, causal))
    want = hopper(work_of(QKV(*(y[:, start:] for y in x)), lengths, rates, causal))
    assert torch.equal(got.out[:, start:], want.out) and torch.equal(got.lse[:, :, start:], want.lse)


def test_choice_says_why_not():
    x = tensors(1, 32_768, 2, 2, 64)
    lengths, rates = PAPER.values()
    assert backend.choose(work_of(x, lengths, rates, True), "forward").family is launch
    assert "straddles" in support.why_not(work_of(x, [1024, 4096], [1, 16], True))[0]
    assert "nest" in support.why_not(work_of(x, [2048, 6144, 8192], [1, 2, 4], False))[0]
