"""Which rows a branch keeps side by side, how long ranges are, and what they cost."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import PATTERN, Ledger, draw_qkv, streamed

from dilated_attention_pytorch import DilatedPattern, dilated_attention
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.streaming import Sizes, plan_ranges
from dilated_attention_pytorch.streaming.ranges import RangePlan, compact_branches
from dilated_attention_pytorch.testing import relative_norm


class TestCompactRows:
    @settings(max_examples=60)
    @given(data=st.data())
    def test_index_counts_members(self, data: st.DataObject) -> None:
        draw = data.draw
        pattern = DilatedPattern((draw(st.integers(1, 40)),), (draw(st.integers(1, 9)),), draw(st.integers(1, 5)))
        n = draw(st.integers(1, 120))
        members = pattern.membership(torch.arange(n))[0]
        seen = set()
        for branch in compact_branches(pattern, 0, n):
            for head in range(*branch.heads.indices(pattern.num_heads)):
                counts = [0, *members[head].cumsum(0).tolist()]
                assert [branch.count(0, p) for p in range(n + 1)] == counts
                seen.add(head)
            start, stop = sorted((draw(st.integers(0, n)), draw(st.integers(0, n))))
            x = torch.arange(n)[None, :, None].repeat(1, 1, pattern.num_heads)
            out = x.new_empty(branch.shape(tuple(x.shape), branch.count(start, stop)))
            branch.gather(x[:, start:stop], start, start, stop, out)
            head = branch.heads.indices(pattern.num_heads)[0]
            positions = members[head].nonzero().flatten()
            assert out[0, :, 0, 0].tolist() == positions[(positions >= start) & (positions < stop)].tolist()
        assert all(not members[h].any() for h in range(pattern.num_heads) if h not in seen)

    @pytest.mark.parametrize("shift", [0, 7, 25])
    def test_segments_begin_where_the_shift_puts_them(self, shift: int) -> None:
        (branch,) = compact_branches(DilatedPattern((20,), (1,), 1), 0, 100, shift)
        for position in range(100):
            start = max(p for p in range(-19, position + 1) if (p + shift) % 20 == 0)
            assert branch.segment_start(position) == start


class TestPlan:
    def plan(self, n: int, limit: int, lengths: tuple[int, ...], rates: tuple[int, ...], **sizes: Any) -> Any:
        problem = Problem(DilatedPattern(lengths, rates, 1), False, 0.125, 0.0, 0, 0, n, "exact", "none")
        given = {"is_masked": False, "is_backward": False, "is_fused": True, "device_type": "cuda", **sizes}
        return plan_ranges(problem, Sizes(1, 1, 1, 64, torch.bfloat16, **given), limit)

    def test_powers_of_two(self) -> None:
        """64M tokens, w = 2048 .. 2M: ranges that no segment straddles, under 8 GiB in both passes."""
        lengths, rates = tuple(2048 << i for i in range(11)), tuple(1 << i for i in range(11))
        for is_backward in (False, True):
            plan = self.plan(1 << 26, 8 << 30, lengths, rates, is_backward=is_backward)
            assert plan.length == 1 << 21 and not plan.compact and plan.device_bytes < 8 << 30

    def test_segments_too_long_for_a_range_are_compact(self) -> None:
        plan = self.plan(1 << 26, 1 << 28, (2048, 1 << 26), (1, 1 << 15))
        assert plan.length % 2048 == 0 and len(plan.compact) == 1 and plan.compact[0].members.slots == 2048

    @settings(max_examples=60)
    @given(
        n=st.integers(1, 1 << 22), limit=st.integers(1 << 22, 1 << 30), fused=st.booleans(), backward=st.booleans(),
        branches=st.lists(st.tuples(st.integers(1, 1 << 20), st.integers(1, 64)), min_size=1, max_size=5),
    )  # fmt: skip
    def test_stays_within_the_limit_or_says_what_would_do(
        self, n: int, limit: int, fused: bool, backward: bool, branches: list[tuple[int, int]]
    ) -> None:
        lengths, rates = zip(*branches, strict=True)
        sizes = {"is_fused": fused, "is_backward": backward, "device_type": "cpu"}
        try:
            plan = self.plan(n, limit, lengths, rates, **sizes)
        except ValueError as error:
            needed = int(str(error).split("at least ")[1].split(" bytes")[0].replace(",", ""))
            assert f"got {limit:,}" in str(error) and needed > limit
            plan = self.plan(n, needed, lengths, rates, **sizes)
            limit = needed
        assert plan.device_bytes <= limit
        ranges = plan.ranges
        assert ranges[0][0] == 0 and ranges[-1][1] == n
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))

    @pytest.mark.parametrize("shift", [0, 7])
    @pytest.mark.parametrize("is_backward", [False, True])
    @pytest.mark.parametrize(("is_fused", "device_type"), [(True, "cuda"), (False, "cuda"), (False, "cpu")])
    def test_device_bytes_are_the_sum_of_what_is_held(
        self, shift: int, is_backward: bool, is_fused: bool, device_type: str
    ) -> None:
        """By counting rows, for bf16 with a mask: two heads over one, ranges of 40 that cut segments of 60 (1 in 4)."""
        batch, heads, width, rows, n = 3, 2, 8, 40, 400
        problem = Problem(DilatedPattern((20, 60), (1, 4), 1), False, 1.0, 0.0, shift, shift, n)
        sizes = Sizes(batch, heads, 1, width, torch.bfloat16, True, is_backward, is_fused, device_type)
        plan = RangePlan(problem, sizes, rows)
        (compact,) = plan.compact
        # Bytes per row: q, k, v and the mask; backward dO and out too, and lse. Results: out and lse, or dq, dk and dv.
        brought = batch * (((3 if is_backward else 1) * heads + 2) * width * 2 + 1 + (4 * heads if is_backward else 0))
        values, lse = (heads + 2 if is_backward else heads) * width, 0 if is_backward else 4 * heads
        half, full = (batch * (values * element + lse) for element in (2, 4))
        if is_fused:
            work = half + batch * (16 * heads if is_backward else 0)
        else:
            work = 3 * full + brought // 2 * 4
        # Side by side: a segment of 15 rows ahead of the range, and all those of segments that begin in one.
        ahead = compact.members.slots
        most = max(compact.count(*compact.beginning_in(start, start + rows)) for start in range(n - rows))
        most += ahead if shift else 0  # one segment more, which the shift may cut
        held = 2 * (rows + ahead) * brought  # two buffers of each
        held += 2 * rows * half  # results leave while others are computed
        held += (ahead + most) * full  # results that wait for their range
        held += max(rows * work + rows * 2 * full, most * (brought + work))
        held += 1 << 16
        if is_fused and is_backward:
            held += 2 * 4 * batch * heads * 128 * 4  # two terms per row, a tile of padding per residue
        if device_type == "cuda" and not is_fused:
            held += 4 * (6 << 23)
        assert plan.device_bytes == held

    def test_buffers_are_what_the_plan_says(self) -> None:
        """Staging alone is part of the plan's bytes, for either pass."""
        q, k, v = draw_qkv(4096, heads=2, group=2, width=16, dtype=torch.float32)
        for limit in (2 << 20, 4 << 20, 64 << 20):
            pool = Ledger()
            options = {**PATTERN, "device_limit": limit, "pool": pool}
            got = streamed(q, k, v, torch.randn_like(q), **options)
            assert 0 < pool.peak <= limit
            assert relative_norm(got["out"], dilated_attention(q, k, v, **PATTERN)) <= 1e-5
