"""The forward kernels for Hopper where there is none: run by `gluon_emulator`, in fp32, against the reference."""

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
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_out_and_lse(monkeypatch, case, causal):
    """Programs that take several tiles each."""
    batch, n, heads, kv_heads, width, lengths, rates = case
    pattern = DilatedPattern(lengths, rates, kv_heads)
    problem = Problem(pattern, causal, width**-0.5, 0.0, 0, 0, n, "exact", "none")
    q, k, v = (torch.randn(batch, n, h, width) for h in (heads, kv_heads, kv_heads))
    want = reference.attention(q.double(), k.double(), v.double(), problem)
    plain = reference.attention(q, k, v, problem)
    monkeypatch.setattr(launch, "programs_on", lambda _: 3)
    monkeypatch.setitem(views._TYPES, torch.float32, gl.float32)
    work = prepare(QKV(q, k, v), problem, NO_MASKS)
    with gluon_emulator.emulating():
        got = launch.forward(work, Tape(), *launch.configs_for(work))
    # Rounding a logit moves its weight by as much, relatively.
    logit = float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) * width**-0.5
    allowed = (2 + logit) * torch.finfo(torch.float32).eps
    for ours, exact, theirs in zip(got, want, plain, strict=True):
        assert relative_norm(ours, exact) <= 2 * relative_norm(theirs, exact) + allowed
