"""What the attention op counts as in `torch.utils.flop_counter.FlopCounterMode`.

That module imports Triton where it is installed, which takes longer than everything here; so the formulas are handed
over when, and only when, somebody else imports it.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.core import torch_private
from dilated_attention_pytorch.core.problem import Problem

_COUNTER = "torch.utils.flop_counter"


def register_when_counted() -> None:
    """Registers the formulas now if the counter is loaded, else as soon as it is."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _AfterCounter())


class _AfterCounter:
    """Finds nothing itself; steps aside for the counter's own finder and registers once that module is loaded."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _register(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register(counter: ModuleType) -> None:
    ops = torch.ops.dilated_attention_pytorch
    counter.register_flop_formula(ops.attention, get_raw=True)(_forward)
    counter.register_flop_formula(ops.attention_backward, get_raw=True)(_backward)


def _forward(q: Tensor, k: Tensor, v: Tensor, *settings: Any, out_val: Any = None, **_: Any) -> int:
    """4 D a pair: two products of a multiply and an add."""
    return 4 * q.shape[-1] * _pairs(q, k, *settings)


def _backward(
    grad_out: Any, grad_lse: Any, out: Any, lse: Any, q: Tensor, k: Tensor, v: Tensor, *settings: Any, **_: Any
) -> int:
    """2.5 times the forward: five products against its two."""
    return 10 * q.shape[-1] * _pairs(q, k, *settings)


def _pairs(q: Tensor, k: Tensor, mask: Any, row_start: Any, cu_seqlens: Any, seed: Any, *settings: Any) -> int:
    """(query, key) pairs over a batch and its query heads; rows that a mask or row_start hides count as whole ones."""
    problem = Problem.unpack(int(k.shape[2]), settings[:11])
    pairs, causal = problem.pattern.pairs, problem.is_causal
    if cu_seqlens is not None:
        # A fake tensor has no values to read: then the packed row counts as one sequence.
        known = not torch_private.is_fake(cu_seqlens)
        lengths = cu_seqlens.diff().tolist() if known else [q.shape[1]]
        first = problem.q_start  # of every sequence: 0, or a segment shift
        ranges = [(first, first + n) for n in lengths]
        total = sum(pairs(problem.seq_len, is_causal=causal, q_range=x, k_range=x) for x in ranges)
    else:
        q_range = (problem.q_start, problem.q_start + q.shape[1])
        k_range = (problem.k_start, problem.k_start + k.shape[1])
        total = pairs(problem.seq_len, is_causal=causal, q_range=q_range, k_range=k_range)
    return int(q.shape[0]) * int(q.shape[2] // k.shape[2]) * total
