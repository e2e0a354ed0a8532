"""The Gluon kernels for Hopper where there is none: run by `gluon_emulator`, in fp32, against the reference in fp64."""

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
from dilated_attention_pytorch.kernels.triton.hopper import launch, launch_backward, views
from dilated_attention_pytorch.kernels.triton.replay import Tape
from dilated_attention_pytorch.kernels.triton.work import prepare
from dilated_attention_pytorch.testing import relative_norm
from dilated_attention_pytorch.types import NO_MASKS, QKV, AttentionOutput, OutputGradient

WIDTH = 64
# Batch, tokens, heads, key heads, lengths, rates: some skip, some repeat; groups; segments and blocks cut short.
CASES = [
    (1, 1024, 2, 1, (256, 512, 1024), (1, 2, 2)),
    (1, 1536, 2, 2, (512, 1024), (1, 4)),
    (2, 1151, 1, 1, (384, 1152), (1, 3)),
    (1, 768, 2, 1, (256, 1 << 20), (1, 2)),
    (2, 1001, 2, 1, (256, 512), (1, 2)),
    (1, 901, 1, 1, (256, 768), (1, 2)),
]


def call(case, causal):
    """Inputs, cotangents of out and lse, the problem, and the reference in a dtype: out, lse and gradients."""
    batch, n, heads, kv_heads, lengths, rates = case
    problem = Problem(
        DilatedPattern(lengths, rates, kv_heads, "modulo"), causal, WIDTH**-0.5, 0.0, 0, 0, n, "exact", "none"
    )
    q, k, v, grad_out = (torch.randn(batch, n, h, WIDTH) for h in (heads, kv_heads, kv_heads, heads))
    grad_lse = torch.randn(batch, heads, n)

    def oracle(dtype):
        x = [y.to(dtype).requires_grad_() for y in (q, k, v)]
        out, lse = reference.attention(*x, problem)
        total = (out * grad_out.to(dtype)).sum() + (lse * grad_lse.to(dtype)).sum()
        return AttentionOutput(out.detach(), lse.detach()), torch.autograd.grad(total, x)

    return QKV(q, k, v), OutputGradient(grad_out, grad_lse), problem, oracle


def run(monkeypatch, x, grad, saved, problem):
    """dq, dk and dv, by few programs with several tiles each."""
    monkeypatch.setattr(launch, "programs_on", lambda _: 3)
    monkeypatch.setitem(views._TYPES, torch.float32, gl.float32)
    work, saved = prepare(x, problem, NO_MASKS), AttentionOutput(*(y.float() for y in saved))
    with gluon_emulator.emulating():
        return launch_backward.backward(work, grad, saved, Tape(), *launch_backward.configs_for(work))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(monkeypatch, case, causal):
    x, grad, problem, oracle = call(case, causal)
    saved, exact = oracle(torch.float64)
    ours = run(monkeypatch, x, grad, saved, problem)
    # Rounding a logit moves its weight by as much, relatively.
    logit = float(x.q.norm(dim=-1).max() * x.k.norm(dim=-1).max()) * WIDTH**-0.5
    allowed = (2 + logit) * torch.finfo(torch.float32).eps
    for name, got, want, plain in zip(("dq", "dk", "dv"), ours, exact, oracle(torch.float32)[1], strict=True):
        assert relative_norm(got, want) <= 2 * relative_norm(plain, want) + allowed, name


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_with_the_pair_in_registers(monkeypatch, causal):
    """In both passes; by default only dK and dV keep it there, at D=64."""
    in_registers = tuple(config._replace(registers=True) for config in launch_backward._CONFIGS[WIDTH, causal])
    monkeypatch.setitem(launch_backward._CONFIGS, (WIDTH, causal), in_registers)
    for case in (CASES[0], CASES[4]):
        test_gradients(monkeypatch, case, causal)


def test_the_emulator_sees_what_goes_wrong(monkeypatch):
    """A slot that nobody gives back is a deadlock, and without barriers nothing comes out right."""
    x, grad, problem, oracle = call(CASES[0], False)
    saved, exact = oracle(torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(gluon_emulator, "DEADLOCK", 1.0)
        patch.setattr(gluon_emulator._BARRIERS, "arrive", lambda *_, **__: None)
        with pytest.raises(RuntimeError, match="deadlock"):
            run(patch, x, grad, saved, problem)
    with monkeypatch.context() as patch:
        for name in ("arrive", "expect", "wait"):
            patch.setattr(gluon_emulator._BARRIERS, name, lambda *_, **__: None)
        for got, want in zip(run(patch, x, grad, saved, problem), exact, strict=True):
            assert not relative_norm(got, want) < 0.1


def test_strides_of_columns_fit_into_32_bits():
    """A coordinate of the copy engine has 32 bits, so no stride that has more may enter one, not even times 0."""
    packed = torch.empty(1, 368_640, 3, 32, 64, device="meta")
    for x in (*packed.unbind(2), torch.empty(1, 1, 1 << 26, 64, device="meta").transpose(1, 2)):
        assert max(x.stride()) >= 1 << 31
        (found,) = views.column_strides(x)
        assert max(found) < 1 << 31
        assert all(a == b or x.shape[i] == 1 for i, (a, b) in enumerate(zip(found, x.stride(), strict=False)))
