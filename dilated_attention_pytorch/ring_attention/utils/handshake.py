"""What the ranks compare before data moves, and how they find out who is missing.

Both go through the process group's store, on the host: no device is synchronised, the missing are known by name, and
the store outlives a rank that dies (torchrun keeps it in the agent).
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from dilated_attention_pytorch.core import torch_private
from dilated_attention_pytorch.ring_attention.utils.communication import Channel, RingError

if TYPE_CHECKING:
    from dilated_attention_pytorch.core.torch_private import Store

# Seconds in which ranks that failed together hear of one another.
_GRACE = 1.0


@dataclass
class GroupState:
    """What a rank remembers of a group between calls."""

    store: Store  # the group's, on a connection of its own where the store allows it
    step: int = 0  # exchanges begun
    handshakes: int = 0  # fingerprints compared
    previous: str = ""  # the fingerprint of the last exchange
    lengths: tuple[int, ...] = ()  # of the shards then


_states: WeakKeyDictionary[dist.ProcessGroup, GroupState] = WeakKeyDictionary()


def state_of(group: dist.ProcessGroup) -> GroupState:
    """The group's state, begun when first asked for."""
    if group not in _states:
        _states[group] = GroupState(torch_private.group_store(group))
    return _states[group]


def begin(
    group_name: str, told: dict[str, Any], length: int, row_bytes: int, *, phase: str, check: str, timeout: float | None
) -> tuple[Channel, tuple[int, ...]]:
    """Opens an exchange: the channel to exchange through, and every rank's length.

    Ranks compare what they tell where `check` asks for it (as in `RingAttentionConfig`): `RingError` on every rank
    alike where they differ; on those that wait, for ranks that do not come.

    Args:
        told: everything that must be the same on every rank, by the name an error will give it.
        length, row_bytes: positions of this rank's shard, and bytes of K and V per position.
    """
    group = torch_private.process_group(group_name)
    state = state_of(group)
    state.step += 1
    label = f"{phase}, step {state.step}"
    if timeout is None:
        timeout = torch_private.group_timeout(group).total_seconds()
    channel = Channel(group, timeout, label, lambda message: _explain(state, group, message))
    told = {"phase": phase, **told, "length": length}
    mine = json.dumps(told)
    # Nobody asks, so nobody hears of other lengths.
    if check == "never":
        return channel, (length,) * group.size()
    if check == "always" or mine != state.previous:
        # With the step: ranks that compare at different ones would go on with each other's rows.
        stepped = json.dumps({"step": state.step, **told})
        state.lengths = _compare(state, group, stepped, length * row_bytes, label, timeout)
        state.previous = mine
    return channel, state.lengths


def _compare(
    state: GroupState, group: dist.ProcessGroup, mine: str, size: int, label: str, timeout: float
) -> tuple[int, ...]:
    state.handshakes += 1
    number, rank, ranks = state.handshakes, group.rank(), range(group.size())
    keys = [f"ring/{number}/{r}" for r in ranks]
    name = f"ring attention ({label}): comparing plans"
    try:
        state.store.set(keys[rank], mine)
        try:
            state.store.wait(keys, timedelta(seconds=timeout))
        except dist.DistStoreError:
            # The last of them may have come since.
            missing = [r for r in ranks if not state.store.check([keys[r]])]
            if missing:
                raise _late(state, f"ring/{number}/given_up", name, missing, size, timeout) from None
        if state.store.check([f"ring/{number}/given_up"]):
            raise RingError(state.store.get(f"ring/{number}/given_up").decode())
        # Who has posted this number has read the one before the last.
        if number > 2:
            state.store.delete_key(f"ring/{number - 2}/{rank}")
        all_of_them = [json.loads(text) for text in state.store.multi_get(keys)]
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise RingError(f"{name} on rank {rank} failed: the group's store is gone ({error})") from error
    lengths = tuple(one.pop("length") for one in all_of_them)
    # Every rank reads the same fingerprints, so all of them raise the same error, or none does.
    if differing := "; on ".join(_disagreements(all_of_them)):
        raise RingError(f"{name}: ranks disagree on {differing}")
    return lengths


def _late(state: GroupState, key: str, name: str, missing: list[int], size: int, timeout: float) -> RingError:
    """The error for ranks that did not come; left in the store, so that one that comes late reads it too."""
    message = (
        f"{name}: ranks {missing} did not come within {timeout:g} s (dead, late, or making another call); "
        f"a shard like this rank's holds {size} bytes of K and V that would have travelled with each"
    )
    # The first to give up decides what everybody reads.
    return RingError(state.store.compare_set(key, "", message).decode())


def _disagreements(fingerprints: list[dict[str, Any]]) -> Iterator[str]:
    """What each rank says, for everything that some say differently."""
    for name in dict.fromkeys(itertools.chain.from_iterable(fingerprints)):
        ranks: dict[str, list[int]] = {}
        for rank, one in enumerate(fingerprints):
            ranks.setdefault(repr(one[name]) if name in one else "nothing", []).append(rank)
        if len(ranks) > 1:
            yield f"{name}: " + ", ".join(f"{value} on ranks {who}" for value, who in ranks.items())


def _explain(state: GroupState, group: dist.ProcessGroup, message: str) -> str:
    """Which ranks failed at this step as well, and so which did not even come this far."""
    try:
        keys = [f"ring/failed/{state.step}/{r}" for r in range(group.size())]
        early = any(state.store.check([key]) for key in keys)
        state.store.set(keys[group.rank()], message)
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline and not state.store.check(keys):
            time.sleep(0.02)
        # A rank that failed as well has said so by now; one that says nothing is dead, late or elsewhere.
        silent = [r for r, key in enumerate(keys) if not state.store.check([key])]
    except RuntimeError as error:
        return f"The group's store is gone too, perhaps with a rank that died ({str(error).splitlines()[0]}). "
    if silent:
        return f"Ranks {silent} did not report: dead or late. "
    return "Every rank reports a failure; this one came after another had given up. " if early else ""
