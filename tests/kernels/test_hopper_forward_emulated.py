"""The forward kernels for Hopper where there is none: run by `gluon_emulator`, in fp32, against the reference."""

import math
import os

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("a GPU runs the kernels themselves", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
triton = pytest.importorskip("triton", minversion="3.6")
if type(triton.language.cdiv).__name__ != "InterpretedFunction":
    pytest.skip("Triton was imported before its interpreter was switched on", allow_module_level=True)

import gluon_emulator
from triton.experimental.gluon import language as gl

from dilated_attention_pytorch.core import reference
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels.triton.hopper import launch, views
from dilated_attention_pytorch.kernels.triton.replay import Tape
from dilated_attention_pytorch.kernels.triton.work import prepare
from dilated_attention_pytorch.testing import relative_norm
from dilated_attention_pytorch.types import NO_MASKS, QKV

# Batch, tokens, heads, key heads, width, lengths, rates.
CASES = [
    (1, 1024, 2, 1, 64, (256, 512, 1024), (1, 2, 2)),
    (1, 1536, 2, 2, 64, (512, 1024), (1, 4)),
    (1, 1603, 2, 1, 128, (512, 1024, 1 << 20), (1, 2, 4)),
    (2, 1153, 1, 1, 64, (384, 1152), (1, 3)),
    (2, 301, 2, 1, 128, (128,), (1,)),
    (1, 513, 1, 1, 64, (256, 512), (1, 2)),
    (1, 301, 2, 1, 64, (128,), (1,)),
    (1, 1000, 1, 1, 64, (384, 768), (1, 1)),
    (1, 1702, 2, 1, 64, (512, 1024, 1 << 20), (1, 2, 4)),
    (1, 2501, 1, 1, 64, (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16)),
]


def check(monkeypatch, x, problem):
    """Programs that take several tiles each, against fp64."""
    want = reference.attention(*(y.double() for y in x), problem)
    plain = reference.attention(*x, problem)
    monkeypatch.setattr(launch, "programs_on", lambda _: 3)
    monkeypatch.setitem(views._TYPES, torch.float32, gl.float32)
    work = prepare(x, problem, NO_MASKS)
    with gluon_emulator.emulating():
        got = launch.forward(work, Tape(), *launch.configs_for(work))
    # Rounding a logit moves its weight by as much, relatively.
    logit = float(x.q.norm(dim=-1).max() * x.k.norm(dim=-1).max()) * problem.scale
    allowed = (2 + logit) * torch.finfo(torch.float32).eps
    for ours, exact, theirs in zip(got, want, plain, strict=True):
        assert relative_norm(ours, exact) <= 2 * relative_norm(theirs, exact) + allowed


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_out_and_lse(monkeypatch, case, causal):
    batch, n, heads, kv_heads, width, lengths, rates = case
    pattern = DilatedPattern(lengths, rates, kv_heads)
    problem = Problem(pattern, causal, width**-0.5, 0.0, 0, 0, n, "exact", "none")
    check(monkeypatch, QKV(*(torch.randn(batch, n, h, width) for h in (heads, kv_heads, kv_heads))), problem)


@pytest.mark.parametrize("lengths, rates", [((768, 1536), (1, 2)), ((1 << 20,), (1,))])
def test_segments_longer_than_the_sequence(monkeypatch, lengths, rates):
    problem = Problem(DilatedPattern(lengths, rates, 1), False, 0.125, 0.0, 0, 0, 600, "exact", "none")
    check(monkeypatch, QKV(*(torch.randn(1, 600, 1, 64) for _ in range(3))), problem)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("growth", [-3.0, 0.1, 3.0, 30.0])
def test_logits_that_grow_along_the_sequence(monkeypatch, growth, width):
    """By so many powers of two per 64 keys: a running maximum that moves never, seldom, or with every block."""
    n = 1024
    problem = Problem(DilatedPattern((512, 1024), (1, 2), 1), True, width**-0.5, 0.0, 0, 0, n, "exact", "none")
    x = QKV(*(torch.randn(1, n, 1, width) for _ in range(3)))
    x.q[..., 0] = 4.0
    x.k[..., 0] = growth * math.log(2) / 64 * torch.arange(n).view(1, n, 1) / (4.0 * problem.scale)
    check(monkeypatch, x, problem)
