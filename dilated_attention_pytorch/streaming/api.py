"""The public functions: one call for everything, and a forward and a backward for data that autograd cannot hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from dilated_attention_pytorch.core.memory.unified_pool import UnifiedMemoryPool
from dilated_attention_pytorch.core.torch_private import uncompiled
from dilated_attention_pytorch.streaming.call import Settings, prepare
from dilated_attention_pytorch.streaming.sources import AnySource, RangeSink, RangeSource
from dilated_attention_pytorch.types import QKV, AttentionOutput, BackendName, Offsets

Sink = TypeVar("Sink", bound=RangeSink)


@overload
def dilated_attention_streamed(
    q: AnySource, k: AnySource, v: AnySource, *, out: Tensor | None = None, **options: Any
) -> Tensor: ...
@overload
def dilated_attention_streamed(q: AnySource, k: AnySource, v: AnySource, *, out: Sink, **options: Any) -> Sink: ...
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
    segment_shift: int = 0,
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

    Every row is read and written once. Where ranges cut a branch's segments, 1 row in r is brought in twice at most.
    A segment's rows, w / r of them, must fit the device.

    Args:
        q: queries `(B, N, H, D)`, fp16, bf16, fp32 or fp64: a host tensor (pinned ones are copied from directly,
            memory-mapped ones are read without staying resident), or a source with `shape`, `dtype` and
            `read(start, stop) -> (B, stop - start, H, D)`.
        k: keys `(B, N, H_kv, D)`, H a multiple of H_kv; likewise.
        v: values, like k.
        segment_lengths, dilation_rates, is_causal, scale, offsets, segment_shift: as in `dilated_attention`.
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
    # Before any other name is bound; what is no option of the whole call has a place of its own.
    options = {name: x for name, x in locals().items() if name not in ("q", "k", "v", "key_padding_mask", "out")}
    settings = Settings.of("dilated_attention_streamed", options)
    inputs = {"q": q, "k": k, "v": v}
    if not torch.is_grad_enabled() or not any(isinstance(x, Tensor) and x.requires_grad for x in inputs.values()):
        result: Tensor | RangeSink = prepare(settings, inputs, key_padding_mask).into({"out": out})["out"]
        return result
    if out is not None:
        raise ValueError("expected out=None where a gradient is wanted, as autograd keeps the result it makes")
    if others := [name for name, x in inputs.items() if not isinstance(x, Tensor)]:
        raise NotImplementedError(
            f"autograd takes tensors alone, got a source as {', '.join(others)}: streamed_forward and "
            "streamed_backward take sources"
        )
    watched: Tensor = _Streamed.apply(q, k, v, key_padding_mask, settings)  # type: ignore[no-untyped-call]
    return watched


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
    """`dilated_attention_streamed` together with its lse, for a later `streamed_backward`; autograd does not watch it.

    Args:
        q, k, v: as in `dilated_attention_streamed`.
        out: likewise.
        lse: a host tensor `(B, H, N)`, fp32 (fp64 for fp64 inputs), or a sink of such rows; a new tensor by default.
        key_padding_mask: as in `dilated_attention_streamed`.
        settings: the pattern, device and other options of `dilated_attention_streamed`.

    Returns:
        `AttentionOutput(out, lse)`, each as it was given.
    """
    call = prepare(Settings.of("streamed_forward", settings), {"q": q, "k": k, "v": v}, key_padding_mask)
    return AttentionOutput(**call.into({"out": out, "lse": lse}))


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
) -> QKV:
    """The gradients of q, k and v, from what `streamed_forward` gave.

    Each is written once: contributions of several branches are summed on the device in fp32 (fp64 for fp64 inputs).

    Args:
        grad_out: `(B, N, H, D)`, a host tensor or source, like the next ones.
        q, k, v: as in the forward.
        out: what the forward gave.
        lse: likewise, `(B, H, N)`; a source's `read` gives `(B, H, stop - start)`.
        dq, dk, dv: where the gradients go: host tensors or sinks; new tensors by default. What an interruption leaves
            is marked as in `dilated_attention_streamed`.
        key_padding_mask: as in the forward.
        settings: the pattern, device and other options of `dilated_attention_streamed`, as in the forward.

    Returns:
        `QKV(dq, dk, dv)`, each as it was given.
    """
    inputs = {"q": q, "k": k, "v": v, "grad_out": grad_out, "out": out, "lse": lse}
    call = prepare(Settings.of("streamed_backward", settings), inputs, key_padding_mask)
    return QKV(*call.into({"dq": dq, "dk": dk, "dv": dv}).values())


class _Streamed(torch.autograd.Function):
    """Host tensors in, host tensors out; the backward streams them again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, settings: Settings) -> Tensor:
        out, lse = streamed_forward(q, k, v, key_padding_mask=mask, **vars(settings))
        ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.settings = settings
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *saved, mask = ctx.saved_tensors
        return *streamed_backward(grad_out, *saved, key_padding_mask=mask, **vars(ctx.settings)), None, None
