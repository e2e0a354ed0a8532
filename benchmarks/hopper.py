"""Hopper's own kernels beside their Triton twins, forward: correctness first, then milliseconds and rates.

    python benchmarks/hopper.py [--all]    # --all: other configurations than the library's too

Pattern rate: the pairs that the branches come to together, over time; computed rate: distinct pairs. The ratio is of
the pattern rate to dense cuDNN's at 65,536 tokens, timed before and after in this process.
"""

from __future__ import annotations

import argparse

import gpu

from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels.triton import launch_aligned, launch_branches
from dilated_attention_pytorch.kernels.triton.hopper import launch, support
from dilated_attention_pytorch.kernels.triton.hopper.launch import HopperConfig
from dilated_attention_pytorch.kernels.triton.replay import Tape
from dilated_attention_pytorch.kernels.triton.work import Work
from dilated_attention_pytorch.testing import relative_norm
from dilated_attention_pytorch.types import NO_MASKS, QKV, AttentionOutput

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    for shape, heads, width in (("D=64", 12, 64), ("D=128", 6, 128)):
        for causal in (False, True):
            before = gpu.dense_rate(shape, causal, False)
            lines = []
            for name, n in LENGTHS_OF.items():
                x = QKV(*gpu.tensors(n, heads, width))
                pattern = DilatedPattern(LENGTHS, RATES, heads)
                problem = Problem(pattern, causal, width**-0.5, 0.0, 0, 0, n, "exact", "none")
                work = Work(x, problem, NO_MASKS)
                flops = pattern.pairs(n, is_causal=causal) * 4 * width
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
            print(f"\n{shape} {'causal' if causal else 'bidirectional'}, dense cuDNN {dense:.0f} TFLOP/s")
            for name, who, time_ms, flops in lines:
                rate = flops / time_ms / 1e9
                print(
                    f"  {name:<5} {who:<24} {time_ms:8.3f} ms  pattern {rate:5.0f} = {rate / dense:.2f} of dense, "
                    f"computed {rate * DISTINCT[causal]:5.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
