"""What registering an op costs per call: `custom_op` with `register_autograd` against `define`, `impl` and a Function.

    python benchmarks/dispatch.py

Both forms carry the attention op's own schema around a body that does nothing, on the CPU, with and without gradients.
Prints microseconds per call, the median of interleaved rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import machine  # type: ignore[import-not-found]
from torch import Tensor

ROUNDS, CALLS = 21, 2000
SETTINGS = ([2048, 8192], [1, 4], "modulo", False, 0.125, 0.0, 0, 0, 64, "exact", "none", "sdpa")
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? key_padding, Tensor? row_start, Tensor? cu_seqlens, Tensor? seed, "
    "SymInt[] segment_lengths, SymInt[] dilation_rates, str offsets, bool is_causal, float scale, float dropout_p, "
    "SymInt q_start, SymInt k_start, SymInt seq_len, str mixing_gradient, str padding, str backend) -> (Tensor, Tensor)"
)


def body(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """As little as an op may do: two new tensors."""
    return torch.empty_like(q), q.new_empty(q.shape[:3])


def custom_op() -> Callable[..., Any]:
    """The op by `torch.library.custom_op`."""
    op = torch.library.custom_op("dispatch_custom::attention", body, mutates_args=(), schema=SCHEMA)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*output, *inputs[:7])
        ctx.settings = inputs[7:]

    op.register_autograd(lambda ctx, *grads: (None,) * 19, setup_context=setup)
    return op


def defined(registered: bool, guard=None) -> Callable[..., Any]:
    """The op by `define` and `impl`; its Function either registered for the Autograd key or called from outside."""
    namespace = ("dispatch_key" + str(guard)) if registered else "dispatch_function"
    torch.library.define(f"{namespace}::attention", SCHEMA)
    torch.library.impl(f"{namespace}::attention", "CompositeExplicitAutograd" if not registered else "cpu")(body)
    op = getattr(torch.ops, namespace).attention.default

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
        if torch.is_grad_enabled() and (inputs[0].requires_grad or inputs[1].requires_grad or inputs[2].requires_grad):
            return Attention.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    if registered:
        torch.library.impl(f"{namespace}::attention", "Autograd")(Attention.apply if guard is None else differentiable)
        return op  # type: ignore[no-any-return]
    return lambda *inputs: Attention.apply(*inputs) if inputs[0].requires_grad else op(*inputs)


def main() -> None:
    forms = {
        "custom_op, register_autograd": custom_op(),
        "define, impl, Function at the Autograd key": defined(True, 1),
        "apply": defined(True, None),
        "define, impl, Function around the op": defined(False),
    }
    plain = torch.ones(1, 64, 2, 16)
    cases = {"no gradient": plain, "gradient": plain.clone().requires_grad_()}
    print(machine())
    for case, x in cases.items():
        times: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(ROUNDS):
            for name, op in forms.items():
                start = time.perf_counter()
                for _ in range(CALLS):
                    op(x, x, x, None, None, None, None, *SETTINGS)
                times[name].append((time.perf_counter() - start) / CALLS * 1e6)
        for name, found in times.items():
            print(f"{case:12} {name:45} {statistics.median(found):6.2f} us (from {min(found):.2f})")


if __name__ == "__main__":
    main()
