"""Ring attention along a curve: each rank's shard, and each segment, is a compact region of the image or volume.

Who attends to whom is decided by places along the curve. `is_causal` compares original positions all the same, and
exactly: in one branch, a segment's rows of one offset see each other and nobody else, so they may change places among
themselves. Sorted by original position, "not later" is the causal order the kernels know. Each branch is one such
call, on any backend, and the branches merge by log-sum-exp (docs/spec.md, 4).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from dilated_attention_pytorch.core import validation
from dilated_attention_pytorch.core.members import segment_and_residue
from dilated_attention_pytorch.core.merge import merge_attention
from dilated_attention_pytorch.core.precision import accumulator
from dilated_attention_pytorch.functional import in_autocast_dtype
from dilated_attention_pytorch.kernels.hilbert import Curve, CurveOrder, curve_order
from dilated_attention_pytorch.ring_attention.config import RingAttentionConfig
from dilated_attention_pytorch.ring_attention.plan import equal_bounds
from dilated_attention_pytorch.ring_attention.production import GroupOrMesh, RingDilatedAttention
from dilated_attention_pytorch.ring_attention.utils import handshake, rows
from dilated_attention_pytorch.ring_attention.utils.communication import Channel
from dilated_attention_pytorch.types import QKV, AttentionOutput, Seed

CausalAlong = Literal["original", "curve"]
# Odd, so no two branches of one seed share a dropout mask.
_SEED_STEP = 0x9E3779B97F4A7C15 - 2**64

if TYPE_CHECKING:
    _Ring = RingDilatedAttention
else:
    _Ring = object


class HilbertMixin(_Ring):
    """Reorders around the attention of a ring class it stands before: `class Mine(HilbertMixin, RingDilatedAttention)`.

    With more than one rank, sequences are cut as `torch.chunk` cuts them.

    Args:
        config: of the ring.
        process_group: as in `RingDilatedAttention`.
        grid: `(h, w)` or `(d, h, w)` tokens in raster order.
        coords: in place of grid, `(N, 2)` or `(N, 3)`. Neither: `set_order` must follow.
        curve: `"hilbert"`, or `"morton"`, `"snake"`, `"raster"` for comparison.
        causal_along: what `is_causal` compares: `"original"` positions, or places along the `"curve"`.
        mesh_dim: as in `RingDilatedAttention`.

    Raises:
        ValueError: both grid and coords, an unknown option; what does not fit.
    """

    takes_rows_along: ClassVar[CausalAlong] = "original"

    def __init__(
        self,
        config: RingAttentionConfig,
        process_group: GroupOrMesh = None,
        *,
        grid: Sequence[int] | None = None,
        coords: Tensor | None = None,
        curve: Curve = "hilbert",
        causal_along: CausalAlong = "original",
        mesh_dim: str | None = None,
    ) -> None:
        # The base class takes 0.2's lengths and rates in its place too.
        validation.check_instance("config", config, RingAttentionConfig)
        super().__init__(config, process_group, mesh_dim=mesh_dim)
        validation.check_choice("curve", curve, Curve)
        validation.check_choice("causal_along", causal_along, CausalAlong)
        self.curve: Curve = curve
        self.causal_along: CausalAlong = causal_along
        self.branches = torch.nn.ModuleList(
            RingDilatedAttention(
                replace(config, segment_lengths=(length,), dilation_rates=(rate,)), process_group, mesh_dim=mesh_dim
            )
            for length, rate in zip(config.segment_lengths, config.dilation_rates, strict=True)
        )
        self._order: CurveOrder | None = None
        self._moves: dict[tuple[int | None, torch.device], rows.Move] = {}
        self._agreed = False
        if grid is not None or coords is not None:
            self.set_order(coords, grid=grid)

    def set_order(self, coords: Tensor | None = None, *, grid: Sequence[int] | None = None) -> CurveOrder:
        """Takes the tokens' places from now on, the same on every rank; arguments as in `curve_order`."""
        self._order = curve_order(self.curve, coords, grid=grid)
        self._moves, self._agreed = {}, False
        return self._order

    @property
    def order(self) -> CurveOrder:
        """The order in force."""
        if self._order is None:
            raise ValueError("expected the tokens' places by grid=, coords= or set_order(), got none yet")
        return self._order

    def apply_hilbert_ordering(self, x: Tensor, dim: int = 1) -> Tensor:
        """A whole sequence along the curve; masks and coordinates go through it like embeddings."""
        return self.order.apply(x, dim)

    def undo_hilbert_ordering(self, x: Tensor, dim: int = 1) -> Tensor:
        """A whole sequence that is along the curve, back in its original order."""
        return self.order.undo(x, dim)

    def own_rows(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's shard of a whole sequence."""
        bounds = equal_bounds(x.shape[dim], self.world_size)
        return x.narrow(dim, bounds[self.rank], bounds[self.rank + 1] - bounds[self.rank])

    @override
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, key_padding_mask: Tensor | None, seed: Seed
    ) -> AttentionOutput:
        # Causality by original position sorts each branch's rows its own way: a call per branch.
        by_branch = is_causal and self.causal_along == "original"
        plain = functools.partial(super().attend, is_causal=is_causal, seed=seed)
        if not by_branch and self.takes_rows_along == "curve":
            return plain(query, key, value, key_padding_mask=key_padding_mask)
        self._check(query)
        x = QKV(*in_autocast_dtype(query, key, value))
        if not by_branch:
            return self._attend_moved(None, plain, x, key_padding_mask)

        def part(i: int, branch: Any) -> AttentionOutput:
            attend = functools.partial(branch.attend, is_causal=True, seed=_branch_seed(seed, i))
            out, lse = self._attend_moved(i, attend, x, key_padding_mask)
            return AttentionOutput(out.to(accumulator(out.dtype)), lse)

        # Merged in the accumulator's dtype, one after the other, and rounded once, at the end.
        out, lse = functools.reduce(merge_attention, itertools.starmap(part, enumerate(self.branches)))
        return AttentionOutput(out.to(x.q.dtype), lse)

    def _attend_moved(
        self, branch: int | None, attend: Callable[..., AttentionOutput], x: QKV, mask: Tensor | None
    ) -> AttentionOutput:
        """Attention with the rows laid out for a branch (all of them along the curve for None), and put back."""
        move = self._move(branch, x.q.device)
        # (B, n, H + 2 H_kv, D): one exchange
        together = rows.lay_out(torch.cat(x, 2), move, self._channel)
        if mask is not None:
            mask = rows.lay_out(mask, move, self._channel, "mask")
        out, lse = attend(*together.split([y.shape[2] for y in x], 2), key_padding_mask=mask)
        back = move.reversed()
        out = rows.lay_out(out, back, self._channel)
        return AttentionOutput(out, rows.lay_out(lse.transpose(1, 2), back, self._channel).transpose(1, 2))

    def _check(self, query: Tensor) -> None:
        """Shards are this order's; all ranks have the same one."""
        expected = equal_bounds(len(self.order.order), self.world_size)
        length = expected[self.rank + 1] - expected[self.rank]
        if query.shape[1] != length:
            raise ValueError(
                f"expected {length} positions on rank {self.rank} of {self.world_size}, its part of the order's "
                f"{expected[-1]} as torch.chunk cuts them, got {query.shape[1]}"
            )
        # Compared once per order, not per call.
        if self._agreed or self.world_size == 1 or self.config.check == "never":
            return
        told = {"curve order": _checksum(self.order.order), "causal_along": self.causal_along}
        self._begin(told, length, phase="order", check="always")
        self._agreed = True

    def _move(self, branch: int | None, device: torch.device) -> rows.Move:
        if (branch, device) not in self._moves:
            found = self.order
            index = torch.arange(len(found.order), device=found.order.device)
            if branch is not None:
                config = self.config
                kind = config.segment_lengths[branch], config.dilation_rates[branch], config.segment_shift
                index = causal_layout(found, *kind)
            # Places along the curve; as rows of the original sequence where those are what comes in.
            if self.takes_rows_along == "original":
                index = found.order[index]
            bounds = equal_bounds(len(index), self.world_size)
            self._moves[branch, device] = rows.Move.plan(index.to(device), bounds, self.rank)
        return self._moves[branch, device]

    def _channel(self) -> Channel:
        return self._begin({}, 0, phase="layout", check="never")

    def _begin(self, told: dict[str, Any], length: int, **how: str) -> Channel:
        return handshake.begin(self.group_name, told, length, 0, **how, timeout=self.config.timeout)[0]

    @override
    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, curve={self.curve!r}, causal_along={self.causal_along!r}"


class RingDilatedAttentionHilbert(HilbertMixin, RingDilatedAttention):
    """`RingDilatedAttention` over a sequence that is already along the curve: the model orders once, at its input.

    It differs from `HilbertRingAttention` in one thing: it takes and gives rows along the curve, the other in their
    original order. Arguments are those of `HilbertMixin`.

    What is sharded is the ordered sequence: `own_rows(apply_hilbert_ordering(x))` is a rank's part, a compact region,
    and masks take the same way. Results stay along the curve. Without causality, and with `causal_along="curve"`, this
    is `RingDilatedAttention` to the bit. With causality by original position each branch is a call of its own: rows of
    branches that span ranks travel once more, to where their segment sorts them, and back.

    Example:
        >>> from dilated_attention_pytorch.ring_attention import (
        ...     RingAttentionConfig, RingDilatedAttentionHilbert,
        ... )
        >>> config = RingAttentionConfig(segment_lengths=[16, 64], dilation_rates=[1, 2])
        >>> attention = RingDilatedAttentionHilbert(config, grid=(12, 12))
        >>> x = attention.own_rows(attention.apply_hilbert_ordering(torch.randn(1, 144, 4, 8)))
        >>> attention.undo_hilbert_ordering(attention(x, x, x)).shape
        torch.Size([1, 144, 4, 8])
    """

    takes_rows_along = "curve"


class HilbertRingAttention(HilbertMixin, RingDilatedAttention):
    """`RingDilatedAttention` that orders around each call: it takes and gives rows in their original order.

    It differs from `RingDilatedAttentionHilbert` in one thing: it takes and gives rows in their original order, the
    other along the curve. Arguments are those of `HilbertMixin`.

    A drop-in for models that know of no curve. A rank holds a contiguous shard of the original sequence, or all of it
    where there is no group; each call moves rows to the curve's shards and results back, which costs one exchange of
    queries, keys and values and one of outputs more than `RingDilatedAttentionHilbert`. Results are the same.

    Example:
        >>> from dilated_attention_pytorch.ring_attention import (
        ...     HilbertRingAttention, RingAttentionConfig,
        ... )
        >>> config = RingAttentionConfig(segment_lengths=[16, 64], dilation_rates=[1, 2])
        >>> attention = HilbertRingAttention(config, grid=(12, 12))
        >>> x = torch.randn(1, 144, 4, 8)
        >>> attention(x, x, x, is_causal=True).shape
        torch.Size([1, 144, 4, 8])
    """

    takes_rows_along = "original"


def causal_layout(order: CurveOrder, length: int, rate: int, shift: int = 0) -> Tensor:
    """Where a branch's rows stand so that later in the layout means later in the original sequence.

    Args:
        order: of the curve.
        length: w of the branch.
        rate: r of the branch.
        shift: segment shift, along the curve.

    Returns:
        int64 `(N,)`, a permutation of places along the curve. It moves rows only within one segment and residue, and
        sorts those by original position.
    """
    place = torch.arange(len(order.order), device=order.order.device)
    # Rows of one kind see one another, and nobody else.
    kind = segment_and_residue(place + shift, length, rate)
    # Both sides list kind after kind: the places of a kind in order, and its rows by original position.
    layout = torch.empty_like(place)
    layout[kind.argsort(stable=True)] = order.inverse[kind[order.inverse].argsort(stable=True)]
    return layout


def _branch_seed(seed: Seed, branch: int) -> Seed:
    """A seed for each branch, since each is a call whose only branch is its first."""
    if seed is None or branch == 0:
        return seed
    # As a tensor: int64 wraps around where a Python int grows.
    return torch.tensor(branch, device="cpu") * _SEED_STEP + seed


def _checksum(order: Tensor) -> int:
    """A number that another order will not have, but by one chance in 2 ** 64."""
    place = torch.arange(1, len(order) + 1, device=order.device)
    return int(((order + 1) * (place * _SEED_STEP) ^ place).sum())
