"""The backward of one branch on Hopper where there is none: run by `gluon_emulator`, in fp32, beside fp64."""

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
from dilated_attention_pytorch.kernels.triton import launch_branches
from dilated_attention_pytorch.kernels.triton.hopper import branch_tiles, launch, launch_branch, support, views
from dilated_attention_pytorch.kernels.triton.replay import Tape
from dilated_attention_pytorch.kernels.triton.work import prepare
from dilated_attention_pytorch.testing import relative_norm
from dilated_attention_pytorch.types import NO_MASKS, QKV, AttentionOutput, OutputGradient

# Batch, tokens, heads, key heads, width, lengths, rates, offsets: lengths that no rate divides, segments cut by the
# end, residues longer than others, segments without a slot of some heads, widths that fill no tile, groups.
CASES = [
    (1, 700, 2, 2, 48, (300, 701), (1, 2), "blocked"),
    (2, 901, 2, 1, 40, (257, 900), (1, 3), "modulo"),
    (1, 1000, 4, 2, 80, (290, 1000), (1, 3), "blocked"),
    (1, 653, 3, 3, 64, (320, 640), (1, 2), "modulo"),
    (1, 540, 2, 2, 96, (266, 533), (2, 2), "modulo"),
    (1, 330, 1, 1, 192, (150, 330), (1, 2), "modulo"),
]


def run(monkeypatch, x, grad, saved, problem):
    """out, lse, dq, dk and dv, by few programs with several tiles each."""
    monkeypatch.setattr(launch, "programs_on", lambda _: 3)
    monkeypatch.setattr(support, "why_not_here", lambda device: [])
    monkeypatch.setattr(support, "_DTYPES", (torch.float32,))
    monkeypatch.setattr(support, "_FEW", dict.fromkeys(support._FEW, 5 * (64,)))
    monkeypatch.setattr(support, "_LITTLE", dict.fromkeys(support._LITTLE, 0))
    monkeypatch.setitem(views._TYPES, torch.float32, gl.float32)
    work = prepare(x, problem, NO_MASKS)
    for branch in problem.branch_order:
        for kernel in ("forward", "dq", *(["dkv"] if work.block_d < 256 else [])):
            assert support.why_not_branch(work, grad.out, branch, kernel) == []
    configs = {direction: launch_branches.configs_for(work, direction) for direction in ("forward", "backward")}
    with gluon_emulator.emulating():
        ours = launch_branches.forward(work, Tape(), *configs["forward"])
        return *ours, *launch_branches.backward(work, grad, saved, Tape(), *configs["backward"])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_out_lse_and_gradients(monkeypatch, case, causal):
    batch, n, heads, kv_heads, width, lengths, rates, offsets = case
    problem = Problem(
        DilatedPattern(lengths, rates, kv_heads, offsets), causal, width**-0.5, 0.0, 0, 0, n, "exact", "none"
    )
    # Slices of one tensor: strides that are no multiples of a row's.
    packed = torch.randn(batch, n, heads + 2 * kv_heads, width)
    q, k, v = packed.split([heads, kv_heads, kv_heads], 2)
    grad_out, grad_lse = torch.randn(batch, n, heads, width), torch.randn(batch, heads, n)

    def oracle(dtype):
        x = [y.to(dtype).requires_grad_() for y in (q, k, v)]
        out, lse = reference.attention(*x, problem)
        seen = lse > -torch.inf
        total = (out * grad_out.to(dtype)).sum() + torch.where(seen, lse * grad_lse.to(dtype), 0.0).sum()
        return AttentionOutput(out.detach(), lse.detach()), torch.autograd.grad(total, x)

    (out, lse), exact = oracle(torch.float64)
    saved = AttentionOutput(out.float(), lse.float())
    grad = OutputGradient(grad_out, torch.where(saved.lse > -torch.inf, grad_lse, 0.0))
    ours = run(monkeypatch, QKV(q, k, v), grad, saved, problem)
    assert torch.equal(ours[1] == -torch.inf, lse == -torch.inf)
    # Rounding a logit moves its weight by as much, relatively.
    logit = float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) * width**-0.5
    allowed = (2 + logit) * torch.finfo(torch.float32).eps
    plain, gradients = oracle(torch.float32)
    finite = lambda found: (found[0], found[1].clamp_min(-1e4), *found[2:])  # noqa: E731
    for name, got, want, near in zip(
        ("out", "lse", "dq", "dk", "dv"),
        finite(ours), finite((out, lse, *exact)), finite((*plain, *gradients)), strict=True,
    ):  # fmt: skip
        assert relative_norm(got, want) <= 2 * relative_norm(near, want) + allowed, name


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_wherever_the_pair_lies(monkeypatch, case, causal):
    """In registers in no pass or in both; where rows are narrower than a tile it stays in shared memory."""
    for registers in (False, True):
        for columns, pair in launch_branch._BACKWARD.items():
            chosen = tuple(x._replace(registers=registers) for x in pair)
            monkeypatch.setitem(launch_branch._BACKWARD, columns, chosen)
        test_out_lse_and_gradients(monkeypatch, case, causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("config", [*launch_branch._FORWARD[64, False], *launch_branch._FORWARD[64, True]], ids=str)
def test_tiles_of_two_and_three_groups(monkeypatch, config, causal):
    monkeypatch.setitem(launch_branch._FORWARD, (64, causal), (config,))
    test_out_lse_and_gradients(monkeypatch, CASES[3], causal)


def test_a_tile_has_the_groups_that_a_segment_fills():
    """Of 1,024 slots three groups leave 128 of 1,152 rows empty."""
    for slots, groups in ((1024, 2), (2048, 3), (2896, 3), (192, 3), (128, 2)):
        problem = Problem(DilatedPattern((slots,), (1,), 1), False, 0.125, 0.0, 0, 0, slots, "exact", "none")
        x = torch.zeros(1, slots, 1, 64)
        assert launch_branch.config_of(prepare(QKV(x, x, x), problem, NO_MASKS), 0).groups == groups, slots


@pytest.mark.parametrize(("n", "length", "rate", "heads"), [(45_681, 32_768, 4, 16), (262_144, 5792, 2, 16)])
def test_every_tile_once_and_programs_have_like_shares(n, length, rate, heads):
    """One of two segments is cut: a program that saw whole ones only had 1.76 times its share."""
    number, tile_of = gluon_emulator.Number, gluon_emulator.plain(branch_tiles.tile_of)
    segments, each = -(-n // length), -(-length // rate // 128)
    sizes = tuple(map(number, (2, heads, 1, segments, each, length, rate, n)))
    seen, cost = set(), [0] * 132
    for tile in range(2 * heads * segments * each):
        batch, head, _, segment, _, slots, first = tile_of(number(tile), sizes, False, True)
        seen.add((batch, head, segment, first))
        cost[tile % 132] += slots if first < slots else 0
    assert len(seen) == 2 * heads * segments * each
    assert max(cost) < 1.15 * sum(cost) / len(cost)
