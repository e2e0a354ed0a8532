"""What the workers of the ring tests run, and how its result is judged against one device."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from dilated_attention_pytorch import DilatedPattern, MultiheadDilatedAttention, dilated_attention_with_lse
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels import ops
from dilated_attention_pytorch.ring_attention import RingAttentionConfig, RingDilatedAttention, counting, op, remote
from dilated_attention_pytorch.ring_attention.utils import communication
from dilated_attention_pytorch.testing import gradient_scale, relative_norm
from dilated_attention_pytorch.types import NO_MASKS, QKV, AttentionOutput, Masks, OutputGradient

LENGTHS = (1, 5, 13, 16, 24, 31, 48, 64, 97, 128)
SEGMENTS = (1, 2, 4, 7, 8, 16, 20, 33, 64, 128, 200)
RATES = (1, 2, 3, 4, 5, 8, 12)

TOLERANCE = 1e-12

Groups = dict[int, dist.ProcessGroup]
SPREAD = {"segment_lengths": [4, 16, 64], "dilation_rates": [1, 2, 4]}  # local and remote branches at 2, 4 and 8 ranks


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")


@dataclass
class RingCase:
    """A whole sequence and how it is attended to; where ranks cut it comes with the call."""

    length: int
    batch: int
    kv_heads: int
    group: int
    width: int
    pattern: dict[str, Any]
    is_causal: bool = False
    masked: bool = False
    dropout: float = 0.0
    uses_lse: bool = False
    seed: int = 0
    uneven: bool = False
    packed: bool = False
    padding: str = "none"
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
        """q, k, v, the cotangents of out and lse, and the mask."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = self.kv_heads * self.group
        rows = (self.batch, self.length)
        shapes = [(*rows, n, self.width) for n in (heads, self.kv_heads, self.kv_heads, heads)]
        shapes.append((self.batch, heads, self.length))
        drawn = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
        mask = torch.rand(rows, generator=generator) < 0.6 if self.masked else None
        return [x.to(dtype) for x in drawn[:4]] + [drawn[4].to(torch.promote_types(dtype, torch.float32))], mask

    def bounds(self, world_size: int) -> list[int]:
        """Where ranks cut: as torch.chunk does, or anywhere."""
        if self.uneven:
            cuts = random.Random(self.seed)
            return [0, *sorted(cuts.randint(0, self.length) for _ in range(world_size - 1)), self.length]
        size = -(-self.length // world_size)
        return [min(i * size, self.length) for i in range(world_size + 1)]

    def whole(self, dtype: torch.dtype = torch.float64, backend: str = "sdpa") -> dict[str, Tensor]:
        """On one device."""
        (q, k, v, grad_out, grad_lse), mask = self.tensors(dtype)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out, lse = dilated_attention_with_lse(
            q, k, v, **self.pattern, is_causal=self.is_causal, key_padding_mask=mask, dropout_p=self.dropout,
            seed=self.seed, padding=self.padding, backend=backend,
        )  # fmt: skip
        return self._differentiate((q, k, v), out, lse, grad_out, grad_lse)

    def whole_of_rounded(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """On one device, fp64 arithmetic on inputs rounded to the dtype: what low precision is measured against."""
        tensors = self.tensors
        self.tensors = lambda _: ([x.double() for x in tensors(dtype)[0]], tensors(dtype)[1])  # type: ignore[method-assign]
        try:
            return self.whole(torch.float64)
        finally:
            del self.tensors

    def _differentiate(
        self, inputs: tuple[Tensor, ...], out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor
    ) -> dict[str, Tensor]:
        objective = (out * grad_out).sum()
        if self.uses_lse:
            objective = objective + (lse.masked_fill(torch.isneginf(lse), 0.0) * grad_lse).sum()
        dq, dk, dv = torch.autograd.grad(objective, inputs)
        return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}

    def shard(
        self, group: dist.ProcessGroup | None, rank: int, world_size: int, mode: str, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """One rank's part."""
        drawn_tensors, mask = self.tensors(dtype)
        q, k, v, grad_out, grad_lse = (x.to(device()) for x in drawn_tensors)
        start, stop = self.bounds(world_size)[rank : rank + 2]
        q, k, v = (x[:, start:stop].clone() for x in (q, k, v))
        if self.packed:  # views with strides, as a joint projection gives them
            k, v = torch.stack((k, v), 2).unbind(2)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        settings = {"mode": mode, "dropout": self.dropout, "padding": self.padding, "timeout": 20}
        attention = RingDilatedAttention(RingAttentionConfig(**self.pattern, **settings, **self.options), group)
        own_mask = None if mask is None else mask[:, start:stop].to(device())
        seed = self.seed if self.dropout else None
        out, lse = attention.with_lse(q, k, v, self.is_causal, own_mask, seed=seed)
        results = self._differentiate((q, k, v), out, lse, grad_out[:, start:stop], grad_lse[:, :, start:stop])
        return {name: x.cpu() for name, x in results.items()}

    def errors(self, shards: list[dict[str, Tensor]], want: dict[str, Tensor]) -> dict[str, float]:
        """The worst relative norm over the ranks, result by result."""
        (q, k, v, grad_out, grad_lse), _ = self.tensors(torch.float64)
        used = grad_lse if self.uses_lse else None
        scale = self.width**-0.5
        scales = {
            "dq": gradient_scale(grad_out, used, v, k, scale),
            "dk": gradient_scale(grad_out, used, v, q, scale),
        }
        bounds, worst = self.bounds(len(shards)), dict.fromkeys(want, 0.0)
        for rank, shard in enumerate(shards):
            for name, whole in want.items():
                rows = slice(bounds[rank], bounds[rank + 1])
                part = whole[:, :, rows] if name == "lse" else whole[:, rows]
                error = relative_norm(shard[name], part) if part.numel() else 0.0
                if error > TOLERANCE:  # unless the true gradient vanishes by cancellation
                    error = relative_norm(shard[name], part, scale=scales.get(name, 0.0))
                worst[name] = max(worst[name], error)
        return worst


def drawn(number: int) -> RingCase:
    """The configuration of a number: any lengths, all options."""
    draw = random.Random(number)
    branches = draw.randint(1, 4)
    pattern = {
        "segment_lengths": [draw.choice(SEGMENTS) for _ in range(branches)],
        "dilation_rates": [draw.choice(RATES) for _ in range(branches)],
        "offsets": draw.choice(["modulo", "blocked"]),
    }
    kind = draw.choice(["plain", "plain", "masked", "dropout", "lse"])
    options: dict[str, Any] = {"check": draw.choice(["first", "always"])}
    if draw.random() < 0.3:
        options["remote_rows"] = "refetch"
    return RingCase(
        length=draw.choice(LENGTHS),
        batch=draw.choice([1, 1, 2, 3]),
        kv_heads=draw.choice([1, 2, 3, 4]),
        group=draw.choice([1, 1, 2, 3]),
        width=draw.choice([1, 4, 5]),
        pattern=pattern,
        is_causal=draw.random() < 0.5,
        masked=kind == "masked" or draw.random() < 0.15,
        dropout=0.4 if kind == "dropout" else 0.0,
        uses_lse=kind == "lse" or draw.random() < 0.15,
        seed=number,
        uneven=draw.random() < 0.4,
        packed=draw.random() < 0.3,
        options=options,
    )


def filled_up(number: int) -> RingCase:
    """A drawn configuration with `padding="zero_keys"`, for which the official code moves no rows."""
    case, draw = drawn(number), random.Random(-number)
    case.is_causal, case.masked, case.padding = False, False, "zero_keys"
    rates = case.pattern["dilation_rates"]
    case.pattern["segment_lengths"] = [draw.choice([r * draw.randint(1, 9), case.length, 200]) for r in rates]
    return case


def run_cases(
    groups: Groups, cases: list[tuple[RingCase, int, str, torch.dtype]], mutation: str = ""
) -> list[dict[str, Tensor] | None]:
    """Each case on as many ranks as it names; None from the others."""
    rank, results = dist.get_rank(), []
    for case, world_size, mode, dtype in cases:
        if rank >= world_size:
            results.append(None)
            continue
        with PATCHES[mutation]() if mutation else nullcontext():
            results.append(case.shard(groups.get(world_size), rank, world_size, mode, dtype))
    return results


@contextmanager
def through_the_op() -> Iterator[None]:
    """Nothing broken: a backend that computes each part by the library's own op, results in the inputs' dtype."""

    class ByTheOp:
        @staticmethod
        def forward(x: QKV, problem: Problem, masks: Masks = NO_MASKS) -> AttentionOutput:
            return AttentionOutput(*ops.attention(*x, *masks, *problem.pack(), "sdpa"))

        @staticmethod
        def backward(
            grad: OutputGradient, x: QKV, saved: AttentionOutput, problem: Problem, masks: Masks = NO_MASKS
        ) -> QKV:
            return QKV(*ops.attention_backward(*grad, *saved, *x, *masks, *problem.pack(), "sdpa"))

    with mock.patch.object(op, "backend_for", lambda *_: ByTheOp):
        yield


def refused(groups: Groups, config: dict[str, Any], call: dict[str, Any]) -> str:
    """What a legal shard of 8 positions raises, on every rank."""
    config = {"dilation_rates": [1] * len(config["segment_lengths"]), "timeout": 20} | config
    attention = RingDilatedAttention(RingAttentionConfig(**config), groups[dist.get_world_size()])
    q = torch.zeros(1, 8, 2, 4)
    try:
        attention(q, q, q, **call)
    except ValueError as error:
        return str(error)
    return "nothing"


def tangent(groups: Groups) -> str:
    """What a forward-mode derivative ends in, on every rank."""
    q = torch.zeros(1, 8, 2, 4)
    attention = _attention(groups[dist.get_world_size()], [64], "first")
    try:
        torch.func.jvp(lambda x: attention(x, q, q), (q,), (q,))
    except NotImplementedError as error:
        return str(error)
    return "nothing"


# Routing broken on purpose. Each must make `RingCase.errors` red.


@contextmanager
def drop_a_hop() -> Iterator[None]:
    """What comes from the rank before is lost."""
    wait = communication.Pending.wait

    def lossy(self: communication.Pending) -> Tensor:
        result, first = wait(self), 0
        if self.purpose == "rows" and result.dim() == 4:
            channel = self.channel
            row = result[:1].numel() * result.element_size() or 1
            for peer, size in self.incoming.items():
                if peer == (channel.rank - 1) % channel.world_size:
                    result[first : first + size // row] = 0
                first += size // row
        return result

    with mock.patch.object(communication.Pending, "wait", lossy):
        yield


@contextmanager
def swap_k_and_v() -> Iterator[None]:
    pack = remote.pack
    with mock.patch.object(remote, "pack", lambda k, v, index: pack(v, k, index)):
        yield


@contextmanager
def stale_rows() -> Iterator[None]:
    """Rows of an earlier call are sent: here those of a tensor that has since changed."""
    pack = remote.pack
    with mock.patch.object(remote, "pack", lambda k, v, index: pack(k * 0.5, v, index)):
        yield


@contextmanager
def wrong_owner() -> Iterator[None]:
    """Rows are taken from where those of another owner, or of another head, lie."""
    wait = communication.Pending.wait

    def rolled(self: communication.Pending) -> Tensor:
        result = wait(self)
        if result.dim() == 4 and result.shape[0] > 1:
            result.copy_(result.roll(max(1, result.shape[0] // 2), 0))
        return result

    with mock.patch.object(communication.Pending, "wait", rolled):
        yield


@contextmanager
def gradients_to_the_wrong_owner() -> Iterator[None]:
    add_home = remote.add_home

    def shifted(dk: Tensor, dv: Tensor, index: tuple[Tensor, Tensor], grads: Tensor) -> None:
        add_home(dk, dv, ((index[0] + 1) % dk.shape[1], index[1]), grads)

    with mock.patch.object(remote, "add_home", shifted):
        yield


@contextmanager
def swap_dk_and_dv() -> Iterator[None]:
    add_home = remote.add_home
    with mock.patch.object(remote, "add_home", lambda dk, dv, index, grads: add_home(dv, dk, index, grads)):
        yield


@contextmanager
def missing_wait() -> Iterator[None]:
    """The buffer is read as it is when the exchange starts: as uninitialised memory, which is made to show."""
    start, wait = communication.Pending.start, communication.Pending.wait

    def snapshot(self: communication.Pending, launch: Any) -> communication.Pending:
        self._before = torch.full_like(self.result, 1)
        return start(self, launch)

    def too_early(self: communication.Pending) -> Tensor:
        result = wait(self)  # so that the ranks stay in step
        return self._before if result.dim() == 4 else result

    with (
        mock.patch.object(communication.Pending, "start", snapshot),
        mock.patch.object(communication.Pending, "wait", too_early),
    ):
        yield


@contextmanager
def local_lse_in_backward() -> Iterator[None]:
    """The field's classic: remote keys differentiated with something else than the global lse."""
    differentiate = remote.differentiate

    def wrong(*arguments: Any) -> Any:
        *before, saved, masks = arguments
        return differentiate(*before, saved._replace(lse=saved.lse + 0.1), masks)

    with mock.patch.object(remote, "differentiate", wrong):
        yield


MUTATIONS = {
    f.__name__: f
    for f in (
        drop_a_hop, swap_k_and_v, stale_rows, wrong_owner, gradients_to_the_wrong_owner, swap_dk_and_dv, missing_wait,
        local_lse_in_backward,
    )
}  # fmt: skip
PATCHES = {"through_the_op": through_the_op, **MUTATIONS}


def count(groups: Groups, case: RingCase, world_size: int, mode: str, dtype: torch.dtype) -> dict[str, Any] | None:
    """What one forward and backward moved."""
    rank = dist.get_rank()
    if rank >= world_size:
        return None
    with counting() as traffic:
        case.shard(groups[world_size], rank, world_size, mode, dtype)
    return {"sent": traffic.sent, "received": traffic.received, "calls": traffic.calls}


def disagree(groups: Groups, world_size: int, changes: dict[int, dict[str, Any]], check: str) -> str:
    """A call that some ranks make differently, after one that all make alike; gives the error's text."""
    rank = dist.get_rank()
    if rank >= world_size:
        return ""
    mine = {"shape": (2, 8, 2, 4), "dtype": torch.float64, "segment_lengths": [64], "is_causal": False, "grad": True}
    attention = _attention(groups[world_size], mine["segment_lengths"], check)
    x = torch.zeros(mine["shape"], dtype=mine["dtype"], requires_grad=True)
    attention(x, x, x)
    mine |= changes.get(rank, {})
    attention = _attention(groups[world_size], mine["segment_lengths"], check)
    x = torch.zeros(mine["shape"], dtype=mine["dtype"], requires_grad=mine["grad"])
    try:
        attention(x, x, x, is_causal=mine["is_causal"])
    except communication.RingError as error:
        return str(error)
    return "no error"


def _attention(group: dist.ProcessGroup, lengths: list[int], check: str, timeout: float = 5) -> RingDilatedAttention:
    config = RingAttentionConfig(segment_lengths=lengths, dilation_rates=[1], check=check, timeout=timeout)
    return RingDilatedAttention(config, group)


def fail_at(groups: Groups, culprit: int, how: str, where: str, check: str) -> tuple[str, float]:
    """A rank that dies or sleeps before plans are compared, or between that and an exchange, forward or backward."""
    rank = dist.get_rank()
    group = groups[dist.get_world_size()]
    attention = _attention(group, [64], check, timeout=3)
    x = torch.randn(1, 8, 2, 4, dtype=torch.float64, requires_grad=True)
    attention(x, x, x).sum().backward()  # a healthy step first

    def trouble() -> None:
        if rank == culprit and how == "dies":
            os._exit(1)
        if rank == culprit:
            time.sleep(5.5)

    exchange = communication.Channel.exchange

    def troubled(self: communication.Channel, *arguments: Any) -> communication.Pending:
        trouble()
        return exchange(self, *arguments)

    start = time.monotonic()
    try:
        if where == "compare":
            trouble()
            attention(x, x, x)
        elif where == "exchange":
            with mock.patch.object(communication.Channel, "exchange", troubled):
                attention(x, x, x)
        else:
            out = attention(x, x, x)
            with mock.patch.object(communication.Channel, "exchange", troubled):
                out.sum().backward()
    except communication.RingError as error:
        return str(error), time.monotonic() - start
    return "no error", time.monotonic() - start


def crash(groups: Groups, culprit: int | None, seconds: float = 0.0) -> str:
    """What a fault in native code does to one rank; the others take so many seconds."""
    if dist.get_rank() == culprit:
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(seconds)
    return "no error"


def left_alone(groups: Groups, seconds: float) -> tuple[str, float]:
    """A rank that never comes, in a group that waits so many seconds; the configuration says nothing of it."""
    group = dist.new_group(list(range(dist.get_world_size())), timeout=timedelta(seconds=seconds))
    attention = RingDilatedAttention(RingAttentionConfig(segment_lengths=[64], dilation_rates=[1]), group)
    x, start = torch.zeros(1, 8, 2, 4), time.monotonic()
    try:
        if dist.get_rank() != 1:
            attention(x, x, x)
    except communication.RingError as error:
        return str(error), time.monotonic() - start
    return "no error", time.monotonic() - start


def compiled(groups: Groups, world_size: int, backend: str, keep: str) -> bool | None:
    """Whether the module compiles as one graph and gives what it gives in eager mode, forward and backward."""
    rank = dist.get_rank()
    if rank >= world_size:
        return None
    config = RingAttentionConfig(segment_lengths=[8, 64], dilation_rates=[1, 2], remote_rows=keep, timeout=60)
    attention = RingDilatedAttention(config, groups[world_size])
    generator = torch.Generator().manual_seed(rank)
    inputs = [torch.randn(1, 16, 2, 8, generator=generator, requires_grad=True) for _ in range(3)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (attention(q * 2, k, v, True) * 3).sin()

    want = run(*inputs)
    want_grads = torch.autograd.grad(want.sum(), inputs)
    got = torch.compile(run, fullgraph=True, backend=backend)(*inputs)
    got_grads = torch.autograd.grad(got.sum(), inputs)
    pairs = zip((got, *got_grads), (want, *want_grads), strict=True)
    return all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


def checked_op(groups: Groups, world_size: int, keep: bool) -> dict[str, str] | None:
    """torch's own checks of the op: schema, autograd registration, fake kernel, tracing."""
    if dist.get_rank() >= world_size:
        return None
    generator = torch.Generator().manual_seed(dist.get_rank())
    q, k, v = (torch.randn(1, 6, 2, 4, generator=generator, requires_grad=True) for _ in range(3))
    problem = Problem(DilatedPattern((64,), (1,), 2), is_causal=True, scale=0.5)
    wire = op.Wire(groups[world_size].group_name, "sparse", "", keep, True, False, "first", 20.0, "sdpa")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    return torch.library.opcheck(
        torch.ops.dilated_attention_pytorch.ring_attention.default, (q, k, v, None, None, *problem.pack(), *wire),
        test_utils=tests, raise_exception=False,
    )  # fmt: skip


def multihead(groups: Groups, world_size: int, wrap: bool) -> dict[str, Tensor] | None:
    """Out and parameter gradients of the multi-head module, with FSDP2 around it or summed by hand."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    rank = dist.get_rank()
    if rank >= world_size:
        return None
    attention, x, cotangent = multihead_inputs(groups[world_size])
    if wrap:
        mesh = DeviceMesh.from_group(groups[world_size], "cpu")
        fully_shard(attention, mesh=mesh)
    rows = slice(rank * 8, rank * 8 + 8)
    out = attention(x[:, rows], is_causal=True)
    (out * cotangent[:, rows]).sum().backward()
    grads = {}
    for name, parameter in attention.named_parameters():
        grad = parameter.grad.full_tensor() * world_size if wrap else parameter.grad.clone()
        if not wrap:
            dist.all_reduce(grad, group=groups[world_size])
        grads[name] = grad.detach()
    return {"out": out.detach(), **grads}


def multihead_inputs(group: dist.ProcessGroup | None) -> tuple[Any, Tensor, Tensor]:
    from dilated_attention_pytorch.ring_attention import RingDistributedDilatedAttention

    torch.manual_seed(0)
    config = RingAttentionConfig(segment_lengths=[4, 32], dilation_rates=[1, 2], timeout=20)
    attention = RingDistributedDilatedAttention(8, 4, config, group, num_kv_heads=2, dtype=torch.float64)
    return attention, torch.randn(2, 24, 8, dtype=torch.float64), torch.randn(2, 24, 8, dtype=torch.float64)


def drawn_seed(groups: Groups, world_size: int) -> tuple[Tensor, Tensor] | None:
    """Dropout without a seed from the caller: out and dv on ones, on every rank the first rank's mask."""
    rank = dist.get_rank()
    if rank >= world_size:
        return None
    torch.manual_seed(100 + rank)
    config = RingAttentionConfig(segment_lengths=[64], dilation_rates=[1], dropout=0.5, timeout=20)
    v = torch.ones(1, 8, 2, 4, dtype=torch.float64, requires_grad=True)
    out = RingDilatedAttention(config, groups[world_size])(torch.zeros_like(v), torch.zeros_like(v), v)
    (dv,) = torch.autograd.grad(out.sum(), v)
    return out.detach(), dv


def changing_lengths(groups: Groups, world_size: int) -> list[float] | None:
    """The last shard alone changes its length, which `check="always"` lets it."""
    rank = dist.get_rank()
    if rank >= world_size:
        return None
    config = RingAttentionConfig(segment_lengths=[64], dilation_rates=[1], check="always", timeout=20)
    found = []
    for last in (3, 9, 3):
        x = torch.zeros(1, last if rank == world_size - 1 else 5, 1, 2, dtype=torch.float64)
        _, lse = RingDilatedAttention(config, groups[world_size]).with_lse(x, x, x)
        found.append(float(lse.exp().mean()))
    return found


def out_of_step(groups: Groups) -> list[str]:
    """The first rank changes its shard one call before the second: what each call of this rank ends in."""
    rank, found = dist.get_rank(), []
    attention = _attention(groups[2], [8], "first")
    for lengths in ((8, 8), (12, 8), (12, 12)):
        x = torch.zeros(1, lengths[rank], 1, 2)
        try:
            attention(x, x, x)
        except communication.RingError as error:
            found.append(str(error))
            break
        found.append("no error")
    return found


def on_a_mesh(groups: Groups, world_size: int) -> bool:
    """A mesh of one dimension, and a dimension of one with two, mean the group that they hold."""
    from torch.distributed.device_mesh import init_device_mesh

    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size // world_size, world_size), mesh_dim_names=("data", "context"))
    config = RingAttentionConfig(segment_lengths=[64], dilation_rates=[1], timeout=20)
    x = torch.randn(1, 4, 1, 2, dtype=torch.float64)
    by_name = RingDilatedAttention(config, mesh, mesh_dim="context")
    by_slice = RingDilatedAttention(config, mesh["context"])
    assert by_name.world_size == by_slice.world_size == world_size
    try:
        RingDilatedAttention(config, mesh)
    except ValueError as error:
        assert "mesh_dim" in str(error)
    else:
        raise AssertionError("a mesh of two dimensions was taken without a name")
    return bool(torch.equal(by_name(x, x, x), by_slice(x, x, x)))


def under_autocast(groups: Groups, world_size: int) -> bool | None:
    """Autocast gives what casting by hand gives, and gradients in the inputs' dtype."""
    rank = dist.get_rank()
    if rank >= world_size:
        return None
    config = RingAttentionConfig(segment_lengths=[4, 64], dilation_rates=[1, 2], timeout=20)
    attention = RingDilatedAttention(config, groups[world_size])
    x = torch.randn(1, 8, 2, 4, generator=torch.Generator().manual_seed(rank), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(x, x, x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    # Each for itself: their gradients are then added in fp32.
    by_hand = attention(*(x.to(torch.bfloat16) for _ in range(3)))
    (want,) = torch.autograd.grad(by_hand.sum(), x)
    return out.dtype == torch.bfloat16 and torch.equal(out, by_hand) and torch.equal(grad, want)


def checkpointed(groups: Groups, world_size: int) -> bool | None:
    """Activation checkpointing computes the forward again, with the mask it had."""
    from torch.utils.checkpoint import checkpoint

    rank = dist.get_rank()
    if rank >= world_size:
        return None
    config = RingAttentionConfig(segment_lengths=[4, 64], dilation_rates=[1, 2], dropout=0.5, timeout=20)
    attention = RingDilatedAttention(config, groups[world_size])
    x = torch.randn(1, 8, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(rank), requires_grad=True)
    grads = []
    for run in (attention, lambda *inputs: checkpoint(attention, *inputs, use_reentrant=False)):
        torch.manual_seed(rank)
        grads += torch.autograd.grad(run(x, x, x).sin().sum(), x)
    return torch.allclose(*grads, rtol=1e-12)


def alone(groups: Groups, case: RingCase, dtype: torch.dtype) -> dict[str, Tensor]:
    """The whole sequence on this rank's device."""
    return case.shard(None, 0, 1, "sparse", dtype)


def rotary_module() -> tuple[MultiheadDilatedAttention, Tensor]:
    torch.manual_seed(0)
    attention = MultiheadDilatedAttention(
        16, 4, segment_lengths=[4, 32], dilation_rates=[1, 2], positions="xpos", dtype=torch.float64
    )
    return attention, torch.randn(2, 24, 16, dtype=torch.float64)


def swapped_in(groups: Groups, world_size: int) -> Tensor | None:
    """A MultiheadDilatedAttention whose inner attention is replaced: how a model becomes context-parallel."""
    rank = dist.get_rank()
    if rank >= world_size:
        return None
    attention, x = rotary_module()
    config = RingAttentionConfig(segment_lengths=[4, 32], dilation_rates=[1, 2], timeout=20)
    attention.attention = RingDilatedAttention(config, groups[world_size])
    own = x[:, rank * 8 : rank * 8 + 8]
    return attention(own, own, own, is_causal=True, rotation=attention.rotation(own, start=rank * 8))[0].detach()
