"""The public functions: validate, choose a backend, call it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from dilated_attention_pytorch.core import dropout, reference, torch_private
from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.core.shift import check_shift, shifted_masks, two_parts
from dilated_attention_pytorch.kernels import fast_path, ops
from dilated_attention_pytorch.types import QKV, AttentionOutput, BackendName, Masks, MixingGradient, Offsets, Padding


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    is_causal: bool = False,
    scale: float | None = None,
    offsets: Offsets = "modulo",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    row_start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    q_start: int = 0,
    k_start: int = 0,
    seq_len: int | None = None,
    segment_shift: int = 0,
    mixing_gradient: MixingGradient = "exact",
    padding: Padding = "none",
    backend: BackendName = "auto",
) -> Tensor:
    """Dilated attention (LongNet, arXiv 2307.02486): one softmax over the multiset union of all branches' keys.

    Branch i cuts the sequence into segments of `segment_lengths[i]` positions; in each, head h keeps every
    `dilation_rates[i]`-th position and lets those attend to one another. A key that several branches show counts once
    for each. No length has to divide another.

    Args:
        q: queries `(B, N, H, D)`, or `(total, H, D)` with `cu_seqlens`. fp16, bf16, fp32 or fp64.
        k: keys `(B, N, H_kv, D)`, H a multiple of H_kv.
        v: values, like k.
        segment_lengths: w_i, in positions, one per branch.
        dilation_rates: r_i, one per branch.
        is_causal: hide keys later than the query.
        scale: factor on q . k; `D ** -0.5` by default. At most 1.8e19 (1.3e154 for fp64), so that no logit overflows.
        offsets: which residue a head keeps: `"modulo"` (the paper) or `"blocked"` (the official code and every
            published checkpoint). Counted over key/value heads.
        dropout_p: probability of dropping an attention weight, in [0, 1). The function has no training mode: pass 0
            to switch dropout off.
        seed: of the dropout mask, which is a function of (seed, batch, head, branch, query, key) alone. An int or an
            int64 scalar tensor; drawn from torch's generator when absent.
        key_padding_mask: bool `(B, N)`, True = real. A masked key is seen by nobody, a masked query returns 0;
            positions do not move. With a partial range it covers the whole sequence, `(B, seq_len)`. What is masked has
            to be finite all the same, as in torch's own attention: 0 * NaN is NaN.
        row_start: int `(B,)`: the first real position of each left-padded row, from which positions count. At least 0,
            which is checked where reading it does not make the host wait: not on a GPU.
        cu_seqlens: int `(sequences + 1,)`, rising from 0 to total: bounds of packed sequences; positions restart at
            each. Checked where `row_start` is; rows of no sequence see nothing.
        q_start: position of the first query, where q is a slice of the sequence.
        k_start: position of the first key.
        seq_len: N, the length of the whole sequence; by default the later end of the two ranges.
        segment_shift: c, in positions: moves the borders of all segments, as if the first position were c. Where two
            plain calls on parts give it (`core.shift.two_parts`), they are made.
        mixing_gradient: `"exact"` differentiates through the branch weights, `"detached"` holds them constant, as the
            official code does.
        padding: `"none"`, or `"zero_keys"` for the numbers of published checkpoints (non-causal, whole sequences).
        backend: `"auto"`, `"reference"`, `"sdpa"` or `"triton"`. A named backend never falls back.

    Returns:
        `(B, N, H, D)` in q's dtype; `(total, H, D)` when packed. 0 where a query sees no key.

    Raises:
        ValueError: shapes, devices, lengths or options that do not fit; the message says what was expected and given.
        TypeError: an argument of the wrong type or dtype.
        NotImplementedError: the named backend cannot do this; the message names one that can.

    Example:
        >>> q, k, v = (torch.randn(1, 1000, 4, 32) for _ in range(3))
        >>> dilated_attention(q, k, v, segment_lengths=[128, 512], dilation_rates=[1, 4],
        ...                   is_causal=True).shape
        torch.Size([1, 1000, 4, 32])
    """
    return dilated_attention_with_lse(
        q,
        k,
        v,
        segment_lengths=segment_lengths,
        dilation_rates=dilation_rates,
        is_causal=is_causal,
        scale=scale,
        offsets=offsets,
        dropout_p=dropout_p,
        seed=seed,
        key_padding_mask=key_padding_mask,
        row_start=row_start,
        cu_seqlens=cu_seqlens,
        q_start=q_start,
        k_start=k_start,
        seq_len=seq_len,
        segment_shift=segment_shift,
        mixing_gradient=mixing_gradient,
        padding=padding,
        backend=backend,
    ).out


def dilated_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    is_causal: bool = False,
    scale: float | None = None,
    offsets: Offsets = "modulo",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    row_start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    q_start: int = 0,
    k_start: int = 0,
    seq_len: int | None = None,
    segment_shift: int = 0,
    mixing_gradient: MixingGradient = "exact",
    padding: Padding = "none",
    backend: BackendName = "auto",
) -> AttentionOutput:
    """`dilated_attention` together with the log of its softmax denominator, so that partials can be merged.

    Arguments and errors are those of `dilated_attention`. Both outputs are differentiable.

    Returns:
        `AttentionOutput(out, lse)`: `out` as `dilated_attention` gives it, `lse` `(B, H, N)` (`(H, total)` when
        packed), natural log, fp32 (fp64 for fp64 inputs), -inf where a query sees no key.

    Example:
        >>> q, k, v = (torch.randn(1, 64, 2, 16) for _ in range(3))
        >>> pattern = dict(segment_lengths=[32], dilation_rates=[1])
        >>> left = dilated_attention_with_lse(q, k[:, :20], v[:, :20], **pattern)
        >>> right = dilated_attention_with_lse(q, k[:, 20:], v[:, 20:], k_start=20, **pattern)
        >>> whole = dilated_attention_with_lse(q, k, v, **pattern)
        >>> torch.testing.assert_close(merge_attention(left, right).out, whole.out)
    """
    kind = None
    if key_padding_mask is None and row_start is None and cu_seqlens is None and seed is None:
        kind = fast_path.kind_of(
            q, k, v, segment_lengths, dilation_rates, is_causal, scale, offsets, dropout_p, q_start, k_start, seq_len,
            segment_shift, mixing_gradient, padding, backend,
        )  # fmt: skip
    again = fast_path.repeat(kind)
    if again is not None:
        return again(QKV(q, k, v))

    x = check.check_qkv(QKV(*in_autocast_dtype(q, k, v)), packed=cu_seqlens is not None)
    if not type(x.q) is type(x.k) is type(x.v) is Tensor:
        check.check_all_or_none_fake(x.q, {"k": x.k, "v": x.v})
    backend = check.check_choice("backend", backend, BackendName)
    # Any sequence will do: the pattern checks it and makes it a tuple.
    pattern = DilatedPattern(segment_lengths, dilation_rates, x.k.shape[-2], offsets)  # type: ignore[arg-type]
    masks = Masks(key_padding_mask, row_start, cu_seqlens)
    if cu_seqlens is not None:
        check.check_cu_seqlens(cu_seqlens)
        check.check_packed_alone(masks, q_start, k_start, seq_len)
        x = QKV(*(y[None] for y in x))
    q_start, k_start, seq_len = check.check_range(x, q_start, k_start, seq_len)
    problem = Problem(
        pattern,
        check.check_bool("is_causal", is_causal),
        check.check_scale(scale, x.q.shape[-1], x.q.dtype),
        check.check_probability("dropout_p", dropout_p),
        q_start,
        k_start,
        seq_len,
        check.check_choice("mixing_gradient", mixing_gradient, MixingGradient),
        check.check_choice("padding", padding, Padding),
    )
    check.check_seed(seed)
    check.check_masks(masks._replace(seed=seed if isinstance(seed, Tensor) else None), x.q, seq_len)
    if problem.padding == "zero_keys":
        _check_zero_keys(problem, x, masks)
    parts = None
    if (shift := check_shift(segment_shift, pattern.segment_lengths)) > 0:
        parts = _plain_parts(problem, x, masks, shift)
        problem, masks = _shifted(problem, masks, shift, x.q.device)
    if problem.dropout_p > 0.0:
        drawn = partial(dropout.seed_tensor, seed, problem.dropout_p, x.q.device)
        masks = masks._replace(seed=torch_private.called_beside(x.q, drawn))

    if backend == "reference":
        found = _reference(x, problem, masks)
    else:
        ops.refuse_tangents(**x._asdict())
        if torch.is_grad_enabled() and (x.q.requires_grad or x.k.requires_grad or x.v.requires_grad):
            given = {
                "key_padding_mask": key_padding_mask,
                "row_start": row_start,
                "cu_seqlens": cu_seqlens,
                "seed": seed,
            }
            check.check_savable(x._asdict() | {name: y for name, y in given.items() if isinstance(y, Tensor)})
        if parts is not None:
            return _in_parts(parts, x, problem, key_padding_mask, backend)
        found = AttentionOutput(*ops.attention(*x, *masks, *problem.pack(), backend))
        fast_path.remember(kind, x, problem, backend)
    return found if cu_seqlens is None else AttentionOutput(found.out[0], found.lse[0])


def _reference(x: QKV, problem: Problem, masks: Masks) -> AttentionOutput:
    row_start = masks.row_start
    if not torch.compiler.is_compiling():  # a traced or fake tensor has no values to read
        if masks.cu_seqlens is not None:
            check.check_cu_seqlens_values(masks.cu_seqlens.tolist(), x.q.shape[1])
        if row_start is not None and type(row_start) is Tensor:
            check.check_row_start_values(row_start)
    elif masks.cu_seqlens is not None:
        bounds = masks.cu_seqlens
        rises = (bounds[0] == 0) & (bounds[-1] == x.q.shape[1]) & (bounds.diff() >= 0).all()
        torch_private.check_in_graph(rises, "expected cu_seqlens to rise from 0 to the packed length")
    compute = partial(
        reference.attention, *x, problem, key_padding_mask=masks.key_padding, row_start=row_start,
        cu_seqlens=masks.cu_seqlens, seed=masks.seed,
    )  # fmt: skip
    return torch_private.called_beside(x.q, compute)


def _shifted(problem: Problem, masks: Masks, shift: int, device: torch.device) -> tuple[Problem, Masks]:
    """The same call on a device as a range that starts at the shift; packed, each sequence starts there."""
    if problem.padding == "zero_keys":
        raise ValueError(
            f"expected segment_shift=0 with padding='zero_keys', got {shift}: the official code's numbers know no shift"
        )
    end = problem.seq_len + shift
    if end >= 2**63:
        raise ValueError(f"expected segment_shift to leave every position below 2**63, got {shift}")
    moved = problem.at(problem.q_start + shift, problem.k_start + shift, end)
    return moved, shifted_masks(masks, shift, problem.seq_len, device)


def _plain_parts(problem: Problem, x: QKV, masks: Masks, shift: int) -> list[int] | None:
    """The lengths of the one or two plain sequences that a shifted one falls into; None where it does not."""
    n = problem.seq_len
    is_whole = x.q.shape[1] == x.k.shape[1] == n and masks.row_start is None and masks.cu_seqlens is None
    border = two_parts(problem.pattern.branches, shift)
    if border is None or not is_whole or problem.dropout_p > 0.0:  # dropout's mask follows positions
        return None
    return [border, n - border] if 0 < border < n else [n]


def _in_parts(
    parts: list[int], x: QKV, problem: Problem, key_padding_mask: Tensor | None, backend: BackendName
) -> AttentionOutput:
    """Attention of plain sequences one behind another in each row."""
    rows = zip(*(y.split(parts, 1) for y in x), strict=True)
    bits = [None] * len(parts) if key_padding_mask is None else key_padding_mask.split(parts, 1)
    found = [
        ops.attention(*part, *Masks(shown), *problem.at(0, 0, n).pack(), backend)
        for part, shown, n in zip(rows, bits, parts, strict=True)
    ]
    if len(found) == 1:
        return AttentionOutput(*found[0])
    return AttentionOutput(torch.cat([out for out, _ in found], 1), torch.cat([lse for _, lse in found], 2))


def _check_zero_keys(problem: Problem, x: QKV, masks: Masks) -> None:
    if problem.is_causal:
        raise ValueError("expected is_causal=False with padding='zero_keys', which is defined without causality only")
    if masks.key_padding is not None or masks.row_start is not None:
        raise ValueError(
            "expected no key_padding_mask or row_start with padding='zero_keys': the number of zero keys depends on "
            "each sequence's own length; pack the sequences with cu_seqlens instead"
        )
    if x.q.shape[1] != problem.seq_len or x.k.shape[1] != problem.seq_len:
        raise ValueError(
            f"expected whole sequences with padding='zero_keys', got {x.q.shape[1]} queries and {x.k.shape[1]} keys of "
            f"a sequence of {problem.seq_len}"
        )


def in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, floating tensors in autocast's dtype, as torch's own attention takes them (fp64 stays)."""
    first = tensors[0]
    if not isinstance(first, Tensor) or first.is_meta or not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype, eligible = torch.get_autocast_dtype(first.device.type), (torch.float16, torch.bfloat16, torch.float32)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in eligible else x for x in tensors)
