"""Exchange and attention as one op: `torch.ops.dilated_attention_pytorch.ring_attention`, the group given by name.

One op, so that a compiled graph holds one opaque node with an exact gradient and no communication that a compiler could
move. The lengths of the other ranks' shards are known at run time alone, which makes the size of what is kept for the
backward a dynamic one. Registered as `kernels/ops.py` registers its op.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from dilated_attention_pytorch.core import torch_private, zero_keys
from dilated_attention_pytorch.core.precision import accumulator
from dilated_attention_pytorch.core.problem import SCHEMA, Problem
from dilated_attention_pytorch.kernels.choice import backend_for
from dilated_attention_pytorch.kernels.ops import INPUTS, LIBRARY, derivative, end_of_the_road, register
from dilated_attention_pytorch.ring_attention import exchange
from dilated_attention_pytorch.ring_attention.call import RingCall, choose_mode
from dilated_attention_pytorch.ring_attention.plan import plan_for, unit_bytes
from dilated_attention_pytorch.ring_attention.utils import handshake
from dilated_attention_pytorch.ring_attention.utils.communication import Channel
from dilated_attention_pytorch.types import QKV, AttentionOutput, BackendName, Masks, OutputGradient


class Wire(NamedTuple):
    """How the ranks exchange rows: the op's arguments after those of `Problem.pack`, in the order of `WIRE_SCHEMA`."""

    group_name: str
    mode: str  # of `RingAttentionConfig`, like check
    gradient_dtype: str  # name of a torch dtype, or "" for the accumulator's
    keep_rows: bool  # keep what arrives for the backward
    requires_grad: bool  # whether a backward will follow; the ranks compare it
    same_seed: bool  # the caller gave the seed, so the ranks compare it; else the first rank's is taken
    check: str
    timeout: float | None  # seconds; None for the group's own
    backend: str  # "sdpa" or "triton"


WIRE_SCHEMA = (
    "str group_name, str mode, str gradient_dtype, bool keep_rows, bool requires_grad, bool same_seed, str check, "
    "float? timeout, str backend"
)
# Of this rank's shard.
_MASKS = "Tensor? key_padding, Tensor? seed"
# What arrived (flat), the shards' lengths (CPU), the seed.
_KEPT = "Tensor kept, Tensor lengths, Tensor used_seed"
_SETTINGS = f"{SCHEMA}, {WIRE_SCHEMA}"

_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(f"ring_attention({INPUTS}, {_MASKS}, {_SETTINGS}) -> (Tensor out, Tensor lse, {_KEPT})", tags=_TAGS)
LIBRARY.define(
    f"ring_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_KEPT}, {INPUTS}, {_MASKS}, "
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
# q, k, v, key_padding, seed, *Problem.pack(), *Wire -> out, lse, kept, lengths, used_seed
ring_attention = torch.ops.dilated_attention_pytorch.ring_attention.default
# *OutputGradient, what the forward returned, then as for ring_attention -> dq, dk, dv
ring_attention_backward = torch.ops.dilated_attention_pytorch.ring_attention_backward.default


class _Arguments(NamedTuple):
    """The forward's arguments by name."""

    x: QKV
    masks: Masks
    problem: Problem
    wire: Wire

    @staticmethod
    def of(arguments: tuple[Any, ...]) -> _Arguments:
        x, (key_padding, seed), first = QKV(*arguments[:3]), arguments[3:5], len(arguments) - len(Wire._fields)
        problem = Problem.unpack(x.k.shape[2], arguments[5:first])
        return _Arguments(x, Masks(key_padding, seed=seed), problem, Wire(*arguments[first:]))


# Where a graph breaks at the op, Dynamo would go on with the frames below it.
@torch_private.uncompiled
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    given = _Arguments.of(arguments)
    x, masks, problem, wire = given
    channel, lengths = _open("forward", given)
    # Cloned, since an op may not return its argument.
    if masks.seed is not None:
        seed = masks.seed.clone() if wire.same_seed else channel.broadcast(masks.seed, "seed").wait()
        masks = masks._replace(seed=seed)
    (out, lse), kept = exchange.forward(_call(channel, lengths, x, problem, wire), x, masks)
    return out, lse, kept, torch.tensor(lengths, dtype=torch.int64, device="cpu"), _seed_out(x.q, masks.seed)


@torch_private.uncompiled
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    grad, saved, given = OutputGradient(*arguments[:2]), AttentionOutput(*arguments[2:4]), _Arguments.of(arguments[7:])
    kept, lengths, used_seed = arguments[4:7]
    x, masks, problem, wire = given
    # Ranks compared seeds in the forward; here everybody has the one that was used.
    channel, _ = _open("backward", given._replace(masks=masks._replace(seed=None)))
    masks = masks._replace(seed=used_seed if problem.dropout_p > 0.0 else None)
    call = _call(channel, tuple(lengths.tolist()), x, problem, wire)
    grads = exchange.backward(call, grad, x, saved, kept, masks)
    return tuple(y.to(x.q.dtype).contiguous() for y in grads)


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    q, k, seed = arguments[0], arguments[1], arguments[4]
    wire = Wire(*arguments[-len(Wire._fields) :])
    # Some arguments may be symbolic here: nothing may hash them, as a pattern would.
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulator(q.dtype))
    kept = k.new_empty(torch.library.get_ctx().new_dynamic_size() if wire.keep_rows else 0)
    size = torch_private.process_group(wire.group_name).size()
    lengths = torch.empty(size, dtype=torch.int64, device="cpu")
    return q.new_empty(q.shape), lse, kept, lengths, _seed_out(q, seed)


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in arguments[7:10])


_DERIVATIVE = derivative(ring_attention, ring_attention_backward, 5, is_exchange=True)
_END = end_of_the_road(ring_attention_backward, "expected first derivatives only of ring attention")
register("ring_attention", ring_attention, _forward, _fake_forward, _DERIVATIVE)
register("ring_attention_backward", ring_attention_backward, _backward, _fake_backward, _END)


def _open(phase: str, given: _Arguments) -> tuple[Channel, tuple[int, ...]]:
    """The handshake: everything that must be the same on every rank, by the names users know."""
    (q, k, _), masks, problem, wire = given
    batch, length, heads, width = q.shape
    # Lengths are told, not compared: shards may differ ("n").
    told: dict[str, Any] = {
        "the shape of query (B, n, H, D)": [batch, "n", heads, width],
        "the shape of key and value (B, n, H_kv, D)": [k.shape[0], "n", *k.shape[2:]],
        "dtype": str(q.dtype),
        "device type": q.device.type,
        "segment_lengths": problem.pattern.segment_lengths,
        "dilation_rates": problem.pattern.dilation_rates,
        "offsets": problem.pattern.offsets,
        "segment_shift": problem.q_start,
        "is_causal": problem.is_causal,
        "scale": problem.scale,
        "dropout": problem.dropout_p,
        "padding": problem.padding,
        "seed": int(masks.seed) if masks.seed is not None and wire.same_seed else None,
        "key_padding_mask": "given" if masks.key_padding is not None else "none",
        "remote_rows": "keep" if wire.keep_rows else "refetch",
        **{name: getattr(wire, name) for name in ("requires_grad", "mode", "gradient_dtype", "check", "backend")},
    }
    row = unit_bytes(batch, width, k.element_size()) * k.shape[2]
    return handshake.begin(wire.group_name, told, length, row, phase=phase, check=wire.check, timeout=wire.timeout)


def _call(channel: Channel, lengths: tuple[int, ...], x: QKV, problem: Problem, wire: Wire) -> RingCall:
    bounds = tuple(itertools.accumulate(lengths, initial=problem.q_start))
    plan = plan_for(problem.pattern, bounds, channel.rank, problem.is_causal, x.k.device)
    zeros = problem.padding == "zero_keys"
    if zeros and (branch := zero_keys.moving_branch(plan.pattern, plan.seq_len)) is not None:
        raise ValueError(
            f"expected segments of a multiple of the rate, or one alone, with padding='zero_keys' over ranks, got the "
            f"branch (w={branch[0]}, r={branch[1]}) and {plan.seq_len} positions: the official code moves its rows"
        )
    start, _ = plan.shard
    # The rank's place in the sequence, which the caller could not know.
    # Zero keys are counted once for the whole call, so no part of it counts them.
    problem = replace(problem, q_start=start, k_start=start, seq_len=plan.seq_len, padding="none")
    wire_dtype = getattr(torch, wire.gradient_dtype) if wire.gradient_dtype else accumulator(x.q.dtype)
    mode = choose_mode(plan) if wire.mode == "auto" else wire.mode
    backend = backend_for(x, problem, cast(BackendName, wire.backend))
    return RingCall(plan, problem, mode, backend, channel, wire_dtype, wire.keep_rows, zeros)


def _seed_out(like: Tensor, seed: Tensor | None) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=like.device) if seed is None else seed.clone()
