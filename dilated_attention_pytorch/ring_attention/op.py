"""Exchange and attention as one op: `torch.ops.dilated_attention_pytorch.ring_attention`, the group given by name.

One op, so that a compiled graph holds one opaque node with an exact gradient and no communication that a compiler could
move. The lengths of the other ranks' shards are known at run time alone, which makes the size of what is kept for the
backward a dynamic one.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

from dilated_attention_pytorch.core import zero_keys
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels.choice import backend_for
from dilated_attention_pytorch.ring_attention import schedule
from dilated_attention_pytorch.ring_attention.plan import RingPlan, plan_for, unit_bytes
from dilated_attention_pytorch.ring_attention.step import BackendStep
from dilated_attention_pytorch.ring_attention.utils import handshake
from dilated_attention_pytorch.ring_attention.utils.communication import Channel
from dilated_attention_pytorch.types import QKV

_DENSE_ENOUGH = 0.8  # of all remote rows: from there on, fetching everything spares the packing
_TOO_MUCH = 4.0  # times the longest shard: from there on, rows come one peer at a time


@torch.library.custom_op("dilated_attention_pytorch::ring_attention", mutates_args=())
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    segment_lengths: list[int],
    dilation_rates: list[int],
    offsets: str,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    padding: str,
    group_name: str,
    mode: str,
    gradient_dtype: str,
    keep_rows: bool,
    requires_grad: bool,
    same_seed: bool,
    check: str,
    timeout: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention of a shard's queries over all ranks' keys.

    Args:
        q: `(B, n, H, D)`.
        k: `(B, n, H_kv, D)`.
        v: like k.
        key_padding_mask: bool `(B, n)`.
        seed: int64 scalar.
        segment_lengths: w_i.
        dilation_rates: r_i.
        offsets: rule of the offsets.
        is_causal: hide later keys.
        scale: factor on q . k.
        dropout_p: probability of dropping a weight.
        padding: "none" or "zero_keys".
        group_name: the process group's.
        mode: of `RingAttentionConfig`.
        gradient_dtype: name of a torch dtype, or "" for the accumulator's.
        keep_rows: keep what arrives for the backward.
        requires_grad: whether a backward will follow; the ranks compare it.
        same_seed: the caller gave the seed, so the ranks compare it; else the first rank's is taken.
        check: of `RingAttentionConfig`.
        timeout: seconds.
        backend: "sdpa" or "triton".

    Returns:
        out, lse, what was kept (flat), the shards' lengths (on the CPU) and the seed.
    """
    settings = (segment_lengths, dilation_rates, offsets, is_causal, scale, dropout_p, padding)
    wire = (group_name, mode, gradient_dtype, keep_rows, requires_grad, same_seed, check, timeout, backend)
    channel, lengths = _open("forward", check, q, k, key_padding_mask, seed, settings, wire)
    if seed is not None:
        seed = seed.clone() if same_seed else channel.broadcast(seed, "seed").wait()
    call = _call(channel, lengths, q, k, settings, wire)
    (out, lse), kept = schedule.forward(call, q, k, v, key_padding_mask, seed)
    return out, lse, kept, torch.tensor(lengths, dtype=torch.int64), _seed_out(q, seed)


@ring_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    group_name, keep = args[9], args[12]
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.promote_types(q.dtype, torch.float32))
    kept = k.new_empty(torch.library.get_ctx().new_dynamic_size() if keep else 0)
    lengths = torch.empty(_resolve_process_group(group_name).size(), dtype=torch.int64, device="cpu")
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse, kept, lengths, _seed_out(q, args[1])


@torch.library.custom_op("dilated_attention_pytorch::ring_attention_backward", mutates_args=())
def ring_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kept: Tensor,
    lengths: Tensor,
    used_seed: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    segment_lengths: list[int],
    dilation_rates: list[int],
    offsets: str,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    padding: str,
    group_name: str,
    mode: str,
    gradient_dtype: str,
    keep_rows: bool,
    requires_grad: bool,
    same_seed: bool,
    check: str,
    timeout: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; arguments as in `ring_attention`, after what it returned."""
    settings = (segment_lengths, dilation_rates, offsets, is_causal, scale, dropout_p, padding)
    wire = (group_name, mode, gradient_dtype, keep_rows, requires_grad, same_seed, check, timeout, backend)
    seed = used_seed if dropout_p > 0.0 else None
    channel, _ = _open("backward", check, q, k, key_padding_mask, None, settings, wire)
    call = _call(channel, tuple(lengths.tolist()), q, k, settings, wire)
    grads = schedule.backward(call, grad_out, grad_lse, q, k, v, out, lse, kept, key_padding_mask, seed)
    dq, dk, dv = (grad.to(q.dtype).contiguous() for grad in grads)
    return dq, dk, dv


@ring_attention_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, kept: Tensor, lengths: Tensor, seed: Tensor,
    q: Tensor, k: Tensor, v: Tensor, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, mask, _seed, *settings = inputs
    ctx.save_for_backward(*output, q, k, v, mask)
    ctx.settings = settings
    ctx.set_materialize_grads(False)  # an unused lse costs nothing


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    none = (None,) * (2 + len(ctx.settings))
    saved = ctx.saved_tensors
    # No early return: the other ranks wait for this one's part of the exchange, whatever it uses itself.
    grad_out = torch.zeros_like(saved[0]) if grad_out is None else grad_out
    return *ring_attention_backward(grad_out, grad_lse, *saved, *ctx.settings), *none


ring_attention.register_autograd(_differentiate, setup_context=_setup_context)


def _open(
    phase: str, check: str, q: Tensor, k: Tensor, mask: Tensor | None, seed: Tensor | None,
    settings: tuple[Any, ...], wire: tuple[Any, ...],
) -> tuple[Channel, tuple[int, ...]]:  # fmt: skip
    """The handshake: everything that must be the same on every rank, by the names users know."""
    segment_lengths, dilation_rates, offsets, is_causal, scale, dropout_p, padding = settings
    group_name, mode, gradient_dtype, keep_rows, requires_grad, same_seed, _, timeout, backend = wire
    batch, length, heads, width = q.shape
    fingerprint: dict[str, Any] = {
        "the shape of query (B, n, H, D)": [batch, "n", heads, width],
        "the shape of key and value (B, n, H_kv, D)": [k.shape[0], "n", *k.shape[2:]],
        "dtype": str(q.dtype),
        "device type": q.device.type,
        "segment_lengths": segment_lengths,
        "dilation_rates": dilation_rates,
        "offsets": offsets,
        "is_causal": is_causal,
        "scale": scale,
        "dropout": dropout_p,
        "padding": padding,
        "seed": int(seed) if seed is not None and same_seed else None,
        "key_padding_mask": "given" if mask is not None else "none",
        "requires_grad": requires_grad,
        "mode": mode,
        "gradient_dtype": gradient_dtype,
        "remote_rows": "keep" if keep_rows else "refetch",
        "check": check,
        "backend": backend,
    }
    group = _resolve_process_group(group_name)
    row = unit_bytes(batch, width, k.element_size()) * k.shape[2]
    return handshake.begin(group, fingerprint, length, row, phase=phase, check=check, timeout=timeout)


def _call(
    channel: Channel, lengths: tuple[int, ...], q: Tensor, k: Tensor, settings: tuple[Any, ...], wire: tuple[Any, ...]
) -> schedule.Call:
    segment_lengths, dilation_rates, offsets, is_causal, scale, dropout_p, padding = settings
    _, mode, gradient_dtype, keep_rows, _, _, _, _, backend = wire
    pattern = DilatedPattern(tuple(segment_lengths), tuple(dilation_rates), k.shape[2], offsets)
    bounds = tuple(itertools.accumulate(lengths, initial=0))
    plan = plan_for(pattern, bounds, channel.rank, is_causal, k.device)
    zeros = padding == "zero_keys"
    if zeros and (branch := zero_keys.moving_branch(pattern, plan.seq_len)) is not None:
        raise ValueError(
            f"expected segments of a multiple of the rate, or one alone, with padding='zero_keys' over ranks, got the "
            f"branch (w={branch[0]}, r={branch[1]}) and {plan.seq_len} positions: the official code moves its rows"
        )
    start, _ = plan.shard
    problem = Problem(pattern, is_causal, scale, dropout_p, start, start, plan.seq_len, "exact", "none")
    wire_dtype = torch.promote_types(q.dtype, torch.float32)
    if gradient_dtype:
        wire_dtype = getattr(torch, gradient_dtype)
    chosen = choose_mode(plan) if mode == "auto" else mode
    step = BackendStep(backend_for(QKV(q, k, k), problem, backend))
    return schedule.Call(
        plan,
        problem,
        chosen,
        step,
        channel,
        wire_dtype,
        keep_rows,
        zeros,
    )


def choose_mode(plan: RingPlan) -> str:
    """The mode that `"auto"` takes, the same on every rank.

    Nearly all rows needed: gather them, without packing. Several shards' worth of rows to hold: one peer after
    another. Else one exchange.
    """
    dense = plan.pattern.num_heads * (plan.seq_len - min(plan.lengths))
    if plan.anything_moves and plan.largest_arrival > _DENSE_ENOUGH * dense:
        return "gather"
    if plan.largest_arrival > _TOO_MUCH * plan.pattern.num_heads * max(plan.lengths):
        return "ring"
    return "sparse"


def _seed_out(q: Tensor, seed: Tensor | None) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=q.device) if seed is None else seed.clone()


def group_name_of(group: dist.ProcessGroup) -> str:
    """The name under which the op finds the group."""
    return str(group.group_name)
