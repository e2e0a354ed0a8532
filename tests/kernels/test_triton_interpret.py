"""The Triton kernels in Triton's interpreter, every mode against the dense reference: out, lse and gradients."""

from __future__ import annotations

import math
import os
import random
import traceback

import pytest
import torch
from torch import Tensor

if torch.cuda.is_available():
    pytest.skip("a GPU runs the kernels themselves", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
triton = pytest.importorskip("triton")
if type(triton.language.cdiv).__name__ != "InterpretedFunction":
    pytest.skip("Triton was imported before its interpreter was switched on", allow_module_level=True)

import dilated_attention_pytorch
from dilated_attention_pytorch import dilated_attention
from dilated_attention_pytorch.core import reference
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels import fast_path
from dilated_attention_pytorch.kernels.choice import choose_backend
from dilated_attention_pytorch.kernels.triton import backend, configs, launch_aligned, launch_branches, replay
from dilated_attention_pytorch.kernels.triton.configs import Config
from dilated_attention_pytorch.kernels.triton.grids import grid_of
from dilated_attention_pytorch.kernels.triton.work import Work, prepare
from dilated_attention_pytorch.types import NO_MASKS, QKV, AttentionOutput, Masks, OutputGradient


def make_problem(lengths, rates, kv_heads, d, seq_len, *, offsets="modulo", **changes) -> Problem:
    settings = dict(
        is_causal=False, scale=d**-0.5, dropout_p=0.0, q_start=0, k_start=0, seq_len=seq_len, mixing_gradient="exact",
        padding="none",
    )  # fmt: skip
    return Problem(DilatedPattern(lengths, rates, kv_heads, offsets), **(settings | changes))


def masks_of(layout: dict) -> Masks:
    return Masks(*(layout.get(name) for name in ("key_padding_mask", "row_start", "cu_seqlens", "seed")))


def oracle(inputs: list[Tensor], problem: Problem, layout: dict, dtype: torch.dtype) -> list[Tensor]:
    """out, lse, dq, dk, dv of the reference in a dtype; lse 0 where it is -inf."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs[:3])
    grad_out, grad_lse = (x.to(dtype) for x in inputs[3:])
    out, lse = reference.attention(q, k, v, problem, **layout)
    seen = torch.isfinite(lse)
    total = (out * grad_out).sum() + (lse.masked_fill(~seen, 0.0) * grad_lse).sum()
    grads = torch.autograd.grad(total, (q, k, v))
    return [out.detach(), lse.detach().masked_fill(~seen, 0.0), *grads]


def error(a: Tensor, b: Tensor) -> float:
    if b.numel() == 0 or float(b.abs().max()) == 0.0:
        return float(a.abs().max()) if a.numel() else 0.0
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def check(
    batch, n, heads, d, lengths, rates, *, kv_heads=None, n_keys=None, dtype=torch.float32, layout=None, **changes
) -> None:
    kv_heads, n_keys, layout = kv_heads or heads, n_keys or n, dict(layout or {})
    end = max(changes.get("q_start", 0) + n, changes.get("k_start", 0) + n_keys)
    problem = make_problem(lengths, rates, kv_heads, d, changes.pop("seq_len", end), **changes)
    if problem.dropout_p:
        layout["seed"] = torch.tensor(-(2**40) - 12345)
    generator = torch.Generator().manual_seed(n + 31 * d)
    shapes = (batch, n, heads, d), (batch, n_keys, kv_heads, d), (batch, n_keys, kv_heads, d), (batch, n, heads, d)
    inputs = [torch.randn(s, generator=generator).to(dtype) for s in (*shapes, (batch, heads, n))]
    q, k, v, grad_out, grad_lse = inputs
    masks = masks_of(layout)
    out, lse = backend.forward(QKV(q, k, v), problem, masks)
    grads = backend.backward(
        OutputGradient(grad_out, grad_lse.float()), QKV(q, k, v), AttentionOutput(out, lse), problem, masks
    )
    assert (out.dtype, lse.dtype, *(g.dtype for g in grads)) == (dtype, torch.float32, dtype, dtype, dtype)
    exact = oracle(inputs, problem, layout, torch.float64)
    assert torch.equal(torch.isneginf(lse), torch.isneginf(reference.attention(q, k, v, problem, **layout).lse))
    mine = [out, lse.masked_fill(torch.isneginf(lse), 0.0), *grads]
    # Ten times what the reference itself loses in fp32; half precision rounds P and dS besides the result.
    same = [error(a, b) for a, b in zip(oracle(inputs, problem, layout, torch.float32), exact, strict=True)]
    floor = {torch.float32: 1e-6, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}[dtype]
    for name, a, b, loss in zip(("out", "lse", "dq", "dk", "dv"), mine, exact, same, strict=True):
        assert error(a, b) <= max(10 * loss, floor), name


CAUSAL = {"is_causal": True}


@pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["full", "causal"])
class TestPattern:
    def test_odd_lengths(self, changes):
        check(1, 53, 3, 16, (7, 23, 100), (2, 3, 5), **changes)

    def test_grouped_heads_and_batch(self, changes):
        check(2, 43, 4, 16, (16, 48), (1, 2), kv_heads=2, **changes)

    def test_blocked_offsets_and_rate_beyond_length(self, changes):
        check(1, 37, 3, 24, (7, 23, 100), (1, 3, 40), offsets="blocked", **changes)

    def test_rate_beyond_the_sequence(self, changes):
        check(1, 21, 3, 16, (7, 100), (50, 2**33), **changes)

    def test_the_row_that_a_ragged_view_lacks(self, changes):
        """Several tiles per segment, and per residue one row that the whole rows of the rate leave out."""
        check(1, 67, 4, 16, (40, 1000), (1, 3), kv_heads=2, **changes)

    def test_whole_tiles(self, changes):
        check(1, 64, 2, 16, (32, 64), (1, 2), **changes)

    def test_fewer_rows_than_a_tile(self, changes):
        check(1, 5, 3, 16, (8, 24), (1, 2), **changes)


@pytest.mark.parametrize("d", [8, 48, 80])
def test_head_width(d):
    check(1, 21, 2, d, (8, 24), (1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    check(1, 37, 2, 16, (16, 40), (1, 3), dtype=dtype)


def test_dropout():
    check(1, 37, 2, 16, (16, 40), (1, 2), dropout_p=0.3, **CAUSAL)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 5e-324])
def test_scale(scale):
    check(1, 29, 3, 16, (8, 24), (1, 2), scale=scale)


class TestMasks:
    def mask(self, batch, n):
        mask = torch.rand(batch, n, generator=torch.Generator().manual_seed(0)) > 0.3
        mask[-1] = False
        return {"key_padding_mask": mask}

    @pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["full", "causal"])
    def test_key_padding(self, changes):
        check(2, 37, 2, 16, (16, 40), (1, 3), layout=self.mask(2, 37), **changes)

    def test_left_padding(self):
        check(2, 37, 2, 16, (16, 40), (1, 3), layout={"row_start": torch.tensor([5, 37])}, **CAUSAL)

    def test_left_padding_of_a_partial_range_with_a_mask(self):
        layout = self.mask(2, 60) | {"row_start": torch.tensor([7, 2])}
        layout["key_padding_mask"][1, 10:] = True
        check(2, 20, 2, 16, (16, 40), (1, 2), n_keys=37, q_start=13, k_start=5, seq_len=60, layout=layout)

    @pytest.mark.parametrize("changes", [{}, CAUSAL | {"dropout_p": 0.3}], ids=["full", "causal dropout"])
    def test_packed(self, changes):
        check(1, 47, 2, 16, (16, 40), (1, 3), layout={"cu_seqlens": torch.tensor([0, 17, 17, 18, 47])}, **changes)

    @pytest.mark.parametrize("start", [5, 16, 61])
    def test_packed_with_a_segment_shift(self, start):
        """Every sequence starts at the same position, inside a segment or at its border."""
        layout, at = {"cu_seqlens": torch.tensor([0, 17, 17, 18, 47])}, {"q_start": start, "k_start": start}
        check(1, 47, 2, 16, (16, 40), (1, 3), layout=layout, seq_len=start + 47, **at, **CAUSAL, dropout_p=0.3)
        check(1, 47, 2, 16, (4, 1000), (1, 2), kv_heads=1, layout=layout, seq_len=start + 47, **at)

    def test_left_padding_with_a_segment_shift(self):
        """What a shifted call of padded rows is: bits that hide rows whose positions are no longer negative."""
        starts = torch.tensor([5, 30])
        bits = torch.nn.functional.pad(torch.arange(37) >= starts[:, None], (21, 0))
        layout = {"row_start": starts, "key_padding_mask": bits}
        check(2, 37, 2, 16, (16, 40), (1, 3), q_start=21, k_start=21, seq_len=58, layout=layout, **CAUSAL)


class TestShortSegments:
    """Segments of fewer slots than a tile has share one, where the rate divides their length."""

    @pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["full", "causal"])
    def test_several_in_a_tile(self, changes):
        problem = make_problem((4, 12, 16), (1, 2, 4), 2, 16, 43, **changes)
        q = torch.empty(2, 43, 4, 16)
        config = Config(16, 16, 4, 1)
        grids = [grid_of(Work(QKV(q, q, q), problem, NO_MASKS), i, config, by_keys=False) for i in range(3)]
        assert [(grid.length, grid.slots_each, grid.joined) for grid in grids] == [
            (16, 4, True),
            (24, 6, True),
            (32, 4, True),
        ]
        check(2, 43, 4, 16, (4, 12, 16), (1, 2, 4), kv_heads=2, **changes)

    def test_with_a_mask_dropout_and_a_partial_range(self):
        layout = TestMasks().mask(2, 60)
        where = {"q_start": 13, "k_start": 5, "seq_len": 60, "dropout_p": 0.3}
        check(2, 20, 2, 16, (4, 12), (1, 3), n_keys=37, layout=layout, **where, **CAUSAL)

    @pytest.mark.parametrize("start", [0, 5])
    def test_packed(self, start):
        layout, at = {"cu_seqlens": torch.tensor([0, 17, 17, 18, 47])}, {"q_start": start, "k_start": start}
        check(1, 47, 2, 16, (4, 10), (1, 2), layout=layout, seq_len=start + 47, **at, **CAUSAL)

    def test_left_padding(self):
        check(2, 37, 2, 16, (4, 10), (1, 2), layout={"row_start": torch.tensor([5, 37])}, **CAUSAL)


@pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["full", "causal"])
def test_tiles_of_short_segments(changes, monkeypatch):
    """Short segments take a configuration of their own; both kinds have several segments, the last one cut."""
    short = Config(16, 32, 4, 1)
    monkeypatch.setattr(configs, "SHORT_SEGMENT", 24)
    cut = Config(32, 16, 4, 1, short=short)
    monkeypatch.setattr(launch_branches, "configs_for", lambda work, way: (cut,) * (1 if way == "forward" else 2))
    monkeypatch.setattr(launch_aligned, "why_not", lambda work, direction: "not here")
    replay._tapes.clear()
    check(2, 47, 2, 16, (20, 40), (1, 1), kv_heads=1, **changes)
    replay._tapes.clear()


class TestPartialRanges:
    def test_decoding(self):
        check(1, 1, 2, 16, (16, 40), (1, 2), n_keys=65, q_start=64, **CAUSAL)

    def test_keys_before_and_after(self):
        check(1, 20, 2, 16, (16, 40), (1, 2), n_keys=37, q_start=3, k_start=11, seq_len=80)

    def test_queries_without_keys(self):
        check(1, 20, 2, 16, (16,), (1,), n_keys=10, q_start=30, k_start=0)


class TestZeroKeys:
    @pytest.mark.parametrize("offsets", ["modulo", "blocked"])
    @pytest.mark.parametrize("first", [1, 2])
    def test_whole(self, offsets, first):
        check(1, 41, 4, 16, (7, 20, 100), (first, 3, 4), padding="zero_keys", offsets=offsets)

    def test_packed(self):
        layout = {"cu_seqlens": torch.tensor([0, 5, 30, 41])}
        check(1, 41, 4, 16, (7, 20, 100), (2, 3, 4), padding="zero_keys", layout=layout)

    @pytest.mark.parametrize("rates", [(7, 5, 1), (19, 2**33, 500)], ids=["beyond segments", "beyond the sequence"])
    def test_a_lone_zero_key_counts_for_nothing(self, rates):
        check(1, 20, 5, 16, (4, 3, 20), rates, padding="zero_keys")


@pytest.mark.parametrize("bounds", [[0, 90], [-40, 41], [0, 2**40 + 90], [0, 20, 7, 90]], ids=str)
def test_wrong_bounds_on_a_device_touch_nothing_else(bounds):
    """A GPU's cu_seqlens are not read by the host. What lies around q, k and v here is NaN."""
    around = torch.full((1, 141, 2, 16), torch.nan)
    around[:, 50:91] = torch.randn(1, 41, 2, 16, generator=torch.Generator().manual_seed(1))
    x = around[:, 50:91]
    problem = make_problem((7, 20, 100), (1, 3, 4), 2, 16, 41)
    right = torch.tensor([0, 20, 41] if len(bounds) > 2 else [0, 41])
    work = prepare(QKV(x, x, x), problem, Masks(None, None, right))
    wrong = work._replace(masks=work.masks._replace(cu_seqlens=torch.tensor(bounds)))
    found = []
    for one in (wrong, work):
        saved = launch_branches.forward(one, replay.Tape(), *launch_branches.configs_for(one, "forward"))
        configs_of = launch_branches.configs_for(one, "backward")
        grads = launch_branches.backward(one, OutputGradient(x, None), saved, replay.Tape(), *configs_of)
        found.append((saved.out, *grads))
    for a, b in zip(*found, strict=True):
        assert a.isfinite().all()
        assert max(bounds) > 90 or len(bounds) > 2 or torch.equal(a, b)


def aligned_plan(n, heads, lengths, rates, **changes) -> launch_aligned.Alignment:
    """The plan of a forward that the one-launch kernels take."""
    q = torch.empty(1, n, heads, 16)
    work = Work(QKV(q, q, q), make_problem(lengths, rates, heads, 16, n, **changes), NO_MASKS)
    assert backend.choose(work, "forward").family is launch_aligned
    return launch_aligned.alignment(work)


class TestAligned:
    """The one-launch kernels: the plan must choose them."""

    @pytest.mark.parametrize(
        ("n", "d", "batch", "kv_heads"),
        [(64, 16, 1, 4), (64, 32, 2, 2), (61, 16, 1, 2), (62, 24, 2, 2)],
        ids=["even", "even batch grouped", "ragged", "ragged batch width"],
    )
    @pytest.mark.parametrize("short_forward", [0, configs.SHORT_FORWARD], ids=["descriptors", "pointers"])
    def test_walk(self, n, d, batch, kv_heads, short_forward, monkeypatch):
        monkeypatch.setattr(configs, "SHORT_FORWARD", short_forward)
        replay._tapes.clear()
        lengths, rates = (32, 64, 1000), (1, 2, 2)
        q, k = torch.empty(batch, n, 4, d), torch.empty(batch, n, kv_heads, d)
        work = Work(QKV(q, k, k), make_problem(lengths, rates, kv_heads, d, n), NO_MASKS)
        for direction in ("forward", "backward"):
            choice = backend.choose(work, direction)
            assert (choice.family, choice.reason) == (launch_aligned, "all branches in one launch")
        check(batch, n, 4, d, lengths, rates, kv_heads=kv_heads)

    @pytest.mark.parametrize(
        ("n", "heads", "lengths", "rates", "changes"),
        [
            (128, 2, (64, 128, 1000), (1, 2, 4), {}),
            (120, 4, (128, 64, 64), (4, 2, 1), {"offsets": "blocked"}),
            (144, 3, (48, 144), (1, 3), {}),
            (192, 2, (64, 192), (1, 4), CAUSAL),
            (100, 2, (64, 1000), (2, 4), CAUSAL),
        ],
        ids=["three branches", "blocked, in any order", "thirds", "causal", "causal ragged"],
    )
    def test_a_key_of_several_branches_is_computed_once(self, n, heads, lengths, rates, changes):
        assert aligned_plan(n, heads, lengths, rates, **changes).once
        check(1, n, heads, 16, lengths, rates, **changes)

    @pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["full", "causal"])
    @pytest.mark.parametrize(
        ("n", "lengths", "rates"),
        [(192, (64, 96), (1, 2)), (96, (96, 1000), (2, 3)), (128, (64, 128), (4, 1)), (64, (64,), (2,))],
        ids=["segments do not nest", "rates do not divide", "the longer is denser", "one branch"],
    )
    def test_where_keys_repeat(self, n, lengths, rates, changes):
        assert not aligned_plan(n, 2, lengths, rates, **changes).once
        check(1, n, 2, 16, lengths, rates, **changes)

    @pytest.mark.parametrize("tiles", [(16, 32, 32, 16), (32, 16, 16, 32)], ids=["wide keys", "wide queries"])
    def test_short_causal_gradients_by_two_launches(self, tiles, monkeypatch):
        """Tiles of keys and of queries differ in size; segments of three branches, of which one is cut by the end."""
        replay._tapes.clear()
        n, dq, dkv = 150, Config(*tiles[:2], 4, 1), Config(*tiles[2:], 4, 1)
        of_kernel = {"aligned_forward": dq, "aligned_dq": dq, "aligned_dkv": dkv}
        monkeypatch.setattr(configs, "candidates", lambda kernel, *_: (of_kernel[kernel],))
        problem, q = make_problem((64, 128, 1000), (1, 2, 2), 1, 16, n, **CAUSAL), torch.empty(1, n, 2, 16)
        choice = backend.choose(Work(QKV(q, q[:, :, :1], q[:, :, :1]), problem, NO_MASKS), "backward")
        assert choice.family is launch_aligned
        check(1, n, 2, 16, (64, 128, 1000), (1, 2, 2), kv_heads=1, **CAUSAL)
        replay._tapes.clear()

    def test_without_rate_one(self):
        check(1, 64, 4, 16, (32, 64), (2, 4), offsets="blocked")

    @pytest.mark.parametrize(("n", "n_keys"), [(64, 32), (32, 80), (33, 50)], ids=["fewer", "more", "ragged"])
    def test_other_keys_than_queries(self, n, n_keys):
        """As rows that arrive from another rank: one segment holds both."""
        lengths, rates = (200, 100), (1, 2)
        problem = make_problem(lengths, rates, 2, 16, max(n, n_keys))
        assert launch_aligned.misalignment(problem, n, n_keys) is None
        check(1, n, 4, 16, lengths, rates, kv_heads=2, n_keys=n_keys)

    @pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["full", "causal"])
    @pytest.mark.parametrize("start", [64, 128])
    def test_a_shard_of_a_sequence(self, start, changes):
        """Segments of 32 are the shard's own; it lies within one of 192, at a multiple of the rate."""
        lengths, rates = (32, 192), (1, 4)
        problem = make_problem(lengths, rates, 4, 16, 192, q_start=start, k_start=start, **changes)
        nearer = problem.rebased(64, 64)
        assert nearer == make_problem(lengths, rates, 4, 16, 64, **changes)
        assert launch_aligned.misalignment(nearer, 64, 64, causal=True) is None
        check(1, 64, 4, 16, lengths, rates, q_start=start, k_start=start, seq_len=192, **changes)

    def test_a_masked_range(self):
        mask = torch.rand(2, 192, generator=torch.Generator().manual_seed(1)) > 0.4
        layout = {"key_padding_mask": mask}
        check(2, 32, 2, 16, (32, 192), (1, 4), n_keys=64, q_start=96, k_start=64, seq_len=192, layout=layout)

    @pytest.mark.parametrize(
        ("changes", "obstacle"),
        [
            (CAUSAL, "it is causal"),
            ({"dropout_p": 0.1}, "it drops weights"),
            ({"q_start": 1}, "the range does not start at position 0"),
            ({"padding": "zero_keys"}, "it has zero keys"),
        ],
        ids=["is_causal", "dropout_p", "q_start", "padding"],
    )
    def test_other_modes_take_the_general_kernels(self, changes, obstacle, monkeypatch):
        monkeypatch.setattr(configs, "SHORT_CAUSAL", {"forward": 0, "backward": 0})
        problem, q = make_problem((32, 64), (1, 2), 2, 16, 64, **changes), torch.empty(1, 64, 2, 16)
        assert launch_aligned.misalignment(problem, 64, 64) == obstacle
        choice = backend.choose(Work(QKV(q, q, q), problem, NO_MASKS), "backward")
        assert (choice.family, choice.reason) == (launch_branches, f"one launch per branch: {obstacle}")

    @pytest.mark.parametrize(
        ("lengths", "rates", "n", "n_keys", "obstacle"),
        [
            ((32, 64), (1, 67), 64, 64, "its rates have a common multiple above 64"),
            ((31, 64), (1, 2), 64, 64, "a segment is no multiple of all rates"),
            ((32, 64), (1, 2), 64, 32, "it has several segments, with other keys than queries"),
            ((8, 64), (1, 1), 64, 64, "no tile fits its segments and is filled by its rows"),
            ((64,), (8,), 64, 64, "no tile fits its segments and is filled by its rows"),
        ],
        ids=["rates", "segments", "keys", "tiles", "rows"],
    )
    def test_other_patterns_take_the_general_kernels(self, lengths, rates, n, n_keys, obstacle):
        q, k = torch.empty(1, n, 2, 16), torch.empty(1, n_keys, 2, 16)
        work = Work(QKV(q, k, k), make_problem(lengths, rates, 2, 16, n), NO_MASKS)
        assert launch_aligned.why_not(work, "forward") == obstacle

    def test_masked_calls_take_the_general_kernels(self):
        q, problem = torch.empty(1, 64, 2, 16), make_problem((32, 64), (1, 2), 2, 16, 64)
        masked = prepare(QKV(q, q, q), problem, Masks(key_padding=torch.ones(1, 64, dtype=torch.bool)))
        assert launch_aligned.why_not(masked, "forward") == "it has masks or packing"


@pytest.mark.parametrize("n", [32, 61], ids=["even", "ragged"])
def test_long_causal_sequences_launch_by_branch(n, monkeypatch):
    monkeypatch.setattr(configs, "SHORT_CAUSAL", {"forward": 0, "backward": 0})
    replay._tapes.clear()
    check(1, n, 2, 16, (32, 64), (1, 2), **CAUSAL)
    replay._tapes.clear()


def test_long_causal_segments_beside_each_other(monkeypatch):
    """A walk that begins between tiles ends within the next segment: seen from the square of a tile on."""
    monkeypatch.setattr(configs, "SHORT_CAUSAL", {"forward": 0, "backward": 0})
    replay._tapes.clear()
    check(1, 544, 1, 16, (272,), (1,), **CAUSAL)
    replay._tapes.clear()


@pytest.mark.parametrize(
    ("batch", "n", "heads", "rate"), [(4096, 1, 16, 1), (70_000, 1, 1, 1), (1, 1024, 16, 4096), (1, 1024, 1, 131_072)]
)
def test_launches_have_one_axis_and_terms_are_few(batch, n, heads, rate, monkeypatch):
    """CUDA's other axes end at 65,535 programs."""
    from triton.runtime import interpreter

    grids, shapes = [], []

    class Allocations(replay.Tape):
        def empty(self, like, shape, *args, **kwargs):
            shapes.append(tuple(shape))
            return super().empty(like, shape, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *_, **__: grids.append(self.grid))
    q, lse = torch.zeros(batch, n, heads, 16), torch.zeros(batch, heads, n)
    work = Work(QKV(q, q, q), make_problem((n,), (rate,), heads, 16, n), NO_MASKS)
    grad, saved = OutputGradient(q, None), AttentionOutput(q, lse)
    launch_branches.backward(work, grad, saved, Allocations(), *launch_branches.configs_for(work, "backward"))
    assert {len(grid) for grid in grids} == {1}
    # Filled up to whole tiles.
    assert all(math.prod(shape) <= 2 * batch * heads * max(2 * n, 4096) for shape in shapes if shape[0] == 2)


@pytest.mark.parametrize("seed", range(4))
def test_random_pattern(seed):
    choose = random.Random(seed)
    branches = choose.randint(1, 3)
    check(
        choose.randint(1, 2), choose.randint(3, 45), 4, 16,
        tuple(choose.randint(1, 60) for _ in range(branches)), tuple(choose.randint(1, 6) for _ in range(branches)),
        kv_heads=choose.choice([1, 2, 4]), is_causal=choose.random() < 0.5,
        offsets=choose.choice(["modulo", "blocked"]),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["key_padding_mask", "row_start", "cu_seqlens"])
def test_masks_with_gaps(name):
    """Every second entry of a longer tensor, with others between."""
    masks = {
        "key_padding_mask": torch.arange(2 * 61).view(2, 61) % 5 != 0,
        "row_start": torch.tensor([3, 17], dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, 20, 61], dtype=torch.int32),
    }
    mask = masks[name]
    spread = torch.stack((mask, torch.ones_like(mask)), -1).flatten(-2)[..., ::2]
    assert not spread.is_contiguous()
    check(1 if name == "cu_seqlens" else 2, 61, 2, 16, [8, 32], [1, 2], layout={name: spread}, is_causal=True)


def test_strided_inputs_past_the_heads():
    """Heads cut out of a packed projection: rows are not contiguous."""
    packed = torch.randn(1, 64, 3, 2, 16)
    problem = make_problem((32, 64), (1, 2), 2, 16, 64)
    q, k, v = packed.unbind(2)
    out, lse = backend.forward(QKV(q, k, v), problem)
    expected = reference.attention(q, k, v, problem)
    torch.testing.assert_close(out, expected.out)
    torch.testing.assert_close(lse, expected.lse)


def test_detached_mixing_names_the_backend_that_can():
    q = torch.randn(1, 8, 1, 16)
    problem = make_problem((8,), (1,), 1, 16, 8, mixing_gradient="detached")
    assert backend.why_not(QKV(q, q, q), problem) == ["it has no mixing_gradient='detached'"]
    with pytest.raises(NotImplementedError, match=r"detached.*sdpa"):
        choose_backend(QKV(q, q, q), problem, "triton")


@pytest.mark.parametrize("rates", [(1, 2), (1, 3)], ids=["aligned", "general"])
def test_six_frames_of_the_package_lead_to_a_launch(rates, monkeypatch):
    """Of a first call without gradients; a stack trace or a profile of one fits on a screen."""
    from triton.runtime import interpreter

    replay._tapes.clear()
    fast_path._known.clear()
    stacks = []
    package = os.path.dirname(dilated_attention_pytorch.__file__)

    def launched(self, *args, **kwargs):
        stacks.append([frame.name for frame in traceback.extract_stack() if frame.filename.startswith(package)])

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
    q, k, v = torch.randn(3, 1, 64, 2, 16).unbind(0)
    dilated_attention(q, k, v, segment_lengths=[32, 64], dilation_rates=list(rates), backend="triton")
    ways = {tuple(stack) for stack in stacks}
    way = "dilated_attention", "dilated_attention_with_lse", "differentiable", "_forward", "forward", "forward"
    assert ways == {way}
    fast_path._known.clear()
    replay._tapes.clear()


class TestReplay:
    """A second call of a kind plays back the first one's launches on other tensors."""

    @pytest.mark.parametrize("lengths", [(32, 64), (7, 23)], ids=["aligned", "general"])
    @pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["full", "causal"])
    def test_other_tensors(self, lengths, changes):
        problem = make_problem(lengths, (1, 2), 2, 16, 64, **changes)
        replay._tapes.clear()
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            inputs = [torch.randn(1, 64, 2, 16, generator=generator) for _ in range(4)]
            inputs.append(torch.randn(1, 2, 64, generator=generator))
            out, lse = backend.forward(QKV(*inputs[:3]), problem)
            grads = backend.backward(
                OutputGradient(inputs[3], inputs[4]), QKV(*inputs[:3]), AttentionOutput(out, lse), problem
            )
            assert len(replay._tapes) == 2
            for a, b in zip((out, lse, *grads), oracle(inputs, problem, {}, torch.float64), strict=True):
                assert error(a, b) < 1e-5

    def test_equal_inputs_leave_no_tape(self):
        q, k, v = torch.randn(3, 1, 40, 2, 16).unbind(0)
        problem = make_problem((7, 23), (1, 2), 2, 16, 40)
        backend.forward(QKV(q, q, q), problem)
        backend.forward(QKV(q, k, v), problem)
        expected = reference.attention(q, v, k, problem)
        torch.testing.assert_close(backend.forward(QKV(q, v, k), problem)[0], expected.out)
