"""From what a user passes to a checked call: sizes, device, limit, plan, engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.memory.unified_pool import UnifiedMemoryPool
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels.choice import backend_for, choose_backend
from dilated_attention_pytorch.streaming import pages, pipeline
from dilated_attention_pytorch.streaming.passes import BackwardPass, ForwardPass, Pass
from dilated_attention_pytorch.streaming.ranges import RangePlan, Sizes, plan_ranges
from dilated_attention_pytorch.streaming.sources import RangeSink, RangeSource, Reader, TensorReader, reader, writer
from dilated_attention_pytorch.types import QKV, BackendName, Offsets

CPU_LIMIT = 1 << 30  # bytes that a pass takes on a CPU where no limit is given
_SHARE = 0.8  # of a GPU's free memory


@dataclass(frozen=True)
class Settings:
    """The arguments that a forward and its backward share, as `dilated_attention_streamed` takes them."""

    segment_lengths: Sequence[int]
    dilation_rates: Sequence[int]
    is_causal: bool
    scale: float | None
    offsets: Offsets
    backend: BackendName
    device: torch.device | str | None
    device_limit: int | None
    range_length: int | None
    pool: UnifiedMemoryPool | None
    progress: bool


@dataclass(frozen=True)
class Call:
    """One checked call."""

    problem: Problem
    sizes: Sizes
    device: torch.device
    engine: Any
    settings: Settings
    readers: dict[str, Reader]

    def plan(self) -> RangePlan:
        """Its ranges."""
        limit = self.settings.device_limit
        if limit is None and self.device.type == "cuda":
            # What torch holds without using it is free to torch.
            idle = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            limit = int(_SHARE * (torch.cuda.mem_get_info(self.device)[0] + idle))
        elif limit is None:
            limit = CPU_LIMIT
        return plan_ranges(self.problem, self.sizes, limit, self.settings.range_length)

    def work(self) -> Pass:
        """The walk over its ranges."""
        kind = BackwardPass if self.sizes.is_backward else ForwardPass
        return kind(self.plan(), self.readers, self.engine)

    def run(self, work: Pass, targets: dict[str, Tensor | RangeSink]) -> None:
        """Computes everything into the targets. Tensors are marked as unfinished until all of it is there."""
        if self.problem.seq_len == 0 or self.sizes.batch == 0:
            return
        given = self.settings.pool
        pool = UnifiedMemoryPool(strategy="simple") if given is None else given
        writers = {name: writer(x, 2 if name == "lse" else 1) for name, x in targets.items()}
        try:
            # The dtype is the inputs', as staging memory is laid out before anything is read.
            plain = torch.autocast(self.device.type, enabled=False)
            with torch.no_grad(), plain, _progress(len(work.plan.ranges), self.settings.progress) as tick:
                pipeline.run(work, writers, self.device, pool, tick)
        finally:
            if given is None:
                pool.trim()


def prepare(
    settings: Settings,
    q: Tensor | RangeSource,
    k: Tensor | RangeSource,
    v: Tensor | RangeSource,
    key_padding_mask: Tensor | None,
    upstream: dict[str, Tensor | RangeSource] | None = None,
) -> Call:
    """Checks a call, before anything is changed.

    Args:
        upstream: grad_out, out and lse for a backward.
    """
    inputs: dict[str, Tensor | RangeSource] = {"q": q, "k": k, "v": v, **(upstream or {})}
    for name, x in inputs.items():
        _check_input(name, x)
    check.check_qkv(QKV(*(_stand_in(x) for x in (q, k, v))))
    batch, n, heads, width = tuple(q.shape)
    kv_heads = k.shape[2]
    if k.shape[1] != n:
        raise ValueError(
            f"expected as many keys as queries, got {k.shape[1]} and {n}: dilated_attention computes ranges of a "
            "sequence (q_start, k_start)"
        )
    accumulator = torch.promote_types(q.dtype, torch.float32)
    wanted = {"grad_out": (tuple(q.shape), q.dtype), "out": (tuple(q.shape), q.dtype)}
    wanted["lse"] = ((batch, heads, n), accumulator)
    for name, x in (upstream or {}).items():
        _check_like(name, x, *wanted[name])
    if key_padding_mask is not None:
        check.check_key_padding_mask(key_padding_mask, batch, n, torch.device("cpu"))
    pattern = DilatedPattern(settings.segment_lengths, settings.dilation_rates, kv_heads, settings.offsets)  # type: ignore[arg-type]
    check.check_bool("is_causal", settings.is_causal)
    check.check_bool("progress", settings.progress)
    scale = check.check_scale(settings.scale, width)
    if settings.pool is not None and not callable(getattr(settings.pool, "borrow", None)):
        raise TypeError(f"expected pool to be a UnifiedMemoryPool, got {type(settings.pool).__name__}")
    for name in ("device_limit", "range_length"):
        if getattr(settings, name) is not None:
            check.check_positive_int(name, getattr(settings, name))
    problem = Problem(pattern, settings.is_causal, float(scale), 0.0, 0, 0, n, "exact", "none")
    device = _device(settings.device)
    check.check_choice("backend", settings.backend, BackendName)
    if settings.backend == "reference":
        raise NotImplementedError(
            "backend='reference' computes whole sequences alone, with dilated_attention; expected 'auto', 'sdpa' or "
            "'triton' here"
        )
    rows = QKV(*(torch.empty((batch, 0, h, width), dtype=q.dtype, device=device) for h in (heads, kv_heads, kv_heads)))
    engine = backend_for(rows, problem, settings.backend)
    chosen = choose_backend(rows, problem, settings.backend).backend
    sizes = Sizes(
        batch, heads, kv_heads, width, q.dtype, key_padding_mask is not None, upstream is not None, chosen == "triton",
        device.type,
    )  # fmt: skip
    readers = {name: reader(name, x, 2 if name == "lse" else 1) for name, x in inputs.items()}
    if key_padding_mask is not None:
        readers["mask"] = TensorReader(key_padding_mask)
    return Call(problem, sizes, device, engine, settings, readers)


def check_target(name: str, x: Tensor | RangeSink | None, like: RangeSource | Tensor, inputs: Sequence[object]) -> None:
    """A host tensor of the shape and dtype of `like` that shares no memory with an input, or a sink.

    Memory counts from a tensor's first element to its last: views that interleave are refused although no element is
    shared.
    """
    if x is None:
        return
    if not isinstance(x, Tensor):
        if not callable(getattr(x, "write", None)):
            raise TypeError(f"expected {name} to be a Tensor or have write(start, rows), got {type(x).__name__}")
        return
    _check_like(name, x, tuple(like.shape), like.dtype)
    if x.device.type != "cpu":
        raise ValueError(f"expected {name} in host memory, got it on {x.device}")
    if x.requires_grad:
        raise ValueError(f"expected {name} without requires_grad: it is overwritten")
    if any(isinstance(y, Tensor) and _overlap(x, y) for y in inputs):
        raise ValueError(
            f"expected {name} in memory of its own, got a tensor whose memory, from its first element to its last, "
            "overlaps another argument's"
        )


def _overlap(x: Tensor, y: Tensor) -> bool:
    """Whether the addresses that two host tensors span have one in common."""
    if x.numel() == 0 or y.numel() == 0:
        return False
    (first, last), (other_first, other_last) = pages.extent(x), pages.extent(y)
    return first < other_last and other_first < last


def refuse(**options: Any) -> None:
    """Raises for an option of `dilated_attention` that streaming has not; each is given as (value, default)."""
    for name, (value, default) in options.items():
        if value is not default and value != default:
            raise NotImplementedError(
                f"streaming has no {name}={value!r}: dilated_attention computes it, on sequences that fit the device"
            )


def _check_input(name: str, x: object) -> None:
    if isinstance(x, Tensor):
        if x.device.type != "cpu":
            raise ValueError(
                f"expected {name} in host memory, got it on {x.device}: dilated_attention computes what lies there"
            )
        return
    missing = [part for part in ("shape", "dtype", "read") if not hasattr(x, part)]
    if missing:
        raise TypeError(
            f"expected {name} to be a Tensor or a source with shape, dtype and read(start, stop), "
            f"got {type(x).__name__} without {', '.join(missing)}"
        )
    source: Any = x
    if not isinstance(source.dtype, torch.dtype):
        raise TypeError(
            f"expected {name}.dtype to be a torch.dtype, got {type(source.dtype).__name__} {source.dtype!r}"
        )
    if isinstance(source.shape, str | bytes) or not isinstance(source.shape, Sequence):
        raise TypeError(
            f"expected {name}.shape to be a sequence of ints, got {type(source.shape).__name__} {source.shape!r}"
        )
    for i, size in enumerate(source.shape):
        check.check_int(f"{name}.shape[{i}]", size, 0)


def _check_like(name: str, x: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(x.shape) != shape or x.dtype != dtype:
        raise ValueError(f"expected {name} of {dtype} {shape}, got {x.dtype} {tuple(x.shape)}")


def _stand_in(x: Tensor | RangeSource) -> Tensor:
    """A tensor of the same shape and dtype without data, for checks that ask for one."""
    return torch.empty(tuple(x.shape), dtype=x.dtype, device="meta")


def _device(device: torch.device | str | None) -> torch.device:
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    found = check.check_device("device", chosen)
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"expected device to be a CPU or a CUDA device, got {found}")
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"expected a device that is there, got {found} on a machine without CUDA")
        found = torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
    return found


@contextmanager
def _progress(total: int, on: bool) -> Iterator[Callable[[], None]]:
    """What is called when a range is done."""
    if not on:
        yield lambda: None
        return
    try:
        from rich.progress import Progress
    except ModuleNotFoundError as error:
        raise ImportError(
            "progress=True needs the package 'rich': pip install 'dilated-attention-pytorch[cli]'"
        ) from error
    with Progress() as bar:
        task = bar.add_task("ranges", total=total)
        yield lambda: bar.advance(task)
