"""Hopper's own kernels beside their Triton twins: correctness first, then milliseconds and rates.

    python benchmarks/hopper.py [--all] [--backward | --branches]  # --all: other configurations than the library's

Pattern rate: the pairs that the branches come to together, over time; computed rate: distinct pairs. The ratio is of
the pattern rate to dense cuDNN's at 65,536 tokens, timed before and after in this process. With --backward the passes
of the gradients instead: delta and its layouts, dQ (three products per pair), dK and dV (four), all of it (five, as
everyone counts), and forward and backward together beside cuDNN's. With --branches the kernels for one branch at a
time beside their twins, on the lines of benchmarks/patterns.py that no single launch takes.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import compiling
import gpu
import patterns
import torch

from dilated_attention_pytorch import dilated_attention
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels.triton import launch_aligned, launch_branches, query_terms
from dilated_attention_pytorch.kernels.triton.hopper import launch, launch_backward, launch_branch, support
from dilated_attention_pytorch.kernels.triton.hopper.launch import HopperConfig
from dilated_attention_pytorch.kernels.triton.hopper.launch_backward import BackwardConfig
from dilated_attention_pytorch.kernels.triton.hopper.launch_branch import BranchConfig
from dilated_attention_pytorch.kernels.triton.replay import Tape
from dilated_attention_pytorch.kernels.triton.work import Work
from dilated_attention_pytorch.testing import relative_norm
from dilated_attention_pytorch.types import NO_MASKS, QKV, AttentionOutput, OutputGradient

LENGTHS, RATES = (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16)
LENGTHS_OF = {"even": 1 << 20, "odd": 1_000_003, "64k": 1 << 16, "32k": 1 << 15, "16k": 1 << 14}
DISTINCT = {False: 3008 / 3968, True: 1504.5 / 1985}
OTHERS = {
    (64, False): (HopperConfig(128, 4, False, True), HopperConfig(64, 8, False, groups=3)),
    (128, False): (HopperConfig(128, 3, True), HopperConfig(128, 3, False, True)),
    (64, True): (HopperConfig(64, 8, False), HopperConfig(64, 12, True), HopperConfig(128, 6, True)),
    (128, True): (HopperConfig(64, 6, False), HopperConfig(64, 5, True), HopperConfig(128, 3, True)),
}
# The same of dQ and of dK, dV.
OTHERS_BACKWARD = {
    (64, False): ((BackwardConfig(64, 6, True),), (BackwardConfig(64, 3), BackwardConfig(64, 6, True))),
    (128, False): ((BackwardConfig(64, 4),), (BackwardConfig(64, 3),)),
    (64, True): ((BackwardConfig(128, 3), BackwardConfig(64, 6, True)), (BackwardConfig(64, 3),)),
    (128, True): ((BackwardConfig(64, 4, True),), (BackwardConfig(64, 3),)),
}
# The same of one branch's kernels (--branches).
OTHERS_BRANCH: tuple[dict[tuple[int, bool], tuple[BranchConfig, ...]], dict[int, tuple[BackwardConfig, ...]]] = (
    {
        (64, False): (BranchConfig(128, 4, pingpong=True),),
        (64, True): (BranchConfig(64, 8),),
        (128, True): (BranchConfig(64, 5),),
        (256, False): (BranchConfig(64, 2, pingpong=True),),
        (256, True): (BranchConfig(32, 5),),
    },
    {
        64: (BackwardConfig(64, 6), BackwardConfig(64, 3)),
        128: (BackwardConfig(64, 4), BackwardConfig(64, 3)),
        256: (BackwardConfig(32, 2),),
    },
)


def twin(work: Work) -> AttentionOutput:
    """What every other GPU runs."""
    family = launch_branches if launch_aligned.why_not(work, "forward") else launch_aligned
    return family.forward(work, Tape(), *family.configs_for(work, "forward"))


def work_of(n: int, heads: int, width: int, causal: bool, device: str = "cuda") -> Work:
    """The paper's pattern."""
    problem = Problem(DilatedPattern(LENGTHS, RATES, heads), causal, width**-0.5, 0.0, 0, 0, n, "exact", "none")
    make = torch.randn if device == "cuda" else torch.empty
    x = QKV(*(make(1, n, heads, width, device=device, dtype=torch.bfloat16) for _ in range(3)))
    return Work(x, problem, NO_MASKS)


def passes(work: Work, saved: AttentionOutput, others: bool) -> dict[str, Callable]:
    """Both backwards, the passes of ours, and with `others` those of other configurations."""
    grad = OutputGradient(torch.empty_like(work.x.q).copy_(work.x.v), None)
    family = launch_branches if launch_aligned.why_not(work, "backward") else launch_aligned
    dq, dkv = launch_backward.configs_for(work)
    layouts = partial(launch_backward.terms_of, work, grad, saved, Tape())
    terms = layouts()
    found: dict[str, Callable] = {
        "twin, all of it": partial(family.backward, work, grad, saved, Tape(), *family.configs_for(work, "backward")),
        "all of it": partial(launch_backward.backward, work, grad, saved, Tape(), dq, dkv),
        "delta, layouts": layouts,
        "dQ": partial(launch_backward.backward_dq, work, grad, terms, Tape(), dq),
        "dK, dV": partial(launch_backward.backward_dkv, work, grad, terms, Tape(), dkv),
    }
    more_dq, more_dkv = OTHERS_BACKWARD[work.x.q.shape[3], work.problem.is_causal] if others else ((), ())
    for config in more_dq:
        found[f"dQ {tuple(config)}"] = partial(launch_backward.backward_dq, work, grad, terms, Tape(), config)
    for config in more_dkv:
        found[f"dK, dV {tuple(config)}"] = partial(launch_backward.backward_dkv, work, grad, terms, Tape(), config)
    return found


def in_turns(runs: dict[Any, Callable[[], Any]]) -> dict[Any, float]:
    """Milliseconds of each, the median of three rounds in changing order: what ran before moves a time by up to 9%."""
    times: dict[Any, list[float]] = {who: [] for who in runs}
    chance = random.Random(0)
    for _ in range(3):
        for who in chance.sample(list(runs), len(runs)):
            times[who].append(gpu.milliseconds(runs[who]))
    return {who: statistics.median(found) for who, found in times.items()}


# Products per pair; a backward counts five, however many it takes.
PRODUCTS = {
    "forward": 2, "twin, all of it": 5, "all of it": 5, "delta, layouts": 0, "dQ": 3, "dK, dV": 4,
    "forward + backward": 7,
}  # fmt: skip
CASES = [("D=64", 12, 64, False), ("D=64", 12, 64, True), ("D=128", 6, 128, False), ("D=128", 6, 128, True)]


def backward(shape: str, heads: int, width: int, causal: bool, others: bool) -> None:
    """Each pass of the gradients, after a check against the twin."""
    before = gpu.dense_rate(shape, causal, True)
    lines = []
    for name in ("even", "odd") if (width, causal) == (64, True) else ("even",):
        n = LENGTHS_OF[name]
        work = work_of(n, heads, width, causal)
        if reasons := support.why_not(work):
            print(f"{shape} causal={causal} {name}: {reasons[0]}")
            continue
        once = partial(launch.forward, work, Tape(), *launch.configs_for(work))
        runs = passes(work, once(), others and name == "even")
        want = runs["twin, all of it"]()
        errors = [relative_norm(a, b) for a, b in zip(runs["all of it"](), want, strict=True)]
        for who, run in runs.items():
            if who.startswith("dQ ("):
                errors.append(relative_norm(run(), want.q))
            elif who.startswith("dK, dV ("):
                errors += [relative_norm(a, b) for a, b in zip(run(), want[1:], strict=True)]
        if not max(errors) < 1e-2:
            print(f"WRONG {shape} causal={causal} {name}: dq, dk, dv differ by {errors}")
            continue
        times = in_turns(runs)
        times["forward + backward"] = times["all of it"] + gpu.milliseconds(once)
        flops = work.problem.pattern.pairs(n, is_causal=causal) * 2 * width
        lines += [(name, who, ms, PRODUCTS[who.split(" (")[0]] * flops) for who, ms in times.items()]
    dense = (before + gpu.dense_rate(shape, causal, True)) / 2
    show(f"{shape} {'causal' if causal else 'bidirectional'}, dense forward and backward", dense, causal, lines)


def forward(shape: str, heads: int, width: int, causal: bool, others: bool) -> None:
    """Kernel beside twin; and, where the host counts, what users call, whose launches are replayed."""
    before = gpu.dense_rate(shape, causal, False)
    lines = []
    for name, n in LENGTHS_OF.items():
        work = work_of(n, heads, width, causal)
        flops = work.problem.pattern.pairs(n, is_causal=causal) * 4 * width
        want = twin(work)
        lines.append((name, "twin", gpu.milliseconds(partial(twin, work)), flops))
        call = partial(dilated_attention, segment_lengths=LENGTHS, dilation_rates=RATES, is_causal=causal)
        call(*work.x)
        lines.append((name, "auto", gpu.milliseconds(partial(call, *work.x)), flops))
        for config in (*launch.configs_for(work), *(OTHERS[width, causal] if others and name == "even" else ())):
            try:
                got = launch.forward(work, Tape(), config)
                error = relative_norm(got.out, want.out)
                assert error < 5e-3 and relative_norm(got.lse, want.lse) < 1e-5, f"differs by {error:.1e}"
                time_ms = gpu.milliseconds(partial(launch.forward, work, Tape(), config))
                lines.append((name, " ".join(map(str, config)), time_ms, flops))
            except Exception as failure:
                print(f"{shape} causal={causal} {name} {config}: {type(failure).__name__} {str(failure)[:200]}")
    dense = (before + gpu.dense_rate(shape, causal, False)) / 2
    show(f"{shape} {'causal' if causal else 'bidirectional'}", dense, causal, lines)


GENERAL = "README", "slide", "r=1,3,9", "paper's rates"


def general_lines() -> list[patterns.Line]:
    """Lines that no launch for all branches takes."""
    return [line for line in patterns.lines() if line.name in GENERAL or line.head_dim in (80, 96, 256)]


def branch_passes(work: Work, branch: int) -> dict[str, Callable[[], Any]]:
    """The passes of one branch, as a call of a kind that was seen before launches them."""
    (forward_config,) = launch_branches.configs_for(work, "forward")
    dq, dkv = launch_branches.configs_for(work, "backward")
    n, heads = work.x.q.shape[1:3]
    terms = query_terms.QueryTerms(
        torch.empty_like(work.x.q).copy_(work.x.q), *work.x.q.new_full((2, work.x.q.shape[0], heads, n), 5.0).float()
    )
    inputs = (*work.x, *terms)

    def recorded(name: str, run: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        tape = Tape((name, branch, work.problem, object()), inputs)
        found = run(work, *arguments[:-1], tape, arguments[-1], [branch])
        tape.keep((found,) if isinstance(found, torch.Tensor) else found)
        return partial(tape.play, inputs)

    found = {
        "forward": recorded("forward", launch_branches.forward, forward_config),
        "dQ": recorded("dQ", launch_branches.backward_dq, terms, dq),
    }
    if work.block_d in support._COLUMNS["dkv"]:  # else the twin alone has them
        found["dK, dV"] = recorded("dK, dV", launch_branches.backward_dkv, terms, dkv)
    return found


def branches(line: patterns.Line, others: bool) -> None:
    """Each pass of each branch by both, after a check of one against the other."""
    work, pattern = line.work(line.seq_len, line.batch), line.pattern
    for branch, (length, rate) in enumerate(zip(line.segment_lengths, line.dilation_rates, strict=True)):
        alone = DilatedPattern((length,), (rate,), pattern.num_heads, pattern.offsets)
        group = line.num_heads // pattern.num_heads
        flops = line.batch * group * alone.pairs(line.seq_len, is_causal=line.is_causal) * 2 * line.head_dim
        runs: dict[Any, Callable[[], Any]] = {}
        for who in WAYS[: 3 if others else 2]:
            with way(who):
                runs |= {(name, who): run for name, run in branch_passes(work, branch).items()}
        found, times = {key: run() for key, run in runs.items()}, in_turns(runs)
        for name in dict.fromkeys(name for name, _ in runs):
            said = []
            for who in WAYS[: 3 if others else 2]:
                time_ms, pairs = times[name, who], zip(found[name, who], found[name, "twin"], strict=True)
                wrong = "" if max(relative_norm(a, b) for a, b in pairs) < 1e-2 else " WRONG"
                said.append(f"{who} {time_ms:7.3f} ms {flops * PRODUCTS[name] / time_ms / 1e9:4.0f}{wrong}")
            gain = times[name, "twin"] / times[name, "Hopper"]
            print(f"{line.title:<44} w={length} r={rate} {name:<8} {', '.join(said)}, {gain:.2f}x", flush=True)


WAYS = "twin", "Hopper", "others"


@contextlib.contextmanager
def way(who: str) -> Iterator[None]:
    """Which kernels a branch takes: the twins, or Hopper's, also in other configurations."""
    forward, backward = OTHERS_BRANCH if who == "others" else ({}, {})
    few = dict.fromkeys(support._FEW, 5 * (1 << 40 if who == "twin" else 128,))
    with (
        mock.patch.dict(support._FEW, few), mock.patch.dict(launch_branch._FORWARD, forward),
        mock.patch.dict(launch_branch._BACKWARD, backward),
    ):  # fmt: skip
        yield


def compile_case(index: int, with_backward: bool, others: bool, of_branches: bool) -> None:
    """Leaves what one case launches in the cache on disk."""
    compiling.without_gpu()
    if of_branches:
        support.why_not_here = lambda device: []
        support._LITTLE.update(dict.fromkeys(support._LITTLE, 0))
        line = general_lines()[index]
        work = line.work(line.seq_len, line.batch, "cpu")
        for who in WAYS[: 3 if others else 2]:
            with way(who):
                for branch in range(len(work.problem.pattern.dilation_rates)):
                    branch_passes(work, branch)
        return
    _, heads, width, causal = CASES[index]
    odd = () if with_backward and (width, causal) != (64, True) else ((1 << 16) + 3,)
    for n in (1 << 16, *odd):
        work = work_of(n, heads, width, causal, "cpu")
        if with_backward:
            runs = passes(work, launch.forward(work, Tape(), *launch.configs_for(work)), others and n == 1 << 16)
            for run_pass in runs.values():
                run_pass()
            continue
        twin(work)
        for config in (*launch.configs_for(work), *(OTHERS[width, causal] if others and n == 1 << 16 else ())):
            launch.forward(work, Tape(), config)


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
    parser.add_argument("--branches", action="store_true")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile is not None:
        return compile_case(options.compile, options.backward, options.all, options.branches)
    chosen = [f"--{name}" for name in ("backward", "all", "branches") if getattr(options, name)]
    compiling.side_by_side(len(general_lines() if options.branches else CASES), *chosen)
    if options.branches:
        support._LITTLE.update(dict.fromkeys(support._LITTLE, 0))
        for line in general_lines():
            branches(line, options.all)
        return None
    for case in CASES:
        if options.backward:
            backward(*case, options.all)
        else:
            forward(*case, options.all)
    return None


if __name__ == "__main__":
    main()
