"""The pictures say what the pattern says, and are the same every time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dilated_attention_pytorch import DilatedPattern, dilated_attention
from dilated_attention_pytorch.kernels.hilbert import CURVES, CurveOrder, curve_order, grid_coords
from dilated_attention_pytorch.viz import (
    heat_figure,
    loss_figure,
    multiplicity,
    neighbourhood_figure,
    neighbours_figure,
    orders_figure,
    pattern_figure,
    receptive_field,
    receptive_figure,
    save,
)
from dilated_attention_pytorch.viz.orders import first_branch
from dilated_attention_pytorch.viz.pattern import shares

PATTERN = DilatedPattern((6, 16, 40), (1, 2, 5), num_heads=4)  # not nesting, rates that do not divide


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head", [0, 3])
def test_multiplicity_is_the_keys_of_each_query(head: int, is_causal: bool) -> None:
    counts = multiplicity(PATTERN, 45, head=head, is_causal=is_causal).sum(0)
    for query in range(45):
        expected = np.zeros(45, dtype=int)
        for keys in PATTERN.keys_of(query, head, 45, is_causal=is_causal):
            expected[list(keys)] += 1
        assert np.array_equal(counts[query], expected)


def test_shares_are_the_means_of_the_matrix() -> None:
    exact = multiplicity(PATTERN, 48, head=1)
    binned = shares(PATTERN, (0, 48), bins=8, head=1)
    assert np.allclose(binned, exact.reshape(3, 8, 6, 8, 6).mean((2, 4)))
    assert np.allclose(np.triu(shares(PATTERN, (0, 48), bins=8, head=1, is_causal=True)[0], 1), 0)


def test_receptive_field_is_where_gradients_come_from() -> None:
    """Two layers that mix heads, and the inputs that the output's gradient reaches."""
    torch.manual_seed(0)
    x = torch.randn(1, 45, 4, 3, dtype=torch.float64, requires_grad=True)
    mixed = x
    for _ in range(2):
        out = dilated_attention(
            mixed, mixed, mixed, segment_lengths=PATTERN.segment_lengths, dilation_rates=PATTERN.dilation_rates,
            is_causal=True, backend="reference",
        )  # fmt: skip
        mixed = mixed + out.mean(2, keepdim=True) + out
    mixed[0, 37].sum().backward()
    reached = (x.grad[0] != 0).any(-1).any(-1).numpy()
    assert np.array_equal(receptive_field(PATTERN, 45, query=37, num_layers=2)[2], reached)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shift", [0, 7, "alternate", [3, 0, 11]])
def test_receptive_fields_end_where_reach_says(is_causal: bool, shift: object) -> None:
    fields = [
        receptive_field(PATTERN, 60, query=q, num_layers=3, is_causal=is_causal, segment_shift=shift)[3]
        for q in range(60)
    ]
    distances = [max(abs(q - np.flatnonzero(field)[[0, -1]])) for q, field in enumerate(fields)]
    found = PATTERN.reach(3, 60, is_causal=is_causal, segment_shift=shift)
    assert (found.best, found.median) == (max(distances), sorted(distances)[29])


def test_receptive_field_without_causality_is_symmetric() -> None:
    fields = np.stack([receptive_field(PATTERN, 45, query=q, num_layers=1, is_causal=False)[1] for q in range(45)])
    assert np.array_equal(fields, fields.T)


def test_pictures_are_reproducible(tmp_path: Path) -> None:
    lines = [{"step": s, "bpb": 8 / s, "loss": 5 / s} for s in range(1, 80)] + [{"step": 79, "val_bpb": 0.3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draws = {
        "pattern": lambda: pattern_figure(PATTERN, 300, heads=(0, 1), spans=[(0, 300), (10, 50)], is_causal=True),
        "neighbours": lambda: neighbours_figure(PATTERN, 2000, query=1999),
        "receptive": lambda: receptive_figure(PATTERN, 2000, query=1500, num_layers=2),
        "loss": lambda: loss_figure(tmp_path / "metrics.jsonl"),
    }
    for name, draw in draws.items():
        first, second = (save(draw(), tmp_path / f"{name}{i}.png", dpi=40).read_bytes() for i in range(2))
        assert first == second and first.startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))  # written whole, nothing left beside


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected heads in \[0, 4\), got 4"):
        pattern_figure(PATTERN, 45, heads=(4,))
    with pytest.raises(ValueError, match=r"expected spans within \[0, 45\), got \(0, 46\)"):
        pattern_figure(PATTERN, 45, spans=[(0, 46)])
    with pytest.raises(ValueError, match=r"expected query in \[0, 45\), got 45"):
        receptive_field(PATTERN, 45, query=45, num_layers=1)
    with pytest.raises(ValueError, match=r"expected query in \[0, 45\), got 45"):
        neighbours_figure(PATTERN, 45, query=45)
    with pytest.raises(ValueError, match=r"picture format such as \.png, got 'x\.doc'"):
        save(pattern_figure(PATTERN, 20), tmp_path / "x.doc")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="expected lines with 'bpb'"):
        loss_figure(tmp_path / "empty.jsonl")


class TestOrders:
    """Walks, neighbourhoods and heat over tokens in space."""

    COORDS = grid_coords((6, 7))

    def orders(self) -> dict[str, CurveOrder]:
        return {name: curve_order(name, self.COORDS) for name in CURVES}

    @pytest.mark.parametrize("head", [None, 0, 3])
    @pytest.mark.parametrize("query", [0, 11, 41])
    def test_first_branch_is_what_the_pattern_shows(self, query: int, head: int | None) -> None:
        for order in self.orders().values():
            branch, count = first_branch(PATTERN, order, query, head)
            want = torch.full((42,), 99)
            member = PATTERN.membership(order.inverse[query])
            for h in range(4) if head is None else [head]:
                branches = [i for i in range(3) if member[i, h]]
                for i, keys in zip(branches, PATTERN.keys_of(int(order.inverse[query]), h, 42), strict=True):
                    for place in keys:
                        want[order.order[place]] = min(int(want[order.order[place]]), i)
            assert torch.equal(branch, want.masked_fill(want == 99, -1))
            assert count == int((want < 99).sum())

    @pytest.mark.parametrize("num_dims", [2, 3])
    def test_pictures_draw_and_are_the_same_every_time(self, num_dims: int, tmp_path: Path) -> None:
        coords = self.COORDS if num_dims == 2 else grid_coords((3, 4, 5))
        orders = {name: curve_order(name, coords) for name in CURVES}
        values = {"a": torch.rand(len(coords)), "b": torch.rand(len(coords), 3)}
        figures = {
            "orders": lambda: orders_figure(orders, coords),
            "near": lambda: neighbourhood_figure(PATTERN, orders, coords, query=5),
            "heat": lambda: heat_figure(values, coords, mark=3),
        }
        for name, draw in figures.items():
            first, again = (save(draw(), tmp_path / f"{name}{i}.png").read_bytes() for i in range(2))
            assert first == again

    def test_a_walk_is_drawn_step_by_step(self) -> None:
        figure = orders_figure({"snake": curve_order("snake", self.COORDS)}, self.COORDS)
        (walk,) = figure.axes[0].collections
        segments = np.array(walk.get_segments())
        assert segments.shape == (41, 2, 2)
        assert np.array_equal(np.abs(np.diff(segments, axis=1)).sum((1, 2)), np.ones(41))

    def test_bad_input_is_named(self) -> None:
        orders = self.orders()
        with pytest.raises(ValueError, match=r"expected orders\['raster'\] of 3 tokens, got 42"):
            orders_figure(orders, self.COORDS[:3])
        with pytest.raises(ValueError, match="expected orders to hold at least one"):
            orders_figure({}, self.COORDS)
        with pytest.raises(ValueError, match=r"expected query in \[0, 42\), got 42"):
            neighbourhood_figure(PATTERN, orders, self.COORDS, query=42)
        with pytest.raises(ValueError, match=r"expected head in \[0, 4\), got 4"):
            neighbourhood_figure(PATTERN, orders, self.COORDS, query=4, head=4)
        with pytest.raises(ValueError, match=r"expected values\['a'\] of shape \(42,\)"):
            heat_figure({"a": torch.zeros(41)}, self.COORDS)
        with pytest.raises(ValueError, match="expected coords of integers"):
            heat_figure({"a": torch.zeros(42)}, self.COORDS.double())
        with pytest.raises(ValueError, match="expected a plane that holds tokens, got 9"):
            heat_figure({"a": torch.zeros(60)}, grid_coords((3, 4, 5)), plane=9)
