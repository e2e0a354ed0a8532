"""The public functions: validate, choose a backend, call it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dilated_attention_pytorch.core import dropout, reference
from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels import fast_path, ops
from dilated_attention_pytorch.types import AttentionOutput, Backend, MixingGradient, Offsets, Padding


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
    mixing_gradient: MixingGradient = "exact",
    padding: Padding = "none",
    backend: Backend = "auto",
) -> Tensor:
    """Dilated attention (LongNet, arXiv 2307.02486): one softmax over the multiset union of all branches' keys.

    Branch i cuts the sequence into segments of `segment_lengths[i]` positions; in each, head h keeps every
    `dilation_rates[i]`-th position and lets those attend to one another. A key that several branches show counts once
    for each. No length has to divide another.

    Args:
        q: queries `(B, N, H, D)`, or `(total, H, D)` with `cu_seqlens`. fp16, bf16, fp32 or fp64.
        k: keys `(B, N, H_kv, D)`, H a multiple of H_kv.
        v: values, like k.
        segment_lengths: w_i, in positions, one a branch.
        dilation_rates: r_i, one a branch.
        is_causal: hide keys later than the query.
        scale: factor on q . k; `D ** -0.5` by default.
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
            each.
        q_start: position of the first query, where q is a slice of the sequence.
        k_start: position of the first key.
        seq_len: N, the length of the whole sequence; by default the later end of the two ranges.
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
        >>> dilated_attention(q, k, v, segment_lengths=[128, 512], dilation_rates=[1, 4], is_causal=True).shape
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
    mixing_gradient: MixingGradient = "exact",
    padding: Padding = "none",
    backend: Backend = "auto",
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
            mixing_gradient, padding, backend,
        )  # fmt: skip
    again = fast_path.repeat(kind)
    if again is not None:
        return AttentionOutput(*again(q, k, v))

    packed = cu_seqlens is not None
    q, k, v = in_autocast_dtype(q, k, v)
    check.check_qkv(q, k, v, packed=packed)
    check.check_choice("backend", backend, Backend)
    # Any sequence will do: the pattern checks it and makes it a tuple.
    pattern = DilatedPattern(segment_lengths, dilation_rates, k.shape[-2], offsets)  # type: ignore[arg-type]
    if cu_seqlens is not None:
        if any(x is not None for x in (key_padding_mask, row_start, seq_len)) or q_start or k_start:
            raise ValueError(
                "expected cu_seqlens alone: key_padding_mask, row_start, q_start, k_start and seq_len describe "
                "padded or partial sequences, packed ones are whole and have no padding"
            )
        check.check_cu_seqlens(cu_seqlens, q.shape[0])
        q, k, v = q[None], k[None], v[None]
    problem = _problem(q, k, pattern, is_causal, scale, dropout_p, q_start, k_start, seq_len, mixing_gradient, padding)
    if key_padding_mask is not None:
        check.check_key_padding_mask(key_padding_mask, q.shape[0], problem.seq_len, q.device)
    if row_start is not None:
        check.check_row_start(row_start, q.shape[0])
    if padding == "zero_keys":
        _check_zero_keys(problem, q, k, key_padding_mask, row_start)
    check.check_seed(seed)
    seed_tensor = dropout.seed_tensor(seed, problem.dropout_p, q.device)

    if backend == "reference":
        if cu_seqlens is not None:
            check.check_cu_seqlens_values(cu_seqlens.tolist(), q.shape[1])
        if row_start is not None and type(row_start) is Tensor and not torch.compiler.is_compiling():
            check.check_row_start_values(row_start)  # a traced or fake tensor has no values to read
        out, lse = reference.attention(
            q,
            k,
            v,
            problem,
            key_padding_mask=key_padding_mask,
            row_start=row_start,
            cu_seqlens=cu_seqlens,
            seed=seed_tensor,
        )
    else:
        out, lse = ops.attention(
            q,
            k,
            v,
            problem,
            key_padding_mask=key_padding_mask,
            row_start=row_start,
            cu_seqlens=cu_seqlens,
            seed=seed_tensor,
            backend=backend,
        )
        fast_path.remember(kind, q, k, v, problem, backend)
    return AttentionOutput(out[0], lse[0]) if packed else AttentionOutput(out, lse)


def _problem(
    q: Tensor,
    k: Tensor,
    pattern: DilatedPattern,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    q_start: int,
    k_start: int,
    seq_len: int | None,
    mixing_gradient: MixingGradient,
    padding: Padding,
) -> Problem:
    check.check_choice("mixing_gradient", mixing_gradient, MixingGradient)
    check.check_choice("padding", padding, Padding)
    check.check_bool("is_causal", is_causal)
    q_start, k_start = check.check_int("q_start", q_start, 0), check.check_int("k_start", k_start, 0)
    end = max(q_start + q.shape[1], k_start + k.shape[1])
    if seq_len is None:
        seq_len = end
    elif check.check_int("seq_len", seq_len, 0) < end:
        raise ValueError(
            f"expected seq_len of at least {end}, where queries [{q_start}, {q_start + q.shape[1]}) and keys "
            f"[{k_start}, {k_start + k.shape[1]}) end, got {seq_len}"
        )
    return Problem(
        pattern=pattern,
        is_causal=is_causal,
        scale=check.check_scale(scale, q.shape[-1]),
        dropout_p=check.check_probability("dropout_p", dropout_p),
        q_start=q_start,
        k_start=k_start,
        seq_len=seq_len,
        mixing_gradient=mixing_gradient,
        padding=padding,
    )


def _check_zero_keys(
    problem: Problem, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, row_start: Tensor | None
) -> None:
    if problem.is_causal:
        raise ValueError("expected is_causal=False with padding='zero_keys', which is defined without causality only")
    if key_padding_mask is not None or row_start is not None:
        raise ValueError(
            "expected no key_padding_mask or row_start with padding='zero_keys': the number of zero keys depends on "
            "each sequence's own length; pack the sequences with cu_seqlens instead"
        )
    if q.shape[1] != problem.seq_len or k.shape[1] != problem.seq_len:
        raise ValueError(
            f"expected whole sequences with padding='zero_keys', got {q.shape[1]} queries and {k.shape[1]} keys of a "
            f"sequence of {problem.seq_len}"
        )


def in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, floating tensors in autocast's dtype, as torch's own attention takes them (fp64 stays)."""
    if not isinstance(tensors[0], Tensor):
        return tensors
    device = tensors[0].device.type
    if tensors[0].is_meta or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    eligible = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in eligible else x for x in tensors)
