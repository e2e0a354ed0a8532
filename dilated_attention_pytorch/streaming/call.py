"""From what a user passes to a checked call, and from there to the walk over its ranges."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.memory.unified_pool import UnifiedMemoryPool
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.precision import accumulator
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels.backend import Backend
from dilated_attention_pytorch.kernels.choice import backend_for, choose_backend
from dilated_attention_pytorch.streaming import pipeline
from dilated_attention_pytorch.streaming.checks import Spec, check_device, check_source, check_spec, check_target
from dilated_attention_pytorch.streaming.passes import BackwardPass, ForwardPass, Pass
from dilated_attention_pytorch.streaming.ranges import RangePlan, Sizes, plan_ranges
from dilated_attention_pytorch.streaming.sources import AnySink, AnySource, reader, writer
from dilated_attention_pytorch.types import QKV, BackendName, Offsets

CPU_LIMIT = 1 << 30  # bytes that a pass takes on a CPU if no limit is given
_SHARE = 0.8  # of a GPU's free memory


@dataclass(frozen=True)
class Settings:
    """The arguments that a forward and its backward share, as `dilated_attention_streamed` takes them."""

    segment_lengths: Sequence[int]
    dilation_rates: Sequence[int]
    is_causal: bool = False
    scale: float | None = None
    offsets: Offsets = "modulo"
    backend: BackendName = "auto"
    device: torch.device | str | None = None
    device_limit: int | None = None
    range_length: int | None = None
    pool: UnifiedMemoryPool | None = None
    progress: bool = False


class Upstream(NamedTuple):
    """What a backward reads beside the inputs: the gradient, and what the forward gave."""

    grad_out: AnySource
    out: AnySource
    lse: AnySource


class Inputs(NamedTuple):
    """Everything that a call reads; `upstream` makes it a backward."""

    q: AnySource
    k: AnySource
    v: AnySource
    key_padding_mask: Tensor | None = None
    upstream: Upstream | None = None

    def named(self) -> dict[str, AnySource]:
        """All but the mask, by argument name."""
        found: dict[str, AnySource] = {"q": self.q, "k": self.k, "v": self.v}
        return found if self.upstream is None else found | self.upstream._asdict()


@dataclass(frozen=True)
class StreamedCall:
    """A checked call."""

    problem: Problem
    sizes: Sizes
    device: torch.device
    engine: Backend
    settings: Settings
    inputs: Inputs

    def plan(self) -> RangePlan:
        """Its ranges."""
        # Plain ints: NumPy's overflow.
        given = self.settings.device_limit, self.settings.range_length
        limit, length = (None if x is None else operator.index(x) for x in given)
        if limit is None and self.device.type == "cuda":
            # What torch holds without using it is free to torch.
            idle = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            limit = int(_SHARE * (torch.cuda.mem_get_info(self.device)[0] + idle))
        elif limit is None:
            limit = CPU_LIMIT
        return plan_ranges(self.problem, self.sizes, limit, length)

    def work(self) -> Pass:
        """The walk over its ranges."""
        inputs, mask = self.inputs.named(), self.inputs.key_padding_mask
        given = inputs if mask is None else inputs | {"key_padding_mask": mask}
        readers = {name: reader(name, x) for name, x in given.items()}
        kind = BackwardPass if self.sizes.is_backward else ForwardPass
        return kind(self.plan(), readers, self.engine)

    def into(self, targets: Mapping[str, AnySink | None]) -> dict[str, Any]:
        """Computes everything into the targets, new tensors in place of None; nothing is written if one is refused."""
        taken: list[object] = [*self.inputs.named().values(), self.inputs.key_padding_mask]
        for name, x in targets.items():
            if x is not None:
                check_target(name, x, self.spec(name), taken)
            taken.append(x)
        work = self.work()
        # On the CPU whatever the default device.
        filled = {name: self.spec(name).empty("cpu") if x is None else x for name, x in targets.items()}
        self.run(work, filled)
        return filled

    def run(self, work: Pass, targets: Mapping[str, AnySink]) -> None:
        """Computes everything into the targets; tensors are marked as unfinished until all of it is there."""
        if self.problem.seq_len == 0 or self.sizes.batch == 0:
            return
        given = self.settings.pool
        pool = UnifiedMemoryPool(strategy="simple") if given is None else given
        writers = {name: writer(name, x) for name, x in targets.items()}
        try:
            # The dtype is the inputs', as staging memory is laid out before anything is read.
            plain = torch.autocast(self.device.type, enabled=False)
            with torch.no_grad(), plain, _progress(len(work.plan.ranges), self.settings.progress) as tick:
                pipeline.run(work, writers, self.device, pool, tick)
        finally:
            if given is None:
                pool.trim()

    def spec(self, name: str) -> Spec:
        """The shape and dtype of an input or result."""
        sizes = self.sizes
        if name == "lse":
            return Spec((sizes.batch, sizes.num_heads, self.problem.seq_len), accumulator(sizes.dtype))
        heads = sizes.num_kv_heads if name in ("k", "v", "dk", "dv") else sizes.num_heads
        return Spec((sizes.batch, self.problem.seq_len, heads, sizes.head_dim), sizes.dtype)


def prepare(settings: Settings, inputs: Inputs) -> StreamedCall:
    """Checks a call, before anything is changed."""
    specs = {name: check_source(name, x) for name, x in inputs.named().items()}
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
    device = check_device(settings.device)
    # A backend is chosen by device, dtype and width: no rows are needed.
    rows = QKV(*(x.new_empty((batch, 0, *x.shape[2:]), device=device) for x in meta))
    engine, chosen = backend_for(rows, problem, settings.backend), choose_backend(rows, problem, settings.backend)
    mask, is_backward, is_fused = inputs.key_padding_mask, inputs.upstream is not None, chosen.backend == "triton"
    sizes = Sizes(
        batch, heads, kv_heads, width, meta.q.dtype, mask is not None, is_backward, is_fused, device.type
    )  # fmt: skip
    call = StreamedCall(problem, sizes, device, engine, settings, inputs)
    for name in Upstream._fields if is_backward else ():
        check_spec(name, specs[name], call.spec(name))
    if mask is not None:
        check.check_key_padding_mask(mask, batch, n, torch.device("cpu"))
    return call


def _problem(settings: Settings, x: QKV) -> Problem:
    """The problem of the whole sequence; all settings but the device are checked."""
    pattern = DilatedPattern(
        settings.segment_lengths, settings.dilation_rates, x.k.shape[2], settings.offsets  # type: ignore[arg-type]
    )  # fmt: skip
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
    return Problem(pattern, is_causal, scale, seq_len=x.q.shape[1])


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
