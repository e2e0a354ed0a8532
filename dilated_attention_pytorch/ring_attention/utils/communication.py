"""Every byte that ring attention puts on the wire, in one place and counted by purpose.

Messages are flat byte buffers with sizes that both ends derive from the plan, so one code path serves every dtype and
backend. Nothing here checks what the bytes mean: `handshake` compares the plans before any of them move.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Import before any process group exists: `torch.distributed.nn` stores the default group in its functions' defaults;
# imported later (torch._dynamo does), the group outlives `destroy_process_group` and a gloo thread aborts at exit.
import torch.distributed.nn
from torch import Tensor

from dilated_attention_pytorch.core import torch_private
from dilated_attention_pytorch.core.memory.handle import Handle
from dilated_attention_pytorch.ring_attention.utils import buffers


class RingError(RuntimeError):
    """Ranks that disagree, died or came too late. The group is not fit for further exchanges after the last two."""


@dataclass
class Traffic:
    """Bytes this rank sent to and received from other ranks, by purpose: "rows", "gradients", "mask", "seed"."""

    sent: dict[str, int] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)  # how many exchanges


# On CUDA the backward runs in a thread of its own.
_lock = threading.Lock()
_counters: list[Traffic] = []


@contextmanager
def counting() -> Iterator[Traffic]:
    """Counts what this process moves inside the `with`."""
    traffic = Traffic()
    with _lock:
        _counters.append(traffic)
    try:
        yield traffic
    finally:
        with _lock:
            # By identity: two counters may hold equal numbers.
            _counters[:] = [t for t in _counters if t is not traffic]


def _count(purpose: str, sent: int, received: int) -> None:
    with _lock:
        for traffic in _counters:
            for table, amount in ((traffic.sent, sent), (traffic.received, received), (traffic.calls, 1)):
                table[purpose] = table.get(purpose, 0) + amount


class Channel:
    """One process group as one call of ring attention uses it."""

    def __init__(
        self, group: dist.ProcessGroup, timeout: float, label: str, explain: Callable[[str], str] | None = None
    ) -> None:
        self.group = group
        self.rank: int = group.rank()
        self.world_size: int = group.size()
        self.timeout = timedelta(seconds=timeout)
        self.label = label  # what the call is doing, for errors: "forward, step 3"
        self._explain = explain  # takes a failure's message and returns what the ranks know about it

    def exchange(
        self, buffer: Handle, sent: Sequence[int], received: Sequence[int], purpose: str, keep: bool = False
    ) -> Pending:
        """Starts one all-to-all; the caller goes on computing and asks the result to `wait`.

        Args:
            buffer: rows for all ranks, one rank after another, as they arrive too; released once they are sent.
            sent, received: how many rows go to each rank and come from it.
            purpose: what they are counted as.
            keep: whether the result outlives the call; it is an ordinary tensor then.
        """
        send = buffer.tensor
        lent, result = _receiver((sum(received), *send.shape[1:]), send, purpose, keep)
        # The callers count rows, the transport bytes.
        row = send.shape[1:].numel() * send.element_size()
        outgoing, incoming = [n * row for n in sent], [n * row for n in received]
        _count(purpose, sum(outgoing) - outgoing[self.rank], sum(incoming) - incoming[self.rank])
        pending = Pending(self, result, purpose, dict(enumerate(incoming)), buffer, lent)
        both = as_bytes(result), as_bytes(send)
        return pending.start(lambda: torch_private.all_to_all(self.group, *both, incoming, outgoing, self.timeout))

    def gather(self, buffer: Handle, purpose: str, *, keep: bool = False) -> Pending:
        """Starts an all-gather of equally shaped tensors; the result has the ranks in a new first dimension."""
        x = buffer.tensor
        lent, result = _receiver((self.world_size, *x.shape), x, purpose, keep)
        others = x.nbytes * (self.world_size - 1)
        _count(purpose, others, others)
        pending = Pending(self, result, purpose, dict.fromkeys(range(self.world_size), x.nbytes), buffer, lent)
        both = as_bytes(result), as_bytes(x)
        return pending.start(lambda: torch_private.all_gather(self.group, *both, self.timeout))

    def broadcast(self, x: Tensor, purpose: str) -> Pending:
        """Starts a broadcast of the first rank's tensor; the result is an ordinary one, which a backward may read."""
        result, is_first = x.clone(), self.rank == 0
        _count(purpose, x.nbytes * (self.world_size - 1) * is_first, x.nbytes * (not is_first))
        pending = Pending(self, result, purpose, {0: x.nbytes})
        return pending.start(lambda: torch_private.broadcast(self.group, as_bytes(result), self.timeout))

    def failed(self, purpose: str, incoming: dict[int, int], cause: BaseException) -> RingError:
        """The error for an exchange that did not come to its end."""
        expected = ", ".join(f"{n} from rank {p}" for p, n in incoming.items() if n and p != self.rank) or "none"
        message = (
            f"ring attention ({self.label}): the exchange of {purpose} failed on rank {self.rank} "
            f"of {self.world_size}; bytes expected: {expected}"
        )
        known = "" if self._explain is None else self._explain(message)
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        return RingError(f"{message}. {known}The transport says: {reason}")


# Exchanges that were started and not waited for. One that failed, or that an exception kept from being waited for,
# stays here for good: the transport may still read and write its buffers, so the pool must not lend them again.
_flying: set[Pending] = set()


@dataclass(eq=False)
class Pending:
    """An exchange under way. What it sends lives until `wait` has returned, what it receives until `release`."""

    channel: Channel
    result: Tensor
    purpose: str
    incoming: dict[int, int]  # bytes by rank
    sends: Handle | None = None
    receives: Handle | None = None
    work: Any = None

    def start(self, launch: Callable[[], Any]) -> Pending:
        """Launches the collective."""
        _flying.add(self)
        self.work = self._tried(launch)
        return self

    def _tried(self, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except RuntimeError as error:
            raise self.channel.failed(self.purpose, self.incoming, error) from error

    def wait(self) -> Tensor:
        """The result; on CUDA the current stream waits, not the host."""
        if self.work is not None:
            self._tried(self.work.wait)
            self.work = None
            _flying.discard(self)
            # Sent: the pool may lend that memory again. What arrived is read until `release`.
            if self.sends is not None:
                self.sends.release()
        return self.result

    def release(self) -> None:
        """Gives the result's memory back, unless it is kept: everything that reads it is queued."""
        if self.receives is not None:
            self.receives.release()


def _receiver(shape: tuple[int, ...], like: Tensor, purpose: str, keep: bool) -> tuple[Handle | None, Tensor]:
    """Memory for what arrives."""
    if keep:
        return None, like.new_empty(shape)
    lent = buffers.borrow(shape, like.dtype, like.device, f"{purpose} received")
    return lent, lent.tensor


def as_bytes(x: Tensor) -> Tensor:
    """The tensor's memory as a flat uint8 tensor."""
    assert x.is_contiguous()
    return x.view(-1).view(torch.uint8)


def priority_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A twin of an NCCL group whose kernels run on a high-priority stream; any other group itself.

    An exchange then takes multiprocessors as attention's tiles free them, where it would else wait for the kernel to
    end. Collective over the group.
    """
    if not torch.cuda.is_available() or "nccl" not in dist.get_backend(group):
        return group
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    ranks = dist.get_process_group_ranks(group)
    twin = dist.new_group(ranks, backend="nccl", pg_options=options, use_local_synchronization=True)
    assert isinstance(twin, dist.ProcessGroup)
    return twin
