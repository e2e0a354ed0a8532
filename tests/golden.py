"""Figures that a machine without a GPU measures exactly, kept in tests/golden.json.

    python tests/golden.py            # prints what differs
    python tests/golden.py --write    # takes over what is measured now

FLOPs and bytes follow from the pattern, launches from the kernels' Python side, calls and allocations on the CPU from
torch's profiler, registers and spills from compiling for Hopper. A change that is meant is taken over and shows in the
commit; one that is not meant shows in a test.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dilated_attention_pytorch import DilatedPattern, dilated_attention
from dilated_attention_pytorch.models import LongNetLM
from dilated_attention_pytorch.ring_attention.plan import RingPlan, equal_bounds

FILE = Path(__file__).with_name("golden.json")
# Lengths, rates, heads, key/value heads, width, N, causal.
CASES: dict[str, tuple[list[int], list[int], int, int, int, int, bool]] = {
    "aligned": ([256, 512, 1024], [1, 2, 4], 4, 4, 32, 2048, False),
    "aligned causal": ([256, 512, 1024], [1, 2, 4], 4, 4, 32, 2048, True),
    "ragged": ([100, 333, 2000], [1, 3, 5], 4, 2, 32, 1500, False),
    "ragged causal": ([100, 333, 2000], [1, 3, 5], 4, 2, 32, 1500, True),
}


def _inputs(case: str, *, shrink: int = 1) -> tuple[list[Tensor], dict[str, Any]]:
    """The tensors and the pattern; shrunk, shorter and of one head, which changes no number of launches."""
    lengths, rates, heads, kv_heads, width, n, causal = CASES[case]
    heads, kv_heads = (heads, kv_heads) if shrink == 1 else (1, 1)
    n = n // shrink
    leaves = [torch.ones(1, n, h, width, requires_grad=True) for h in (heads, kv_heads, kv_heads)]
    pattern = {"segment_lengths": [max(1, w // shrink) for w in lengths], "dilation_rates": rates, "is_causal": causal}
    return leaves, pattern


def flops() -> dict[str, int]:
    """Forward and backward of the op, as torch's counter has them; and of a language model, forward."""
    from torch.utils.flop_counter import FlopCounterMode

    found = {}
    for case in CASES:
        leaves, pattern = _inputs(case)
        with FlopCounterMode(display=False) as counter:
            out = dilated_attention(*leaves, **pattern)
            found[f"{case}, forward"] = counter.get_total_flops()
            out.sum().backward()
        found[f"{case}, forward and backward"] = counter.get_total_flops()
    model = LongNetLM(vocab_size=64, d_model=64, nhead=4, num_decoder_layers=2, dim_feedforward=128)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 300, dtype=torch.int64))
    found["language model, forward"] = counter.get_total_flops()
    return found


def bytes_() -> dict[str, int]:
    """What a rank receives in a forward, in bf16, and what a language model's cache holds after 3,000 tokens."""
    found = {}
    for name, lengths, rates, n, ranks in (
        ("two remote branches", (2048, 32768, 524288, 1048576), (1, 2, 8, 16), 1 << 20, 4),
        ("ragged", (1000, 30000, 100000), (1, 3, 7), 100_003, 3),
    ):
        pattern = DilatedPattern(lengths, rates, 12)
        for causal in (False, True):
            for rank in (0, ranks - 1):
                plan = RingPlan(pattern, equal_bounds(n, ranks), rank, causal, torch.device("cpu"))
                mask = "causal" if causal else "full"
                found[f"ring, {name}, {mask}, rank {rank} of {ranks}"] = plan.received_bytes(1, 64, 2)
    model = LongNetLM(
        vocab_size=64, d_model=32, nhead=2, num_decoder_layers=2, dim_feedforward=64,
        segment_lengths=[128, 512], dilation_rates=[1, 4],
    ).eval()  # fmt: skip
    cache = model.make_cache()
    with torch.inference_mode():
        for tokens in torch.zeros(1, 3000, dtype=torch.int64).split([2900, *[1] * 100], 1):
            model(tokens, cache=cache)
    found["cache after 3,000 tokens"] = cache.nbytes
    return found


def cpu_calls() -> dict[str, int]:
    """Of the sdpa backend: torch operators called, attention kernels among them, allocations and what they come to."""
    found = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # kernels take scratch memory a thread
    try:
        for case in CASES:
            leaves, pattern = _inputs(case)

            def run(leaves: list[Tensor] = leaves, pattern: dict[str, Any] = pattern) -> None:
                out = dilated_attention(*leaves, backend="sdpa", **pattern)
                torch.autograd.grad(out, leaves, torch.ones_like(out))

            run()  # fills caches
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                run()
            events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
            names = Counter(e.name() for e in events)
            taken = [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]
            found[f"{case}, operators"] = sum(n for name, n in names.items() if name.startswith("aten::"))
            attention = (n for name, n in names.items() if "_for_cpu" in name)
            found[f"{case}, attention calls"] = sum(attention)
            found[f"{case}, allocations"] = len(taken)
            found[f"{case}, bytes allocated"] = sum(taken)
    finally:
        torch.set_num_threads(threads)
    return found


def launches() -> dict[str, int]:
    """Triton kernels that a forward and a backward start, counted in the interpreter."""
    from triton.runtime import interpreter

    found: dict[str, int] = {}
    original = interpreter.GridExecutor.__call__
    count = 0

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return original(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = counted
    try:
        for case in CASES:
            leaves, pattern = _inputs(case, shrink=32)
            out = dilated_attention(*leaves, backend="triton", **pattern)
            found[f"{case}, forward"], count = count, 0
            out.sum().backward()
            found[f"{case}, backward"], count = count, 0
    finally:
        interpreter.GridExecutor.__call__ = original
    return found


def kernels(reports: list[dict[str, Any]]) -> dict[str, int]:
    """Registers, spills, stack and shared memory of each kernel, in the order in which `compile_all` makes them."""
    found: dict[str, int] = {}
    seen: Counter[str] = Counter()
    masks = {1: "full", 2: "causal"}
    for report in reports:
        name = f"{report['kernel']}, D={report['d']}"
        seen[name] += 1
        # Hopper's kernels say in their names what they are; they come with whole tiles, then with cut ones.
        which = f"variant {seen[name]}" if name.startswith("hopper") else masks.get(seen[name], f"variant {seen[name]}")
        which = "decoding" if name.startswith("decode") else which
        for figure in ("registers", "spills", "stack", "shared"):
            found[f"{name}, {which}, {figure}"] = report[figure]
    return found


def compiled() -> list[dict[str, Any]]:
    """What tests/kernels/test_triton_compile.py finds for Hopper, in a process of its own."""
    script = Path(__file__).parent / "kernels" / "test_triton_compile.py"
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, script, "90"], env=environment, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


# What each section depends on beside this library: with another version the figures mean nothing.
DEPENDS = {"flops": (), "bytes": (), "cpu calls": ("torch",), "launches": (), "kernels": ("triton",)}


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name).split("+")[0] for name in ("torch", "triton")}


def differences(kept: dict[str, int], now: dict[str, int]) -> list[str]:
    """In words, one a figure."""
    return [
        f"{name}: {kept.get(name, 'nothing')} kept, {now.get(name, 'nothing')} now"
        for name in dict.fromkeys([*kept, *now])
        if kept.get(name) != now.get(name)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="take over what is measured now")
    options = parser.parse_args()
    now: dict[str, Any] = {
        "versions": versions(), "flops": flops(), "bytes": bytes_(), "cpu calls": cpu_calls(), "launches": launches(),
        "kernels": kernels(compiled()),
    }  # fmt: skip
    kept = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    changed = [f"{part}: {line}" for part in now for line in differences(kept.get(part, {}), now[part])]
    print("\n".join(changed) or "nothing differs")
    if options.write:
        FILE.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    return int(bool(changed) and not options.write)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    sys.exit(main())
