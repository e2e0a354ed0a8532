"""What a call costs the host: two ways to register an op, and first and repeated calls of this tree and another.

    python benchmarks/dispatch.py [--base CHECKOUT] [--out FOLDER]

The two forms, `custom_op` with `register_autograd` and `define`, `impl` with a Function at the Autograd key, carry the
attention op's own schema around a body that does nothing. The calls are short causal ones on the CPU. With `--base`
the same calls run in another checkout of this repository, in turns. Numbers are microseconds of processor time per
call: the least and the median of many short bursts, taken in turns, so that a busy machine shows in the median alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import announce, refuse, write
from torch import Tensor

ROUNDS, BURST = 200, 5
TURNS = 3  # of this tree and the other
SETTINGS = ([2048, 8192], [1, 4], "modulo", False, 0.125, 0.0, 0, 0, 64, "exact", "none", "sdpa")
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? key_padding, Tensor? row_start, Tensor? cu_seqlens, Tensor? seed, "
    "SymInt[] segment_lengths, SymInt[] dilation_rates, str offsets, bool is_causal, float scale, float dropout_p, "
    "SymInt q_start, SymInt k_start, SymInt seq_len, str mixing_gradient, str padding, str backend) -> (Tensor, Tensor)"
)


def body(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """As little as an op may do: two new tensors."""
    return torch.empty_like(q), q.new_empty(q.shape[:3])


def with_custom_op() -> Callable[..., Any]:
    """The op by `torch.library.custom_op`."""
    op = torch.library.custom_op("dispatch_custom::attention", body, mutates_args=(), schema=SCHEMA)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*output, *inputs[:7])
        ctx.settings = inputs[7:]

    op.register_autograd(lambda ctx, *grads: (None,) * 19, setup_context=setup)
    return op


def with_define() -> Callable[..., Any]:
    """The op by `define` and `impl`, its Function at the Autograd key."""
    torch.library.define("dispatch_define::attention", SCHEMA)
    torch.library.impl("dispatch_define::attention", "CompositeExplicitAutograd")(body)
    op = torch.ops.dispatch_define.attention.default

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            ctx.save_for_backward(*output, *inputs[:7])
            ctx.settings = inputs[7:]
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return (None,) * 19

    def differentiable(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return Attention.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    torch.library.impl("dispatch_define::attention", "Autograd")(differentiable)
    return op


def forms() -> dict[str, Callable[[], Any]]:
    """Both forms, with and without a gradient."""
    x = torch.ones(1, 64, 2, 16)
    leaf = x.clone().requires_grad_()
    ops = {"custom_op": with_custom_op(), "define and impl": with_define()}
    return {
        f"{name}, {kind}": lambda op=op, x=x: op(x, x, x, None, None, None, None, *SETTINGS)
        for kind, x in (("no gradient", x), ("gradient", leaf))
        for name, op in ops.items()
    }


def calls() -> dict[str, Callable[[], Any]]:
    """Calls of `dilated_attention`, whichever tree it is imported from."""
    from dilated_attention_pytorch import dilated_attention

    try:
        from dilated_attention_pytorch.kernels import fast_path
    except ImportError:  # its name up to 1f1007c
        from dilated_attention_pytorch.kernels import eager as fast_path

    plain = [torch.randn(1, 256, 4, 32) for _ in range(3)]
    leaves = [x.clone().requires_grad_() for x in plain]
    pattern: dict[str, Any] = {"segment_lengths": [64, 128, 256], "dilation_rates": [1, 2, 4], "is_causal": True}

    def first() -> None:
        fast_path._known.clear()
        dilated_attention(*plain, **pattern)

    return {
        "repeated call": lambda: dilated_attention(*plain, **pattern),
        "first call of a kind": first,
        "call with gradients": lambda: dilated_attention(*leaves, **pattern),
        "call and backward": lambda: dilated_attention(*leaves, **pattern).sum().backward(),
    }


def timed(cases: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
    """Least and median microseconds per call, the cases in turns."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for run in cases.values():
        run()
    for _ in range(ROUNDS):
        for name, run in cases.items():
            start = time.process_time_ns()
            for _ in range(BURST):
                run()
            found[name].append((time.process_time_ns() - start) / BURST / 1e3)
    return {name: (min(times), statistics.median(times)) for name, times in found.items()}


def check() -> list[str]:
    """What is wrong with the calls that are timed."""
    from dilated_attention_pytorch import dilated_attention

    q, k, v = (torch.randn(1, 256, 4, 32, dtype=torch.float64) for _ in range(3))
    pattern: dict[str, Any] = {"segment_lengths": [64, 128, 256], "dilation_rates": [1, 2, 4], "is_causal": True}
    error = (dilated_attention(q, k, v, **pattern) - dilated_attention(q, k, v, backend="reference", **pattern)).abs()
    return [f"off by {float(error.max()):.1e}"] if float(error.max()) > 1e-10 else []


def in_tree(tree: Path) -> dict[str, tuple[float, float]]:
    """The calls in a process of their own, imported from a checkout."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--calls"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, tuple[float, float]] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="another checkout, timed in turns with this one")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    parser.add_argument("--calls", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.calls:
        print(json.dumps(timed(calls())))
        return
    announce()
    refuse(check())
    rows = [{"case": name, "least_us": least, "median_us": median} for name, (least, median) in timed(forms()).items()]
    trees = {"this tree": Path(__file__).resolve().parents[1]} | ({"base": options.base} if options.base else {})
    turns = [(name, in_tree(tree)) for _ in range(TURNS) for name, tree in trees.items()]
    for case in turns[0][1]:
        for tree in trees:
            found = [times[case] for name, times in turns if name == tree]
            least, median = min(x for x, _ in found), statistics.median(x for _, x in found)
            rows.append({"case": f"{case}, {tree}", "least_us": least, "median_us": median})
    for row in rows:
        print(f"{row['case']:36} {row['least_us']:8.1f} us, median {row['median_us']:8.1f}")
    write(options.out, "dispatch", rows, check="dilated_attention against its reference in fp64, 1e-10")


if __name__ == "__main__":
    main()
