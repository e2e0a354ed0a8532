"""From what a user passes to a checked call, and from there to the walk over its ranges."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.memory.runtime import Runtime
from dilated_attention_pytorch.core.memory.unified_pool import UnifiedMemoryPool
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.precision import accumulator
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.core.shift import check_shift
from dilated_attention_pytorch.kernels.backend import Backend
from dilated_attention_pytorch.kernels.choice import backend_for, choose_backend
from dilated_attention_pytorch.streaming import pipeline, sources
from dilated_attention_pytorch.streaming.passes import BackwardPass, ForwardPass, Pass
from dilated_attention_pytorch.streaming.ranges import RangePlan, Sizes, plan_ranges
from dilated_attention_pytorch.streaming.sources import AnySink, AnySource, Spec
from dilated_attention_pytorch.types import QKV, BackendName, Offsets

CPU_LIMIT = 1 << 30  # bytes that a pass takes on a CPU if no limit is given
_SHARE = 0.8  # of a GPU's free memory
# What `dilated_attention` has and streaming has not, with the only value that is taken.
REFUSED = {"dropout_p": 0.0, "row_start": None, "cu_seqlens": None, "mixing_gradient": "exact", "padding": "none"}


@dataclass(frozen=True)
class Settings:
    """The arguments that a forward and its backward share, as `dilated_attention_streamed` takes them."""

    segment_lengths: Sequence[int]
    dilation_rates: Sequence[int]
    is_causal: bool = False
    scale: float | None = None
    offsets: Offsets = "modulo"
    segment_shift: int = 0
    backend: BackendName = "auto"
    device: torch.device | str | None = None
    device_limit: int | None = None
    range_length: int | None = None
    pool: UnifiedMemoryPool | None = None
    progress: bool = False

    @classmethod
    def of(cls, function: str, given: dict[str, Any]) -> Self:
        """From the keyword arguments of one of the public functions."""
        for name, default in REFUSED.items():
            value = given.get(name, default)
            # An array or tensor would compare element by element.
            if value is not default and not (isinstance(value, (int, float, str)) and value == default):
                words = "dilated_attention computes it, on sequences that fit the device"
                raise NotImplementedError(f"streaming has no {name}={check.quoted(value)}: {words}")
        names = [field.name for field in fields(cls)]
        if unknown := [name for name in given if name not in names and name not in REFUSED]:
            raise TypeError(f"expected {function} to be given options of {names}, got {check.quoted(unknown)}")
        if missing := [name for name in ("segment_lengths", "dilation_rates") if name not in given]:
            raise TypeError(f"expected {function} to be given {' and '.join(missing)}")
        return cls(**{name: value for name, value in given.items() if name in names})


@dataclass(frozen=True)
class StreamedCall:
    """A checked call."""

    problem: Problem
    sizes: Sizes
    device: torch.device
    engine: Backend
    settings: Settings
    # By argument name; the mask too, where there is one.
    inputs: dict[str, AnySource]

    def plan(self) -> RangePlan:
        """Its ranges."""
        # Plain ints: NumPy's overflow.
        given = self.settings.device_limit, self.settings.range_length
        limit, length = (None if x is None else operator.index(x) for x in given)
        if limit is None and self.device.type == "cuda":
            # What torch holds without using it is free to torch.
            idle = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            limit = int(_SHARE * (torch.cuda.mem_get_info(self.device)[0] + idle))
        limit = CPU_LIMIT if limit is None else limit
        return plan_ranges(self.problem, self.sizes, limit, length)

    def work(self) -> Pass:
        """The walk over its ranges."""
        readers = {name: sources.reader(name, x) for name, x in self.inputs.items()}
        return (BackwardPass if self.sizes.is_backward else ForwardPass)(self.plan(), readers, self.engine)

    def into(self, targets: Mapping[str, AnySink | None]) -> dict[str, Any]:
        """Computes everything into the targets, new tensors in place of None; nothing is written if one is refused."""
        taken: list[object] = [*self.inputs.values()]
        for name, x in targets.items():
            if x is not None:
                sources.check_target(name, x, self.spec(name), taken)
            taken.append(x)
        work = self.work()
        # On the CPU whatever the default device.
        filled = {name: self.spec(name).empty("cpu") if x is None else x for name, x in targets.items()}
        if self.problem.seq_len == 0 or self.sizes.batch == 0:
            return filled
        given = self.settings.pool
        pool = UnifiedMemoryPool(strategy="simple") if given is None else given
        writers = {name: sources.writer(name, x) for name, x in filled.items()}
        # The dtype is the inputs', as staging memory is laid out before anything is read.
        plain = torch.autocast(self.device.type, enabled=False)
        try:
            with torch.no_grad(), plain, _progress(len(work.plan.ranges), self.settings.progress) as tick:
                pipeline.run(work, writers, self.device, pool, tick)
        finally:
            if given is None:
                pool.trim()
        return filled

    def spec(self, name: str) -> Spec:
        """The shape and dtype of an input or result."""
        sizes = self.sizes
        if name == "lse":
            return Spec((sizes.batch, sizes.num_heads, self.problem.seq_len), accumulator(sizes.dtype))
        heads = sizes.num_kv_heads if name in ("k", "v", "dk", "dv") else sizes.num_heads
        return Spec((sizes.batch, self.problem.seq_len, heads, sizes.head_dim), sizes.dtype)


def prepare(settings: Settings, inputs: dict[str, AnySource], mask: Tensor | None = None) -> StreamedCall:
    """Checks a call, before anything is changed; one that reads the gradient of out is a backward."""
    specs = {name: sources.check_source(name, x) for name, x in inputs.items()}
    # Tensors of the same shapes without data, for checks that ask for some.
    meta = QKV(*(specs[name].empty("meta") for name in "qkv"))
    check.check_qkv(meta)
    (batch, n, heads, width), kv_heads = meta.q.shape, meta.k.shape[2]
    if meta.k.shape[1] != n:
        raise ValueError(
            f"expected k and v of as many positions as q, got {meta.k.shape[1]} and {n}: dilated_attention computes "
            "ranges of a sequence (q_start, k_start)"
        )
    problem = _problem(settings, meta)
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if settings.device is None else settings.device
    device = Runtime().place(check.check_device("device", chosen), pinned=False).device  # with its number
    # A backend is chosen by device, dtype and width: no rows are needed.
    rows = QKV(*(x.new_empty((batch, 0, *x.shape[2:]), device=device) for x in meta))
    engine = backend_for(rows, problem, settings.backend)
    is_fused = choose_backend(rows, problem, settings.backend).backend == "triton"
    is_masked, is_backward = mask is not None, "grad_out" in inputs
    sizes = Sizes(batch, heads, kv_heads, width, meta.q.dtype, is_masked, is_backward, is_fused, device.type)
    everything = inputs if mask is None else inputs | {"key_padding_mask": mask}
    call = StreamedCall(problem, sizes, device, engine, settings, everything)
    for name, spec in specs.items():
        sources.check_spec(name, spec, call.spec(name))
    if mask is not None:
        check.check_values("key_padding_mask", mask)
        check.check_key_padding_mask(mask, batch, n, torch.device("cpu"))
    return call


def _problem(settings: Settings, x: QKV) -> Problem:
    """The problem of the whole sequence; all settings but the device are checked."""
    lengths, rates = settings.segment_lengths, settings.dilation_rates
    pattern = DilatedPattern(lengths, rates, x.k.shape[2], settings.offsets)  # type: ignore[arg-type]
    is_causal = check.check_bool("is_causal", settings.is_causal)
    scale = check.check_scale(settings.scale, x.q.shape[3], x.q.dtype)
    check.check_bool("progress", settings.progress)
    if settings.pool is not None and not callable(getattr(settings.pool, "borrow", None)):
        raise TypeError(f"expected pool to be a UnifiedMemoryPool, got {type(settings.pool).__name__}")
    for name in ("device_limit", "range_length"):
        if getattr(settings, name) is not None:
            check.check_positive_int(name, getattr(settings, name))
    check.check_choice("backend", settings.backend, BackendName)
    if settings.backend == "reference":
        raise NotImplementedError(
            "backend='reference' computes whole sequences alone, with dilated_attention; expected 'auto', 'sdpa' or "
            "'triton' here"
        )
    shift = check_shift(settings.segment_shift, pattern.segment_lengths)
    if shift + x.q.shape[1] >= 2**63:
        raise ValueError(f"expected segment_shift to leave every position below 2**63, got {shift}")
    return Problem(pattern, is_causal, scale, 0.0, shift, shift, x.q.shape[1])


@contextmanager
def _progress(total: int, on: bool) -> Iterator[Callable[[], None]]:
    """What is called when a range is done."""
    if not on:
        yield lambda: None
        return
    try:
        from rich.progress import Progress
    except ModuleNotFoundError as error:
        words = "progress=True needs the package 'rich': pip install 'dilated-attention-pytorch[cli]'"
        raise ImportError(words) from error
    with Progress() as bar:
        task = bar.add_task("ranges", total=total)
        yield lambda: bar.advance(task)
