"""Hopper's own kernels beside their Triton twins: correctness first, then milliseconds and rates.

    python benchmarks/hopper.py [--all] [--backward]    # --all: other configurations than the library's too

Pattern rate: the pairs that the branches come to together, over time; computed rate: distinct pairs. The ratio is of
the pattern rate to dense cuDNN's at 65,536 tokens, timed before and after in this process. With --backward the passes
of the gradients instead: delta and its layouts, dQ (three products per pair), dK and dV (four), all of it (five, as
everyone counts), and forward and backward together beside cuDNN's.
"""

from __future__ import annotations

import argparse
from functools import partial

import gpu
import torch

from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels.triton import launch_aligned, launch_branches
from dilated_attention_pytorch.kernels.triton.hopper import launch, launch_backward, support
from dilated_attention_pytorch.kernels.triton.hopper.launch import HopperConfig
from dilated_attention_pytorch.kernels.triton.replay import Tape
from dilated_attention_pytorch.kernels.triton.work import Work
from dilated_attention_pytorch.testing import relative_norm
from dilated_attention_pytorch.types import NO_MASKS, QKV, AttentionOutput, OutputGradient

LENGTHS, RATES = (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16)
LENGTHS_OF = {"even": 1 << 20, "odd": 1_000_003, "65k": 1 << 16, "32k": 1 << 15, "16k": 1 << 14, "8k": 1 << 13}
DISTINCT = {False: 3008 / 3968, True: 1504.5 / 1985}
OTHERS = {
    (64, False): (HopperConfig(128, 4, True), HopperConfig(128, 4, False, True), HopperConfig(128, 5, False)),
    (128, False): (HopperConfig(128, 3, True), HopperConfig(128, 2, False), HopperConfig(64, 5, True, True)),
    (64, True): (HopperConfig(128, 4, True), HopperConfig(128, 6, False), HopperConfig(64, 8, True)),
    (128, True): (HopperConfig(128, 3, False), HopperConfig(64, 5, False), HopperConfig(128, 3, True)),
}


def twin(work: Work) -> AttentionOutput:
    """What every other GPU runs."""
    family = launch_branches if launch_aligned.why_not(work, "forward") else launch_aligned
    return family.forward(work, Tape(), *family.configs_for(work, "forward"))


def work_of(n: int, heads: int, width: int, causal: bool) -> Work:
    """The paper's pattern."""
    problem = Problem(DilatedPattern(LENGTHS, RATES, heads), causal, width**-0.5, 0.0, 0, 0, n, "exact", "none")
    return Work(QKV(*gpu.tensors(n, heads, width)), problem, NO_MASKS)


def backward(causal: bool, shape: str, heads: int, width: int, others: bool) -> None:
    """Each pass of the gradients, after a check against the twin."""
    before = gpu.dense_rate(shape, causal, True)
    lines = []
    for name, n in LENGTHS_OF.items():
        work = work_of(n, heads, width, causal)
        if n > LENGTHS_OF["32k"] and (reasons := support.why_not(work)):
            print(f"{shape} causal={causal} {name}: {reasons[0]}")
            continue
        products = work.problem.pattern.pairs(n, is_causal=causal) * 2 * width
        saved, grad = twin(work), OutputGradient(torch.randn_like(work.x.q), None)
        family = launch_branches if launch_aligned.why_not(work, "backward") else launch_aligned
        theirs = partial(family.backward, work, grad, saved, Tape(), *family.configs_for(work, "backward"))
        configs = launch_backward.configs_for(work)
        ours = partial(launch_backward.backward, work, grad, saved, Tape(), *configs)
        errors = [relative_norm(a, b) for a, b in zip(ours(), theirs(), strict=True)]
        if not max(errors) < 1e-2:
            print(f"WRONG {shape} causal={causal} {name}: dq, dk, dv differ by {errors}")
            continue
        lines.append((name, "twin, all of it", gpu.milliseconds(theirs), 5 * products))
        lines.append((name, "all of it", whole := gpu.milliseconds(ours), 5 * products))
        forward = gpu.milliseconds(partial(launch.forward, work, Tape(), *launch.configs_for(work)))
        lines.append((name, "forward + backward", forward + whole, 7 * products))
        if name != "even":
            continue
        layouts = partial(launch_backward.terms_of, work, grad, saved, Tape())
        terms = layouts()
        lines.append((name, "delta, layouts", gpu.milliseconds(layouts), 0))
        passes = {
            "dQ": (launch_backward.backward_dq, 3, configs[0], (64, 4), (128, 2)),
            "dK, dV": (launch_backward.backward_dkv, 4, configs[1], (64, 2), (64, 4)),
        }
        for who, (launched, count, best, *more) in passes.items():
            for config in (best, *more * others):
                try:
                    time_ms = gpu.milliseconds(partial(launched, work, grad, terms, Tape(), config))
                    lines.append((name, f"{who} {config}", time_ms, count * products))
                except Exception as failure:  # shared memory, most likely
                    print(f"{shape} causal={causal} {who} {config}: {type(failure).__name__} {str(failure)[:200]}")
    dense = (before + gpu.dense_rate(shape, causal, True)) / 2
    show(f"{shape} {'causal' if causal else 'bidirectional'}, backward", dense, causal, lines)


def show(title: str, dense: float, causal: bool, lines: list) -> None:
    """One line per measurement: (length, which, ms, FLOP of the pattern)."""
    print(f"\n{title}, dense cuDNN {dense:.0f} TFLOP/s")
    for name, who, time_ms, flops in lines:
        rate = flops / time_ms / 1e9
        print(
            f"  {name:<5} {who:<24} {time_ms:8.3f} ms  pattern {rate:5.0f} = {rate / dense:.2f} of dense, "
            f"computed {rate * DISTINCT[causal]:5.0f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--backward", action="store_true")
    options = parser.parse_args()
    for shape, heads, width in (("D=64", 12, 64), ("D=128", 6, 128)):
        for causal in (False, True):
            if options.backward:
                backward(causal, shape, heads, width, options.all)
                continue
            before = gpu.dense_rate(shape, causal, False)
            lines = []
            for name, n in LENGTHS_OF.items():
                work = work_of(n, heads, width, causal)
                flops = work.problem.pattern.pairs(n, is_causal=causal) * 4 * width
                want = twin(work)
                lines.append((name, "twin", gpu.milliseconds(lambda work=work: twin(work)), flops))
                reasons = support.why_not(work)
                if reasons and n > LENGTHS_OF["32k"]:
                    print(f"{shape} causal={causal} {name}: {reasons[0]}")
                    continue
                configs = launch.configs_for(work)
                for config in (*configs, *(OTHERS[width, causal] if options.all and name == "even" else ())):
                    try:
                        got = launch.forward(work, Tape(), config)
                        error = relative_norm(got.out, want.out)
                        assert error < 5e-3 and relative_norm(got.lse, want.lse) < 1e-5, f"differs by {error:.1e}"
                        time_ms = gpu.milliseconds(
                            lambda work=work, config=config: launch.forward(work, Tape(), config)
                        )
                        lines.append((name, " ".join(map(str, config)), time_ms, flops))
                    except Exception as failure:
                        print(f"{shape} causal={causal} {name} {config}: {type(failure).__name__} {str(failure)[:200]}")
            dense = (before + gpu.dense_rate(shape, causal, False)) / 2
            show(f"{shape} {'causal' if causal else 'bidirectional'}", dense, causal, lines)


if __name__ == "__main__":
    main()
