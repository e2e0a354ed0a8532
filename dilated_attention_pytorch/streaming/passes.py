"""What is computed while a range is on the device: forward and backward, one range after another.

Branches whose segments no range cuts are one call on the range's own rows. A branch with longer segments, or segments
that a range cuts, is computed from its compact rows in the range where a segment begins; the result stays on the device
and is merged into every range that the segment reaches. So each pair is computed once, and each row is brought in and
written out once, but for the compact rows that lie ahead of a range: 1 in r.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from dilated_attention_pytorch.core.merge import merge_into, rows_last
from dilated_attention_pytorch.core.precision import accumulator
from dilated_attention_pytorch.core.problem import Problem
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
Rows = tuple[Tensor, ...]  # one per result, (B, n, ...): out and lse, or dq, dk and dv


class Carried(NamedTuple):
    """Results of a branch's segments in `[start, stop)`, `(B, L, h, G, ...)`, kept until the ranges have passed."""

    start: int
    stop: int
    results: tuple[Tensor, ...]

    def after(self, branch: CompactBranch, position: int) -> Carried | None:
        """What ranges from `position` on still need: the segment that position lies in, and later ones."""
        start = max(self.start, position // branch.members.length * branch.members.length)
        if position >= self.stop:
            return None
        if start == self.start:
            return self
        rows = slice(branch.count(self.start, start), None)
        return Carried(start, self.stop, tuple(x[:, rows].clone() for x in self.results))  # frees the rest


class Pass(ABC):
    """One walk over the ranges.

    Args:
        plan: the ranges.
        readers: the inputs by name.
        engine: the backend that computes.
    """

    def __init__(self, plan: RangePlan, readers: dict[str, Reader], engine: Backend) -> None:
        self.plan, self.readers, self.engine = plan, readers, engine
        self._carried: dict[CompactBranch, list[Carried]] = {branch: [] for branch in plan.compact}

    def loads(self, start: int, stop: int) -> list[Load]:
        """Everything to bring in for a range."""
        found = [
            Load(name, None, start, stop, (x.shape[0], stop - start, *x.shape[2:]), x.dtype)
            for name, x in self.readers.items()
        ]
        for branch in self.plan.compact:
            first, last = branch.beginning_in(start, stop)
            ahead = branch.count(stop, last)
            if first < last and ahead:
                for name, x in self.readers.items():
                    found.append(Load(name, branch, stop, last, branch.shape(x.shape, ahead), x.dtype))
        return found

    def compute(self, start: int, stop: int, loaded: Loaded) -> dict[str, Tensor]:
        """The results of a range, by output; ranges come in order."""
        # 1. Segments that begin here, of branches that ranges cut.
        for branch, carried in self._carried.items():
            first, last = branch.beginning_in(start, stop)
            if branch.count(first, last):
                carried.append(Carried(first, last, self._begin(branch, start, stop, loaded)))
        # 2. All branches that ranges do not cut, in one call.
        own = {name: x for (name, branch), x in loaded.items() if branch is None}
        if self.plan.aligned is None:
            totals = self._nothing(own["q"], own["k"])
        else:
            totals = self._attend(self.plan.aligned.at(0, 0, stop - start), own)
        # 3. What reaches into the range is added, in fp32 at least.
        dtype = own["q"].dtype
        if any(start < x.stop and x.start < stop for carried in self._carried.values() for x in carried):
            totals = tuple(x.to(accumulator(dtype)) for x in totals)
        for branch, carried in self._carried.items():
            for x in carried:
                bounds = max(start, x.start), min(stop, x.stop)
                if bounds[0] < bounds[1]:
                    views = [
                        branch.pairs(total, start, new, x.start, *bounds)
                        for total, new in zip(totals, x.results, strict=True)
                    ]
                    for pairs in zip(*views, strict=True):  # all walk the same spans in the same order
                        self._add(pairs)
            left = [x.after(branch, stop) for x in carried]
            carried[:] = [x for x in left if x is not None]
        return self._named(totals, dtype)

    def reset(self) -> None:
        """Forgets what earlier ranges left behind."""
        for carried in self._carried.values():
            carried.clear()

    def _begin(self, branch: CompactBranch, start: int, stop: int, loaded: Loaded) -> Rows:
        """The results of the segments that begin in the range: from its own rows, then those that lie ahead of it."""
        first, last = branch.beginning_in(start, stop)
        here, rows = branch.count(first, min(stop, last)), branch.count(first, last)
        gathered = {}
        for name in self.readers:
            own = loaded[name, None]
            beside = own.new_empty(branch.shape(tuple(own.shape), rows))  # (B, L, h, G, ...)
            branch.gather(own, start, first, min(stop, last), beside[:, :here])
            if here < rows:
                beside[:, here:].copy_(loaded[name, branch])
            gathered[name] = beside if beside.dim() == 2 else beside.flatten(2, 3)
        results = self._attend(branch.problem(self.plan.problem, rows), gathered)
        return tuple(x.unflatten(2, (branch.num_heads, -1)) for x in results)

    @abstractmethod
    def _attend(self, problem: Problem, x: dict[str, Tensor]) -> Rows:
        """The results of one call, from its inputs by name."""

    @abstractmethod
    def _nothing(self, q: Tensor, k: Tensor) -> Rows:
        """The results where no key is seen, in the accumulator's dtype."""

    @abstractmethod
    def _add(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Adds to each total, in place, what a branch contributes; both `(B, segments, slots, ...)`."""

    @abstractmethod
    def _named(self, totals: Rows, dtype: torch.dtype) -> dict[str, Tensor]:
        """The results by name, in the inputs' dtype."""


class ForwardPass(Pass):
    """out and lse; rows of lse are `(B, n, H, 1)` until they leave."""

    @override
    def _attend(self, problem: Problem, x: dict[str, Tensor]) -> Rows:
        out, lse = self.engine.forward(QKV(x["q"], x["k"], x["v"]), problem, Masks(x.get("key_padding_mask")))
        return out, rows_last(lse)

    @override
    def _nothing(self, q: Tensor, k: Tensor) -> Rows:
        out = torch.zeros_like(q, dtype=accumulator(q.dtype))
        return out, out.new_full((*q.shape[:3], 1), -torch.inf)

    @override
    def _add(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        (out, new_out), (lse, new_lse) = pairs
        merge_into(out, lse, new_out, new_lse)

    @override
    def _named(self, totals: Rows, dtype: torch.dtype) -> dict[str, Tensor]:
        out, lse = totals
        return {"out": out.to(dtype), "lse": lse.squeeze(-1)}


class BackwardPass(Pass):
    """dq, dk and dv; given the out and lse of all keys, every part's gradients are exact by themselves."""

    @override
    def _attend(self, problem: Problem, x: dict[str, Tensor]) -> Rows:
        grad, saved = OutputGradient(x["grad_out"], None), AttentionOutput(x["out"], x["lse"].transpose(1, 2))
        return self.engine.backward(grad, QKV(x["q"], x["k"], x["v"]), saved, problem, Masks(x.get("key_padding_mask")))

    @override
    def _nothing(self, q: Tensor, k: Tensor) -> Rows:
        return tuple(torch.zeros_like(x, dtype=accumulator(q.dtype)) for x in (q, k, k))

    @override
    def _add(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        for grad, new in pairs:
            grad.add_(new)

    @override
    def _named(self, totals: Rows, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: grad.to(dtype) for name, grad in zip(("dq", "dk", "dv"), totals, strict=True)}
