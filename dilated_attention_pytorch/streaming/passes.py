"""What is computed while a range is on the device: forward and backward, one range after another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from dilated_attention_pytorch.core.merge import merge_into, rows_last
from dilated_attention_pytorch.core.precision import accumulator
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels.backend import Backend
from dilated_attention_pytorch.streaming.ranges import CompactBranch, RangePlan
from dilated_attention_pytorch.streaming.sources import Reader
from dilated_attention_pytorch.types import QKV, AttentionOutput, Masks, OutputGradient


class Load(NamedTuple):
    """One tensor that a range needs: its rows in `[start, stop)`, or those of them that a branch keeps."""

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
Named = dict[str, Tensor]  # inputs by argument name, (B, n, ...)
Results = tuple[Tensor, ...]  # out and lse, or dq, dk and dv; (B, n, H, D), lse (B, n, H, 1)


class Carried(NamedTuple):
    """Results of a branch's segments in `[start, stop)`, `(B, L, h, G, ...)`, kept until the ranges have passed."""

    start: int
    stop: int
    results: Results

    def after(self, branch: CompactBranch, position: int) -> Carried | None:
        """What ranges from `position` on still need: the segment in which it lies."""
        start = max(self.start, branch.segment_start(position))
        if position >= self.stop:
            return None
        if start == self.start:
            return self
        rows = slice(branch.count(self.start, start), None)
        return Carried(start, self.stop, tuple(x[:, rows].clone() for x in self.results))  # frees the rest


# Branches whose segments no range cuts are one call on the range's own rows. A branch with longer segments, or segments
# that a range cuts, is computed from its compact rows in the range where a segment begins; the result stays on the
# device and is merged into every range that the segment reaches. So each pair is computed once, and each row is brought
# in and written out once, but for the compact rows that lie ahead of a range: 1 in r.
class Pass(ABC):
    """One walk over the ranges of a plan: inputs by name, and the backend that computes."""

    names: tuple[str, ...]  # of the results

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
            # Rows of the segments that begin here, as far as they lie behind the range.
            first, last = branch.beginning_in(start, stop)
            if ahead := branch.count(max(first, stop), last):
                for name, x in self.readers.items():
                    found.append(Load(name, branch, stop, last, branch.shape(x.shape, ahead), x.dtype))
        return found

    def compute(self, start: int, stop: int, loaded: Loaded) -> dict[str, Tensor]:
        """The results of a range, by name; ranges come in order, and the last one leaves nothing behind."""
        own = {name: x for (name, branch), x in loaded.items() if branch is None}
        dtype = own["q"].dtype
        # 1. Branches that ranges cut: the segments that begin here, whole.
        for branch, carried in self._carried.items():
            first, last = branch.beginning_in(start, stop)
            if branch.count(first, last):
                carried.append(Carried(first, last, self._begin(branch, start, stop, loaded)))
        # 2. The other branches, in one call on the range's own rows.
        aligned = self.plan.aligned
        at = self.plan.inside(start)
        totals = self._attend(aligned and aligned.at(at, at, at + stop - start), own)
        # 3. What is carried is added where it reaches into the range, in fp32 at least.
        if any(self._carried.values()):
            totals = tuple(x.to(accumulator(dtype)) for x in totals)
        for branch, carried in self._carried.items():
            for part in carried:
                bounds = max(start, part.start), min(stop, part.stop)
                views = [
                    branch.pairs(total, start, new, part.start, *bounds)
                    for total, new in zip(totals, part.results, strict=True)
                ]
                for pairs in zip(*views, strict=True):  # all walk the same spans in the same order
                    self._add(pairs)
            carried[:] = [left for part in carried if (left := part.after(branch, stop)) is not None]
        # lse (B, n, H, 1) -> (B, n, H) keeps its dtype; values are rounded to the inputs'.
        return {
            name: x.squeeze(-1) if name == "lse" else x.to(dtype) for name, x in zip(self.names, totals, strict=True)
        }

    def _begin(self, branch: CompactBranch, start: int, stop: int, loaded: Loaded) -> Results:
        """The results of the segments that begin in the range: from its own rows, then those that lie ahead of it."""
        first, last = branch.beginning_in(start, stop)
        here, rows = branch.count(first, min(stop, last)), branch.count(first, last)  # in the range, and in all
        gathered = {}
        for name in self.readers:
            own = loaded[name, None]
            beside = own.new_empty(branch.shape(tuple(own.shape), rows))  # (B, L, h, G, ...)
            branch.gather(own, start, first, min(stop, last), beside[:, :here])
            if here < rows:
                beside[:, here:].copy_(loaded[name, branch])
            gathered[name] = beside if beside.dim() == 2 else beside.flatten(2, 3)  # (B, L, h * G, ...)
        results = self._attend(branch.problem(self.plan.problem, first, rows), gathered)
        return tuple(x.unflatten(2, (branch.num_heads, -1)) for x in results)

    @abstractmethod
    def _attend(self, problem: Problem | None, x: Named) -> Results:
        """The results of one call; without a problem those of no keys, in the accumulator's dtype."""

    @abstractmethod
    def _add(self, pairs: tuple[tuple[Tensor, Tensor], ...]) -> None:
        """Adds to each total, in place, what a branch contributes; both `(B, segments, slots, ...)`."""


class ForwardPass(Pass):
    """out and lse."""

    names = ("out", "lse")

    @override
    def _attend(self, problem: Problem | None, x: Named) -> Results:
        if problem is None:
            out = torch.zeros_like(x["q"], dtype=accumulator(x["q"].dtype))
            return out, out.new_full((*out.shape[:3], 1), -torch.inf)
        out, lse = self.engine.forward(_qkv(x), problem, _masks(x, problem))
        return out, rows_last(lse)  # lse (B, H, n) -> (B, n, H, 1)

    @override
    def _add(self, pairs: tuple[tuple[Tensor, Tensor], ...]) -> None:
        (out, new_out), (lse, new_lse) = pairs
        merge_into(out, lse, new_out, new_lse)


class BackwardPass(Pass):
    """dq, dk and dv; given the out and lse of all keys, every part's gradients are exact by themselves."""

    names = ("dq", "dk", "dv")

    @override
    def _attend(self, problem: Problem | None, x: Named) -> Results:
        if problem is None:
            return tuple(torch.zeros_like(rows, dtype=accumulator(rows.dtype)) for rows in _qkv(x))
        grad, saved = OutputGradient(x["grad_out"], None), AttentionOutput(x["out"], x["lse"].transpose(1, 2))
        return self.engine.backward(grad, _qkv(x), saved, problem, _masks(x, problem))

    @override
    def _add(self, pairs: tuple[tuple[Tensor, Tensor], ...]) -> None:
        # The global lse is in every part's weights, so parts need no rescaling.
        for grad, new in pairs:
            grad.add_(new)


def _qkv(x: Named) -> QKV:
    return QKV(x["q"], x["k"], x["v"])


def _masks(x: Named, problem: Problem) -> Masks:
    bits = x.get("key_padding_mask")
    # A mask has a bit for each position, from 0 on.
    return Masks(bits if bits is None else torch.nn.functional.pad(bits, (problem.q_start, 0)))
