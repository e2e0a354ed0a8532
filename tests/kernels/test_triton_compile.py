"""Compiles the kernels for GPUs that need not be there and reads what the assembler says of them.

    python tests/kernels/test_triton_compile.py 86 --all    # every table, D = 64, 128, 256, bf16 and fp32

Each architecture is one subprocess: the interpreter's tests live in this one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from sass import lost_operands

if importlib.util.find_spec("triton") is None:  # not imported: the interpreter's switch is read then
    pytest.skip("Triton is not installed", allow_module_level=True)

SHARED_LIMIT = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 120: 101_376}
REGISTERS = 255
OF_THE_TABLES = "branch", "aligned", "decode", "hopper"  # what their kernels' names begin with
HALF, SINGLE = "bfloat16", "float32"
# (D, heads, dtype) that CI compiles: fp32 needs the most shared memory, checked where there is the least.
USUAL, WIDE = [(64, 12, HALF), (128, 6, HALF)], (256, 3, HALF)
CASES = {80: USUAL, 86: [(128, 6, HALF), WIDE, (128, 6, SINGLE), (256, 3, SINGLE)], 90: [*USUAL, WIDE]}
EVERY = [(d, 768 // d, dtype) for dtype in (HALF, SINGLE) for d in (64, 128, 256)]


def compile_all(capability: int, cases: list[tuple[int, int, str]]) -> list[dict]:
    """Prints one line of JSON per kernel of the tables."""
    import re
    import tempfile
    from dataclasses import replace
    from functools import cache
    from pathlib import Path

    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    from dilated_attention_pytorch.core.pattern import DilatedPattern
    from dilated_attention_pytorch.core.positions import Rotation
    from dilated_attention_pytorch.core.problem import Problem
    from dilated_attention_pytorch.kernels import decode_layout
    from dilated_attention_pytorch.kernels.triton import (
        configs,
        launch_aligned,
        launch_branches,
        launch_decode,
        launch_linear,
        query_terms,
    )
    from dilated_attention_pytorch.kernels.triton.hopper import launch as hopper
    from dilated_attention_pytorch.kernels.triton.hopper import launch_backward as hopper_backward
    from dilated_attention_pytorch.kernels.triton.hopper import launch_branch as hopper_branch
    from dilated_attention_pytorch.kernels.triton.replay import Tape
    from dilated_attention_pytorch.kernels.triton.work import Work
    from dilated_attention_pytorch.types import NO_MASKS, QKV, AttentionOutput, OutputGradient

    class NoGPU:
        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    driver.set_active(NoGPU())
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    original = jit.JITFunction.run

    @cache  # several launches make one binary, and reading it takes as long as many a compilation
    def read(cubin):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            return tuple(
                subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
                for flag in ("-res-usage", "-sass")
            )

    def run(self, *args, grid, warmup, **kwargs):
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        if not self.__name__.startswith(OF_THE_TABLES):
            return kernel
        usage, sass = read(kernel.asm["cubin"])
        report = {
            "kernel": self.__name__,
            "d": width,
            "dtype": dtype,
            "registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
            "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
            "shared": kernel.metadata.shared,
            "hgmma": len(re.findall(r"\bHGMMA", sass)),
            "hmma": len(re.findall(r"\bHMMA", sass)),
            "waits": len(re.findall(r"\bWARPGROUP\.DEPBAR", sass)),
            "copies": len(re.findall(r"\bUTMALDG", sass)),
            "lost": lost_operands(sass),
        }
        print(json.dumps(report), flush=True)
        reports.append(report)
        return kernel

    jit.JITFunction.run = run
    reports: list[dict] = []
    n, lengths, rates = 65536, (2048, 4096, 8192), (1, 2, 4)
    for width, heads, dtype in cases:
        q = torch.empty(1, n, heads, width, dtype=getattr(torch, dtype))
        lse = torch.empty(1, heads, n)
        terms = query_terms.QueryTerms(q, lse, lse)

        for is_causal in (False, True):

            def config(name, q=q, is_causal=is_causal):
                return configs.candidates(name, q, is_causal)[0]

            problem = Problem(
                DilatedPattern(lengths, rates, heads), is_causal, width**-0.5, 0.0, 0, 0, n, "exact", "none"
            )
            work, tape = Work(QKV(q, q, q), problem, NO_MASKS), Tape()
            # A branch that adds to what is there.
            launch_branches.forward(work, tape, config("forward"), branches=(1,))
            launch_branches.backward_dq(work, terms, tape, config("dq"), branches=(1,))
            launch_branches.backward_dkv(work, terms, tape, config("dkv"), branches=(1,))
            if capability == 90 and dtype != SINGLE:
                hopper_branch.forward(work, tape, 1, AttentionOutput(q, lse), True)
                hopper_branch.backward_dq(work, terms, tape, 1, q, True)
                if work.block_d < 256:
                    hopper_branch.backward_dkv(work, terms, tape, 1, (q, q), True)
            if not configs.candidates("aligned_forward", q, is_causal):
                continue
            saved, grad = launch_aligned.forward(work, tape, config("aligned_forward")), OutputGradient(q, None)
            launch_aligned.backward(work, grad, saved, tape, *launch_aligned.configs_for(work, "backward"))
            if capability == 90 and dtype != SINGLE:
                hopper.forward(work, tape, *hopper.configs_for(work))
                # dQ, then dK and dV.
                hopper_backward.backward(work, grad, saved, tape, *hopper_backward.configs_for(work))
                # A sequence whose end cuts tiles, and whose residues differ in length.
                short = QKV(*3 * (q[:, :-1],))
                cut = work._replace(x=short, problem=replace(problem, seq_len=n - 1))
                hopper.forward(cut, tape, *hopper.configs_for(cut))
                grad_cut, saved_cut = OutputGradient(short.q, None), AttentionOutput(short.q, lse[:, :, :-1])
                hopper_backward.backward(cut, grad_cut, saved_cut, tape, *hopper_backward.configs_for(cut))
                if width == 64:
                    # Segments of two groups of rows, which three would not fill.
                    few = work._replace(problem=replace(problem, pattern=DilatedPattern((128,), (1,), heads)))
                    hopper_branch.forward(few, tape, 0, AttentionOutput(q, lse), True)
                    if not is_causal:
                        hopper.forward(few, tape, *hopper.configs_for(few))
        # A decoding step, with key heads that share rows and rotary positions.
        pattern = DilatedPattern(lengths, rates, max(1, heads // 3))
        q, kv = (torch.empty(1, 1, h, width, dtype=getattr(torch, dtype)) for h in (heads, pattern.num_heads))
        table = torch.empty(1, 1, 1, width // 2)
        buffer = torch.empty(1, pattern.num_heads, 8192, width, dtype=q.dtype)
        layout, position = decode_layout.DecodeLayout(pattern, n), torch.zeros(1, dtype=torch.int64)
        launch_decode.step(QKV(q, kv, kv), Rotation(*4 * (table,)), position, (buffer, buffer), layout, 1.0)
        x, norm = torch.empty(1, 1024, dtype=q.dtype), torch.nn.LayerNorm(1024, dtype=q.dtype)
        for columns in (1024, 3072, 32_000):
            weight, out = torch.empty(columns, 1024, dtype=q.dtype), torch.empty(1, columns, dtype=q.dtype)
            launch_linear.linear(x, weight, norm=norm, activation="gelu", residual=out)
    return reports


def walking(reports: list[dict]) -> list[dict]:
    """The kernels that walk tiles of queries and keys."""
    return [r for r in reports if not r["kernel"].startswith("decode")]


def too_much_shared(capability: int, reports: list[dict]) -> list[dict]:
    return [r for r in reports if r["shared"] > SHARED_LIMIT[capability]]


def spilling(reports: list[dict]) -> list[dict]:
    """But fp32 above a head_dim of 128: three tf32 products for one leave no tile that does not spill."""
    reports = [r for r in reports if (r["d"], r["dtype"]) != (256, SINGLE)]
    return [r for r in reports if r["stack"] or r["spills"] or r["registers"] > REGISTERS]


@pytest.fixture(scope="module", params=CASES, ids="sm_{}".format)
def compiled(request) -> tuple[int, list[dict]]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, __file__, str(request.param)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    return request.param, reports


def test_every_kernel_compiles(compiled):
    capability, reports = compiled
    parts = "forward", "forward_causal", "backward", "backward_causal", "branch_forward", "branch_backward"
    hoppers = {f"hopper_{part}" for part in parts} if capability == 90 else set()
    assert {r["kernel"] for r in reports} - hoppers == {
        "branch_forward", "branch_backward_dq", "branch_backward_dkv", "aligned_forward", "aligned_backward_dq",
        "aligned_backward_dkv", "decode_split", "decode_merge", "decode_linear",
    }  # fmt: skip
    assert hoppers <= {r["kernel"] for r in reports}


def test_products_run_on_tensor_cores(compiled):
    capability, reports = compiled
    unit = "hgmma" if capability == 90 else "hmma"
    assert [r for r in walking(reports) if r[unit] == 0] == []
    # Sixteen rows of queries are too few for Hopper's wide products.
    assert [r for r in reports if r["kernel"] == "decode_split" and r["hmma"] == 0] == []


def test_products_run_beside_each_other(compiled):
    """Where ptxas cannot follow a product in flight, it says nothing and waits for each alone, as it did when a step of
    the backward left its last product to the next. Hopper's kernels have three products or more per wait."""
    hoppers = [r for r in compiled[1] if r["kernel"].startswith("hopper")]
    assert [r for r in hoppers if 3 * r["waits"] > r["hgmma"]] == []


def test_operands_at_rest_stay_in_their_registers(compiled):
    """As those of `backward_step.start` do."""
    assert [r for r in compiled[1] if r["lost"]] == []


# What ptxas made of a walk in one loop, abridged; and with the operand copied first.
LOST = """
    /*09a0*/                   LDSM.16.M88.4 R180, [R3+UR9+0xe000] ;
    /*18f0*/                   IMAD.U32 R196, RZ, RZ, UR15 ;
    /*1900*/                   HGMMA.64x64x16.F32.BF16 R56, R180, gdesc[UR16], RZ, !UPT ;
    /*21a0*/                   F2FP.BF16.F32.PACK_AB R180, R57, R56 ;
    /*2420*/                   HGMMA.64x64x16.F32.BF16 R120, R180, gdesc[UR24].tnspB, R120 ;
    /*2950*/              @!P3 BRA 0x18f0 ;
"""
KEPT = LOST.replace("IMAD.U32 R196, RZ, RZ, UR15", "MOV R176, R180").replace("R56, R180", "R56, R176")
KEPT = KEPT.replace("AB R180", "AB R176").replace("R120, R180", "R120, R176")


@pytest.mark.parametrize(("code", "lost"), [(LOST, ["R180 in the loop at 0x18f0"]), (KEPT, [])])
def test_lost_operands_are_seen(code, lost):
    assert lost_operands(code) == lost


def test_shared_memory_fits(compiled):
    capability, reports = compiled
    assert too_much_shared(capability, reports) == []


def test_nothing_spills(compiled):
    """But for what a producer warp of Hopper's, with its 24 registers, keeps from tile to tile, more in the backward
    (two pairs of tensors, and residues that differ in length); for the backward at D = 128: two accumulators, P and
    dS fill all registers; and for the tiles at D = 256 that were the fastest on Hopper (docs/log.md, 2026-11-28).
    golden.json has each figure."""

    def allowed(report):
        if report["kernel"].startswith("hopper"):
            return report["spills"] <= (500 if "backward" in report["kernel"] else 15)
        return compiled[0] == 90 and report["d"] == 256 and report["spills"] <= 60

    assert [r for r in spilling(compiled[1]) if not allowed(r)] == []


def test_the_copy_engine_loads_on_hopper(compiled):
    capability, reports = compiled
    if capability == 90:
        assert [r for r in walking(reports) if r["copies"] == 0] == []


def test_registers_and_spills_are_as_committed(compiled):
    import golden

    capability, reports = compiled
    if capability != 90:
        pytest.skip("the committed figures are Hopper's")
    kept = json.loads(golden.FILE.read_text(encoding="utf-8"))
    if kept["versions"]["triton"] != golden.versions()["triton"]:
        pytest.skip("the figures were taken with another Triton")
    changed = golden.differences(kept["kernels"], golden.kernels(reports))
    assert not changed, "\n".join([*changed, "if the change is meant: python tests/golden.py --write"])


if __name__ == "__main__":
    wanted = int(sys.argv[1])
    every = "--all" in sys.argv
    made = compile_all(wanted, EVERY if every else CASES[wanted])
    if every:
        sys.exit("\n".join(map(str, [*too_much_shared(wanted, made), *spilling(made)])) or 0)
