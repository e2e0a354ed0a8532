"""When lengths align, and how the kernels of `aligned.py` are launched."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import triton
from torch import Tensor, float32
from triton.tools.tensor_descriptor import TensorDescriptor

from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels.triton import aligned, configs
from dilated_attention_pytorch.kernels.triton.configs import Config, Direction
from dilated_attention_pytorch.kernels.triton.replay import Tape
from dilated_attention_pytorch.kernels.triton.views import NO_VIEWS, ViewPair, flat_views, strides_of
from dilated_attention_pytorch.kernels.triton.work import Work
from dilated_attention_pytorch.types import QKV, AttentionOutput, OutputGradient

_KERNELS = {"forward": ("aligned_forward",), "backward": ("aligned_dq", "aligned_dkv")}
_WHOLE = 1 << 30  # a segment length that no sequence exceeds
_MAX_RATE = 64


class Alignment(NamedTuple):
    """A pattern whose branches one launch can walk.

    Attributes:
        lengths: w_i, or a length beyond any sequence's for branches of one segment.
        rates: r_i.
        rate: R, their least common multiple.
        multiple: the largest number of rows of a tile that every segment is a multiple of.
        num_queries: rows of q.
        num_keys: rows of k and v; as many, where a branch has several segments.
        once: whether a key that several branches show is computed once (docs/design.md, D37). Then lengths ascend.
    """

    lengths: tuple[int, ...]
    rates: tuple[int, ...]
    rate: int
    multiple: int
    num_queries: int
    num_keys: int
    once: bool

    def takes(self, config: Config) -> bool:
        """Whether no tile straddles two segments, and there are rows for one tile of each kind at least."""
        fits = self.multiple % config.block_m == 0 and self.multiple % config.block_n == 0
        return fits and config.block_m * self.rate <= self.num_queries and config.block_n * self.rate <= self.num_keys

    def even(self, config: Config) -> bool:
        """Whether queries and keys are whole numbers of tiles, so that nothing is masked."""
        return (
            self.num_queries % (self.rate * config.block_m) == 0 and self.num_keys % (self.rate * config.block_n) == 0
        )


def alignment(work: Work) -> Alignment:
    """How the branches align, where `misalignment` finds no obstacle."""
    pattern, n = work.problem.pattern, work.problem.seq_len
    rate = math.lcm(*pattern.dilation_rates)
    lengths = tuple(length if length < n else _WHOLE for length in pattern.segment_lengths)
    # 0 where there is no inner border to straddle, which is a multiple of every tile.
    multiple = math.gcd(*(length // rate for length in lengths if length < n))
    branches = sorted(zip(lengths, pattern.dilation_rates, strict=True))
    once = len(branches) > 1 and all(nests(*pair) for pair in itertools.pairwise(branches))
    rates = pattern.dilation_rates
    if once:
        lengths, rates = zip(*branches, strict=True)
    return Alignment(lengths, rates, rate, multiple, work.x.q.shape[1], work.x.k.shape[1], once)


def nests(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    """Whether each segment of a branch (w, r) lies in one of another, whose residues are among its own."""
    (inner_length, inner_rate), (outer_length, outer_rate) = inner, outer
    return outer_rate % inner_rate == 0 and (outer_length == _WHOLE or outer_length % inner_length == 0)


def misalignment(problem: Problem, num_queries: int, num_keys: int, *, causal: bool = False) -> str | None:
    """Why one launch cannot walk all branches of unmasked ranges; None if it can.

    Args:
        causal: whether a causal mask is no obstacle.
    """
    rate = math.lcm(*problem.pattern.dilation_rates)
    inner = [length for length in problem.pattern.segment_lengths if length < problem.seq_len]
    obstacles = {
        "the range does not start at position 0": problem.q_start or problem.k_start,
        "it is causal": problem.is_causal and not causal,
        "it is causal, with other keys than queries": problem.is_causal and num_queries != num_keys,
        "it drops weights": problem.dropout_p > 0.0,
        "it has zero keys": problem.padding != "none",
        "it is empty": num_queries == 0 or num_keys == 0,
        f"its rates have a common multiple above {_MAX_RATE}": rate > _MAX_RATE,
        "a segment is no multiple of all rates": any(length % rate for length in inner),
        "it has several segments, with other keys than queries": inner and num_queries != num_keys,
    }
    return next((reason for reason, holds in obstacles.items() if holds), None)


def why_not(work: Work, direction: Direction) -> str | None:
    """The reason why these kernels do not take a call; None if they do."""
    if work.is_masked:
        return "it has masks or packing"
    if work.x.q.numel() == 0:
        return "it is empty"
    # Tiles at a stride waste more of the diagonal: only short causal sequences gain by one launch.
    short = work.x.q.numel() <= configs.SHORT_CAUSAL[direction]
    obstacle = misalignment(work.problem, work.x.q.shape[1], work.x.k.shape[1], causal=short)
    if obstacle is None and len(configs_for(work, direction)) < len(_KERNELS[direction]):
        return "no tile fits its segments and is filled by its rows"
    return obstacle


def configs_for(work: Work, direction: Direction) -> tuple[Config, ...]:
    """The best configuration of each kernel; fewer where one has none that its tiles fit."""
    plan = alignment(work)
    fitting = (
        [c for c in configs.candidates(kernel, work.x.q, work.problem.is_causal) if plan.takes(c)]
        for kernel in _KERNELS[direction]
    )
    # A causal tile at a stride straddles the diagonal with all of its rows: the smallest wastes the fewest pairs.
    pick = -1 if work.problem.is_causal and direction == "backward" else 0
    return tuple(found[pick] for found in fitting if found)


def forward(work: Work, tape: Tape, config: Config) -> AttentionOutput:
    """Out and lse by one launch."""
    (q, k, v), plan = work.x, alignment(work)
    batch, n, heads, _ = q.shape
    out = tape.empty(q, q.shape)
    lse = tape.empty(q, (batch, heads, n), float32)
    # Describing views takes the host longer than the copy engine saves on a short sequence.
    views = NO_VIEWS if q.numel() <= configs.SHORT_FORWARD else _views(k, v, plan, config, config.block_n)
    num_tiles = triton.cdiv(triton.cdiv(n, plan.rate), config.block_m)
    # A scale of 0 becomes a tiny one: 0 times a logit of -inf is NaN.
    args = (
        q, k, v, views.a, views.b, out, lse, *strides_of(q, k, v, out), *lse.stride()[:2],
        n, plan.num_keys, plan.num_keys // plan.rate, heads, k.shape[2], num_tiles,
        max(abs(work.logit_scale), 1e-30),
    )  # fmt: skip
    flags = _flags(work, plan, config, views) | {"NEGATE": work.problem.scale < 0}
    kernel, grid = aligned.aligned_forward, (batch * heads * num_tiles * plan.rate,)
    tape.note(kernel, grid, args, flags, kernel[grid](*args, **flags))
    return AttentionOutput(out, lse)


def backward(
    work: Work, grad: OutputGradient, saved: AttentionOutput, tape: Tape, dq_config: Config, dkv_config: Config
) -> QKV:
    """dq, dk and dv by two launches."""
    terms = terms_buffer(work, tape, max(dq_config.block_m, dkv_config.block_m))
    dq = backward_dq(work, grad, saved, terms, tape, dq_config)
    return QKV(dq, *backward_dkv(work, grad, terms, tape, dkv_config))


def terms_buffer(work: Work, tape: Tape, rows: int) -> Tensor:
    """Room for what the dK/dV pass needs of each query row, `[2, B, H, R, rows of a residue]`, in whole tiles."""
    batch, n, heads, _ = work.x.q.shape
    rate = alignment(work).rate
    length = triton.cdiv(triton.cdiv(n, rate), rows) * rows
    return tape.empty(work.x.q, (2, batch, heads, rate, length), float32)


def backward_dq(
    work: Work, grad: OutputGradient, saved: AttentionOutput, terms: Tensor, tape: Tape, config: Config
) -> Tensor:
    """dq; fills terms."""
    (q, k, v), (out, lse), plan = work.x, saved, alignment(work)
    batch, n, heads, _ = q.shape
    dq = tape.empty(q, q.shape)
    views = _views(k, v, plan, config, config.block_n)
    num_tiles = terms.shape[4] // config.block_m
    args = (
        q, k, v, views.a, views.b, out, grad.out, lse, grad.lse, terms, dq,
        *strides_of(q, k, v, out, grad.out, dq), *lse.stride()[:2],
        n, plan.num_keys, plan.num_keys // plan.rate, terms.shape[4], heads, k.shape[2], num_tiles,
        work.logit_scale, work.problem.scale,
    )  # fmt: skip
    flags = _flags(work, plan, config, views)
    kernel, grid = aligned.aligned_backward_dq, (batch * heads * num_tiles * plan.rate,)
    tape.note(kernel, grid, args, flags, kernel[grid](*args, **flags))
    return dq


def backward_dkv(work: Work, grad: OutputGradient, terms: Tensor, tape: Tape, config: Config) -> tuple[Tensor, Tensor]:
    """dk and dv."""
    (q, k, v), plan = work.x, alignment(work)
    batch, n, heads, _ = q.shape
    kv_heads = k.shape[2]
    dk, dv = tape.empty(k, k.shape), tape.empty(v, v.shape)
    views = _views(q, grad.out, plan, config, config.block_m)
    length = terms.shape[4]
    # One row of the view per residue: first all rows' lse, then all rows' delta.
    terms_view = TensorDescriptor(terms, [2 * batch * heads * plan.rate, length], [length, 1], [1, config.block_m])
    num_tiles = triton.cdiv(triton.cdiv(plan.num_keys, plan.rate), config.block_n)
    args = (
        q, k, v, views.a, views.b, grad.out, terms_view, dk, dv, *strides_of(q, k, v, grad.out, dk),
        n, plan.num_keys, n // plan.rate, batch, heads, kv_heads, num_tiles, work.logit_scale, work.problem.scale,
    )  # fmt: skip
    flags = _flags(work, plan, config, views) | {"GROUP": heads // kv_heads, "EARLY": config.early}
    kernel, grid = aligned.aligned_backward_dkv, (batch * kv_heads * num_tiles * plan.rate,)
    tape.note(kernel, grid, args, flags, kernel[grid](*args, **flags))
    return dk, dv


def _views(a: Tensor, b: Tensor, plan: Alignment, config: Config, rows: int) -> ViewPair:
    # A view's rows of all batches are one axis, so that a tile past one batch's end would read the next one's.
    if config.descriptors and (plan.even(config) or a.shape[0] == 1):
        return flat_views(a, b, plan.rate, rows)
    return NO_VIEWS


def _flags(work: Work, plan: Alignment, config: Config, views: ViewPair) -> dict[str, Any]:
    return {
        "LENGTHS": plan.lengths, "RATES": plan.rates, "R": plan.rate, "D": work.x.q.shape[3], "BLOCK_D": work.block_d,
        "MODULO": work.problem.pattern.offsets == "modulo", "VIEW": views.kind, "EVEN": plan.even(config),
        "ONCE": plan.once, "CAUSAL": work.problem.is_causal, "PRECISION": work.precision, **config.flags,
    }  # fmt: skip
