"""What is computed while a range is on the device: forward and backward, one range after another.

Branches whose segments no range cuts are one call on the range's own rows. A branch with longer segments, or segments
that a range cuts, is computed from its compact rows in the range where a segment begins; the result stays on the device
and is merged into every range that the segment reaches. So each pair is computed once, and each row is brought in and
written out once, but for the compact rows that lie ahead of a range: 1 in r.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core.merge import merge_into
from dilated_attention_pytorch.kernels.backend import Backend
from dilated_attention_pytorch.streaming.compact import CompactBranch
from dilated_attention_pytorch.streaming.ranges import RangePlan
from dilated_attention_pytorch.streaming.sources import Reader
from dilated_attention_pytorch.types import QKV, AttentionOutput, Masks, OutputGradient


class Load(NamedTuple):
    """One tensor that a range needs: rows in `[start, stop)`, all of them or those that a branch keeps.

    Attributes:
        name: which input.
        branch: None for all rows.
    """

    name: str
    branch: CompactBranch | None
    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def key(self) -> tuple[str, CompactBranch | None]:
        """What a pass finds the tensor by."""
        return self.name, self.branch

    @property
    def nbytes(self) -> int:
        """Its size."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Loaded = dict[tuple[str, CompactBranch | None], Tensor]


class Part(NamedTuple):
    """Results of a branch's segments in `[start, stop)`, each `(B, L, h, G, ...)`, until the ranges have passed."""

    start: int
    stop: int
    results: tuple[Tensor, ...]

    def after(self, branch: CompactBranch, position: int) -> Part | None:
        """What is left of it for ranges from `position` on: the segment that position lies in."""
        start = max(self.start, position // branch.length * branch.length)
        if position >= self.stop:
            return None
        if start == self.start:
            return self
        rows = slice(branch.count(self.start, start), None)
        return Part(start, self.stop, tuple(x[:, rows].clone() for x in self.results))  # frees the rest


class Pass(ABC):
    """One walk over the ranges.

    Args:
        plan: the ranges.
        readers: the inputs by name.
        engine: the backend's module, `core.sdpa` or the Triton launcher.
    """

    def __init__(self, plan: RangePlan, readers: dict[str, Reader], engine: Backend) -> None:
        self.plan, self.readers, self.engine = plan, readers, engine
        self._parts: dict[CompactBranch, list[Part]] = {branch: [] for branch in plan.compact}

    def loads(self, start: int, stop: int) -> list[Load]:
        """Everything to bring in for a range."""
        found = [
            Load(name, None, start, stop, (x.shape[0], stop - start, *x.shape[2:]), x.dtype)
            for name, x in self.readers.items()
        ]
        for branch in self.plan.compact:
            first, last = branch.beginning_in(start, stop)
            if first == last or branch.count(stop, last) == 0:
                continue
            for name, x in self.readers.items():
                shape = branch.shape(x.shape, branch.count(stop, last))
                found.append(Load(name, branch, stop, last, shape, x.dtype))
        return found

    def compute(self, start: int, stop: int, loaded: Loaded) -> dict[str, Tensor]:
        """The results of a range, by output; ranges come in order."""
        for branch, parts in self._parts.items():
            first, last = branch.beginning_in(start, stop)
            if branch.count(first, last):
                parts.append(Part(first, last, self._attend(branch, start, stop, loaded)))
        own = {name: x for (name, branch), x in loaded.items() if branch is None}
        results = self._range(start, stop, own)
        for branch, parts in self._parts.items():
            left = [part.after(branch, stop) for part in parts]
            parts[:] = [part for part in left if part is not None]
        return results

    def reset(self) -> None:
        """Forgets what earlier ranges left behind."""
        for parts in self._parts.values():
            parts.clear()

    @abstractmethod
    def _range(self, start: int, stop: int, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """The range's results from its own rows and the parts."""

    @abstractmethod
    def _compact(self, branch: CompactBranch, rows: int, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The results of so many compact rows, `(B, L, heads, ...)` each."""

    def _attend(self, branch: CompactBranch, start: int, stop: int, loaded: Loaded) -> tuple[Tensor, ...]:
        """The results of the segments that begin in the range: its own rows, then those that lie ahead of it."""
        first, last = branch.beginning_in(start, stop)
        here, rows = branch.count(first, min(stop, last)), branch.count(first, last)
        gathered = {}
        for name in self.readers:
            own = loaded[name, None]
            beside = branch.empty(own, rows)
            branch.gather(own, start, first, min(stop, last), beside[:, :here])
            if here < rows:
                beside[:, here:].copy_(loaded[name, branch])
            gathered[name] = beside if beside.dim() == 2 else beside.flatten(2, 3)
        results = self._compact(branch, rows, gathered)
        return tuple(x.unflatten(2, (branch.num_heads, -1)) for x in results)

    def _meeting(self, start: int, stop: int) -> list[tuple[CompactBranch, Part, int, int]]:
        """The parts that reach into a range, and where."""
        return [
            (branch, part, max(start, part.start), min(stop, part.stop))
            for branch, parts in self._parts.items()
            for part in parts
            if max(start, part.start) < min(stop, part.stop)
        ]


class ForwardPass(Pass):
    """out and lse."""

    def _range(self, start: int, stop: int, x: dict[str, Tensor]) -> dict[str, Tensor]:
        q = x["q"]
        problem = self.plan.aligned
        accumulator = torch.promote_types(q.dtype, torch.float32)
        if problem is None:
            out = torch.zeros_like(q, dtype=accumulator)
            lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=accumulator)
        else:
            whole = problem.at(0, 0, stop - start)
            out, lse = self.engine.forward(QKV(q, x["k"], x["v"]), whole, Masks(x.get("mask")))
        meeting = self._meeting(start, stop)
        if meeting:
            out = out.to(accumulator)
        rows_lse = lse.transpose(1, 2).unsqueeze(-1)
        for branch, part, first, last in meeting:
            part_out, part_lse = part.results
            # Both walk the same spans in the same order.
            outs = branch.pairs(out, start, part_out, part.start, first, last)
            lses = branch.pairs(rows_lse, start, part_lse, part.start, first, last)
            for (into, new), (into_lse, new_lse) in zip(outs, lses, strict=True):
                merge_into(into, into_lse, new, new_lse)
        return {"out": out.to(q.dtype), "lse": lse.transpose(1, 2)}

    def _compact(self, branch: CompactBranch, rows: int, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        problem = branch.problem(rows, self.plan.problem.is_causal, self.plan.problem.scale)
        out, lse = self.engine.forward(QKV(x["q"], x["k"], x["v"]), problem, Masks(x.get("mask")))
        return out, lse.transpose(1, 2).unsqueeze(-1)


class BackwardPass(Pass):
    """dq, dk and dv, given the out and lse of all keys: with them every part's gradients are exact by themselves."""

    def _range(self, start: int, stop: int, x: dict[str, Tensor]) -> dict[str, Tensor]:
        q, k, v = x["q"], x["k"], x["v"]
        accumulator = torch.promote_types(q.dtype, torch.float32)
        grads: tuple[Tensor, ...]
        if self.plan.aligned is None:
            grads = tuple(torch.zeros_like(t, dtype=accumulator) for t in (q, k, v))
        else:
            grads = self._engine(self.plan.aligned.at(0, 0, stop - start), x)
        meeting = self._meeting(start, stop)
        if meeting:
            grads = tuple(grad.to(accumulator) for grad in grads)
        for branch, part, first, last in meeting:
            for grad, results in zip(grads, part.results, strict=True):
                for into, new in branch.pairs(grad, start, results, part.start, first, last):
                    into.add_(new)
        return {name: grad.to(q.dtype) for name, grad in zip(("dq", "dk", "dv"), grads, strict=True)}

    def _compact(self, branch: CompactBranch, rows: int, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return self._engine(branch.problem(rows, self.plan.problem.is_causal, self.plan.problem.scale), x)

    def _engine(self, problem: Any, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        saved = AttentionOutput(x["out"], x["lse"].transpose(1, 2))
        inputs = QKV(x["q"], x["k"], x["v"])
        return self.engine.backward(OutputGradient(x["grad_out"], None), inputs, saved, problem, Masks(x.get("mask")))
