"""The public functions: one call for everything, and a forward and a backward for data that autograd cannot hold."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from dilated_attention_pytorch.core.memory.unified_pool import UnifiedMemoryPool
from dilated_attention_pytorch.core.torch_private import uncompiled
from dilated_attention_pytorch.streaming.call import Settings, check_target, prepare, refuse
from dilated_attention_pytorch.streaming.sources import RangeSink, RangeSource
from dilated_attention_pytorch.types import AttentionOutput, BackendName, Offsets

Sink = TypeVar("Sink", bound=RangeSink)

# What `dilated_attention` has and streaming has not.
_REFUSED = ("dropout_p", "row_start", "cu_seqlens", "mixing_gradient", "padding")


@overload
def dilated_attention_streamed(
    q: Tensor | RangeSource, k: Tensor | RangeSource, v: Tensor | RangeSource, *, out: Tensor | None = None,
    **options: Any,
) -> Tensor: ...  # fmt: skip
@overload
def dilated_attention_streamed(
    q: Tensor | RangeSource, k: Tensor | RangeSource, v: Tensor | RangeSource, *, out: Sink, **options: Any
) -> Sink: ...
@uncompiled  # type: ignore[misc]
def dilated_attention_streamed(
    q: Tensor | RangeSource,
    k: Tensor | RangeSource,
    v: Tensor | RangeSource,
    *,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    is_causal: bool = False,
    scale: float | None = None,
    offsets: Offsets = "modulo",
    key_padding_mask: Tensor | None = None,
    backend: BackendName = "auto",
    out: Tensor | RangeSink | None = None,
    device: torch.device | str | None = None,
    device_limit: int | None = None,
    range_length: int | None = None,
    pool: UnifiedMemoryPool | None = None,
    progress: bool = False,
    dropout_p: float = 0.0,
    row_start: None = None,
    cu_seqlens: None = None,
    mixing_gradient: str = "exact",
    padding: str = "none",
) -> Tensor | RangeSink:
    """Dilated attention over a sequence that is larger than the device, with the numbers of `dilated_attention`.

    Walks the sequence in ranges. While one is computed, the next is read and copied in and the last one copied out, so
    that the whole takes about as long as the slower of copying and computing. Host tensors that require a gradient get
    it, streamed likewise; range sources are differentiated with `streamed_backward`.

    Every row is read and written once, but for branches whose segments are not cut evenly by the ranges: of those, 1
    row in r is brought in twice at most. A segment's rows, w / r of them, must fit the device.

    Args:
        q: queries `(B, N, H, D)`, fp16, bf16, fp32 or fp64: a host tensor (pinned ones are copied from directly,
            memory-mapped ones are read without staying resident), or a source with `shape`, `dtype` and
            `read(start, stop) -> (B, stop - start, H, D)`.
        k: keys `(B, N, H_kv, D)`, H a multiple of H_kv; likewise.
        v: values, like k.
        segment_lengths: w_i, in positions, one a branch.
        dilation_rates: r_i, one a branch.
        is_causal: hide keys later than the query.
        scale: factor on q . k; `D ** -0.5` by default.
        offsets: `"modulo"` or `"blocked"`, as in `dilated_attention`.
        key_padding_mask: bool `(B, N)` in host memory, True = real.
        backend: `"auto"`, `"sdpa"` or `"triton"`.
        out: where the result goes: a host tensor (memory-mapped ones do) or a sink with `write(start, rows)`; a new
            tensor by default. If the call fails, what `out` holds is undefined but for its first position, which is
            NaN: an unfinished result is never taken for a finished one. A sink's `commit()`, where it has one, is
            called after the last row.
        device: where it is computed; a CUDA device if there is one, else the CPU.
        device_limit: bytes of the device to stay within; by default 80% of what is free, 1 GiB on a CPU, where it
            counts what the call takes beside its inputs and `out`.
        range_length: positions of a range; chosen by the limit and the pattern by default.
        pool: a `UnifiedMemoryPool` that lends staging and device buffers, kept by the caller for the next call; a
            strategy that rounds sizes up adds its rounding to `device_limit`.
        progress: show a bar on the terminal; needs the `cli` extra.
        dropout_p, row_start, cu_seqlens, mixing_gradient, padding: not supported: anything but the default raises.

    Returns:
        `out`: `(B, N, H, D)` in q's dtype, on the CPU, or the sink.

    Raises:
        ValueError: shapes, lengths or options that do not fit, or a `device_limit` in which not even the shortest range
            has room; the message says what was expected and given.
        TypeError: an argument of the wrong type or dtype.
        NotImplementedError: an option that streaming has not; the message names what can.

    Example:
        >>> q, k, v = (torch.randn(1, 1000, 2, 16) for _ in range(3))
        >>> pattern = dict(segment_lengths=[64, 256], dilation_rates=[1, 4], is_causal=True)
        >>> out = dilated_attention_streamed(q, k, v, **pattern, range_length=256)
        >>> torch.testing.assert_close(out, dilated_attention(q, k, v, **pattern))
    """
    refuse(
        dropout_p=(dropout_p, 0.0), row_start=(row_start, None), cu_seqlens=(cu_seqlens, None),
        mixing_gradient=(mixing_gradient, "exact"), padding=(padding, "none"),
    )  # fmt: skip
    settings = Settings(
        segment_lengths, dilation_rates, is_causal, scale, offsets, backend, device, device_limit, range_length, pool,
        progress,
    )  # fmt: skip
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (q, k, v)):
        if out is not None:
            raise ValueError("expected out=None where a gradient is wanted, as autograd keeps the result it makes")
        others = [name for name, x in zip("qkv", (q, k, v), strict=True) if not isinstance(x, Tensor)]
        if others:
            raise NotImplementedError(
                f"autograd takes tensors alone, got a source as {', '.join(others)}: streamed_forward and "
                "streamed_backward take sources"
            )
        result: Tensor = _Streamed.apply(q, k, v, key_padding_mask, settings)  # type: ignore[no-untyped-call]
        return result
    return _forward(settings, q, k, v, key_padding_mask, out, None, wants_lse=False)[0]


@uncompiled
def streamed_forward(
    q: Tensor | RangeSource,
    k: Tensor | RangeSource,
    v: Tensor | RangeSource,
    *,
    out: Tensor | RangeSink | None = None,
    lse: Tensor | RangeSink | None = None,
    key_padding_mask: Tensor | None = None,
    **settings: Any,
) -> AttentionOutput:
    """`dilated_attention_streamed` together with its lse, for a `streamed_backward` later; not watched by autograd.

    Args:
        q: as in `dilated_attention_streamed`.
        k: likewise.
        v: likewise.
        out: likewise.
        lse: a host tensor `(B, H, N)`, fp32 (fp64 for fp64 inputs), or a sink of such rows; a new tensor by default.
        key_padding_mask: as in `dilated_attention_streamed`.
        settings: the pattern, device and other options of `dilated_attention_streamed`.

    Returns:
        `AttentionOutput(out, lse)`, each as it was given.
    """
    checked = _settings("streamed_forward", settings)
    return AttentionOutput(*_forward(checked, q, k, v, key_padding_mask, out, lse, wants_lse=True))  # type: ignore[arg-type]


@uncompiled
def streamed_backward(
    grad_out: Tensor | RangeSource,
    q: Tensor | RangeSource,
    k: Tensor | RangeSource,
    v: Tensor | RangeSource,
    out: Tensor | RangeSource,
    lse: Tensor | RangeSource,
    *,
    dq: Tensor | RangeSink | None = None,
    dk: Tensor | RangeSink | None = None,
    dv: Tensor | RangeSink | None = None,
    key_padding_mask: Tensor | None = None,
    **settings: Any,
) -> tuple[Any, Any, Any]:
    """The gradients of q, k and v, from what `streamed_forward` gave.

    Each is written once: contributions of several branches are summed on the device in fp32 (fp64 for fp64 inputs).

    Args:
        grad_out: `(B, N, H, D)`, a host tensor or source, like the next ones.
        q: as in the forward.
        k: likewise.
        v: likewise.
        out: what the forward gave.
        lse: likewise, `(B, H, N)`; a source's `read` gives `(B, H, stop - start)`.
        dq: where the gradient of q goes: a host tensor or a sink; a new tensor by default. What an interruption leaves
            is marked as in `dilated_attention_streamed`.
        dk: of k.
        dv: of v.
        key_padding_mask: as in the forward.
        settings: the pattern, device and other options of `dilated_attention_streamed`, as in the forward.

    Returns:
        `(dq, dk, dv)`, each as it was given.
    """
    upstream = {"grad_out": grad_out, "out": out, "lse": lse}
    call = prepare(_settings("streamed_backward", settings), q, k, v, key_padding_mask, upstream)
    taken: list[object] = [grad_out, q, k, v, out, lse, key_padding_mask]
    targets: dict[str, Tensor | RangeSink] = {}
    for name, given, like in (("dq", dq, q), ("dk", dk, k), ("dv", dv, v)):
        check_target(name, given, like, taken)
        taken.append(given)
    work = call.work()
    for name, given, like in (("dq", dq, q), ("dk", dk, k), ("dv", dv, v)):
        targets[name] = torch.empty(tuple(like.shape), dtype=like.dtype, device="cpu") if given is None else given
    call.run(work, targets)
    return targets["dq"], targets["dk"], targets["dv"]


def _settings(function: str, given: dict[str, Any]) -> Settings:
    """From keyword arguments, with the defaults of `dilated_attention_streamed`."""
    parameters = inspect.signature(dilated_attention_streamed).parameters
    names = [field.name for field in fields(Settings)]
    refused = {name: (given[name], parameters[name].default) for name in _REFUSED if name in given}
    refuse(**refused)
    if unknown := [name for name in given if name not in names and name not in refused]:
        raise TypeError(f"expected {function} to be given options of {names}, got {unknown}")
    if missing := [name for name in ("segment_lengths", "dilation_rates") if name not in given]:
        raise TypeError(f"expected {function} to be given {' and '.join(missing)}")
    return Settings(**{name: given.get(name, parameters[name].default) for name in names})


def _forward(
    settings: Settings,
    q: Tensor | RangeSource,
    k: Tensor | RangeSource,
    v: Tensor | RangeSource,
    key_padding_mask: Tensor | None,
    out: Tensor | RangeSink | None,
    lse: Tensor | RangeSink | None,
    *,
    wants_lse: bool,
) -> tuple[Tensor | RangeSink, Tensor | RangeSink | None]:
    call = prepare(settings, q, k, v, key_padding_mask)
    batch, n, heads, _ = tuple(q.shape)
    like = torch.empty((batch, heads, n), dtype=torch.promote_types(q.dtype, torch.float32), device="meta")
    check_target("out", out, q, (q, k, v, key_padding_mask))
    check_target("lse", lse, like, (q, k, v, key_padding_mask, out))
    work = call.work()
    if out is None:
        out = torch.empty(tuple(q.shape), dtype=q.dtype, device="cpu")
    targets: dict[str, Tensor | RangeSink] = {"out": out}
    if wants_lse:
        lse = torch.empty_like(like, device="cpu") if lse is None else lse
        targets["lse"] = lse
    call.run(work, targets)
    return out, lse


class _Streamed(torch.autograd.Function):
    """Host tensors in, host tensors out; the backward streams them again."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, settings: Settings
    ) -> Tensor:
        out, lse = _forward(settings, q, k, v, key_padding_mask, None, None, wants_lse=True)
        assert isinstance(out, Tensor) and isinstance(lse, Tensor)
        ctx.save_for_backward(q, k, v, out, lse, key_padding_mask)
        ctx.settings = settings
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mask = ctx.saved_tensors
        grads = streamed_backward(grad_out, q, k, v, out, lse, key_padding_mask=mask, **vars(ctx.settings))
        return *grads, None, None
