"""Rows of a sharded sequence laid out anew: the same sequence in another order, sharded the same way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.ring_attention.utils import buffers
from dilated_attention_pytorch.ring_attention.utils.communication import Channel


class Move(NamedTuple):
    """What one rank does to lay rows out in another order; read backwards, to put them where they were."""

    leaving: Tensor  # int64 (n,), this rank's rows, those for the first rank first
    sent: tuple[int, ...]  # how many go to each rank
    received: tuple[int, ...]  # how many come from each rank
    arriving: Tensor  # int64 (n,), where each row that comes belongs
    is_local: bool  # no row changes ranks, on any rank

    @staticmethod
    def plan(index: Tensor, bounds: tuple[int, ...], rank: int) -> Move:
        """The move after which row p of the whole sequence is what was row `index[p]`, of a permutation int64 `(N,)`
        that is the same on every rank."""
        start, stop = bounds[rank], bounds[rank + 1]
        ends = torch.tensor(bounds[1:], device=index.device)
        # Of each row of the new order: the rank that has it, and the rank that gets it.
        owner = torch.searchsorted(ends, index, right=True)
        place = torch.searchsorted(ends, torch.arange(len(index), device=index.device), right=True)
        # Stable: for each pair of ranks, rows travel in the order of the places they go to.
        mine = owner == rank
        leaving = index[mine] - start
        sent = torch.bincount(place[mine], minlength=len(ends)).tolist()
        received = torch.bincount(owner[start:stop], minlength=len(ends)).tolist()
        arriving = owner[start:stop].argsort(stable=True)
        return Move(leaving, tuple(sent), tuple(received), arriving, bool(torch.equal(owner, place)))

    def reversed(self) -> Move:
        """The move that undoes this one."""
        return Move(self.arriving, self.received, self.sent, self.leaving, self.is_local)


def lay_out(x: Tensor, move: Move, open_channel: Callable[[], Channel], purpose: str = "rows") -> Tensor:
    """Rows `(B, n, ...)` in the new order, differentiable: gradients travel back the same way."""
    if move.is_local:
        return x.index_select(1, move.leaving[move.arriving.argsort()])
    result: Tensor = _Travel.apply(x, move, open_channel, purpose)  # type: ignore[no-untyped-call]
    return result


class _Travel(torch.autograd.Function):
    """One all-to-all of whole rows; its gradient is the same one backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, move: Move, open_channel: Callable[[], Channel], purpose: str) -> Tensor:
        ctx.settings = move, open_channel
        return _exchange(x, move, open_channel(), purpose)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        move, open_channel = ctx.settings
        return _exchange(grads[0], move.reversed(), open_channel(), "gradients"), None, None, None


def _exchange(x: Tensor, move: Move, channel: Channel, purpose: str) -> Tensor:
    # (n, B, ...)
    rows = x.transpose(0, 1)
    buffer = buffers.borrow((len(move.leaving), *rows.shape[1:]), x.dtype, x.device, f"{purpose} sent")
    torch.index_select(rows, 0, move.leaving, out=buffer.tensor)
    pending = channel.exchange(buffer, move.sent, move.received, purpose)
    come = pending.wait()
    result = torch.empty_like(come)
    result[move.arriving] = come
    pending.release()
    return result.transpose(0, 1)
