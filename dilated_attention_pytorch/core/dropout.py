"""The dropout mask as a pure function of (seed, batch, head, branch, query, key).

A mask that depends on nothing else is the same on one device or many, whole or in parts, forward and backward.
The function is a chain of 32-bit integer hashes (the "lowbias32" finaliser of Wellons' hash prospector), cheap enough
to be evaluated again wherever it is needed, in torch here and in a kernel's registers elsewhere.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def seed_tensor(seed: int | Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    """A checked seed as an int64 scalar on the device, drawn when absent; None where nothing is dropped."""
    if dropout_p == 0.0:
        return None
    if isinstance(seed, Tensor):
        return seed.reshape(()).to(device, torch.int64)
    if seed is None:
        return torch.randint(-(2**62), 2**62, (), device=device)
    return torch.tensor(operator.index(seed), dtype=torch.int64, device=device)


def mix(x: Tensor) -> Tensor:
    """The 32-bit finaliser, on int64 tensors that hold 32-bit values (torch has no uint32 product)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def absorb(state: Tensor, value: Tensor | int) -> Tensor:
    """The state after one more 32-bit word."""
    word = value & _MASK
    return mix(state ^ word ^ _GOLDEN)


def row_state(seed: Tensor, batch: Tensor, head: Tensor, query: Tensor) -> Tensor:
    """The hash state of a query row, before the branch is absorbed.

    Args:
        seed: int64 scalar.
        batch: int64, index of the row in the batch (of the sequence, when packed).
        head: int64, query head.
        query: int64, position of the query in its sequence. All broadcast against each other.
    """
    state = absorb(absorb(torch.zeros_like(seed), seed), seed >> 32)
    return absorb(absorb(absorb(state, batch), head), query)


def keep_mask(branch_state: Tensor, key: Tensor, dropout_p: float) -> Tensor:
    """True where a weight is kept: `absorb(branch_state, key)` at or above `dropout_p * 2^32`.

    Args:
        branch_state: `absorb(row_state(...), branch)`.
        key: int64, position of the key in its sequence. Broadcasts.
        dropout_p: in [0, 1).
    """
    return absorb(branch_state, key) >= int(dropout_p * 2**32)
