"""The pictures say what the pattern says, and are the same every time."""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import LogNorm, to_rgb

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
from dilated_attention_pytorch.viz.style import FORMATS, branch_colors, position_label

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
    for is_causal in (False, True):
        exact = multiplicity(PATTERN, 48, head=1, is_causal=is_causal)
        binned = shares(PATTERN, (0, 48), size=6, head=1, is_causal=is_causal)
        assert np.allclose(binned, exact.reshape(3, 8, 6, 8, 6).mean((2, 4)))
        last = shares(PATTERN, (0, 45), size=6, head=1, is_causal=is_causal)[:, -1, -1]  # of three positions
        assert np.allclose(last, exact[:, 42:45, 42:45].mean((1, 2)))
        assert np.array_equal(shares(PATTERN, (7, 48), size=1, head=1, is_causal=is_causal), exact[:, 7:, 7:])


class TestDensity:
    """Above 256 positions a shade says which share of the pairs attends, the same in each panel and row."""

    LONG = DilatedPattern((256, 1024, 4096), (1, 4, 16), num_heads=2)

    @pytest.mark.parametrize(("lengths", "seq_len"), [((256, 1024, 4096), 4096), ((2048, 16_384, 100_000), 100_000)])
    def test_each_branch_shows_its_share(self, lengths: tuple[int, ...], seq_len: int) -> None:
        figure = pattern_figure(DilatedPattern(lengths, (1, 4, 16), 2), seq_len)
        for ax, rate in zip(figure.axes, (1, 4, 16), strict=False):
            # Cells inside a segment; what a border cuts is fainter, and what no pair attends is no cell at all.
            assert ax.images[0].get_array().max() == pytest.approx(rate**-2)

    def test_one_scale_for_all_rows_with_a_mark_for_each_rate(self) -> None:
        figure = pattern_figure(self.LONG, 4096, spans=[(0, 4096), (0, 600), (0, 64)])
        panels, bars = figure.axes[:12], figure.axes[12:]
        scales = [(ax.images[0].norm.vmin, ax.images[0].norm.vmax) for ax in panels[:8]]
        assert len(set(scales)) == 1 and len(bars) == 2
        for bar in bars:
            assert [t.get_text() for t in bar.get_yticklabels()] == ["3", "1", "1/16", "1/256"]
        colors = [
            ax.images[0].cmap(ax.images[0].norm(share)) for ax, share in zip(panels, (1, 1 / 16, 1 / 256), strict=False)
        ]
        lightness = [np.dot(c[:3], (0.2126, 0.7152, 0.0722)) for c in colors]
        assert np.diff(lightness).min() > 0.15  # dense, 1/16 and 1/256 are far apart, and no two alike

    def test_the_legend_has_what_the_rows_of_pairs_show(self) -> None:
        for seq_len, want in ((64, 3), (4096, 0)):
            figure = pattern_figure(self.LONG, seq_len)
            assert sum(len(legend.get_texts()) for legend in figure.legends) == want
        # Rows of different multiplicity: the first shows a key once, the next one twice.
        figure = pattern_figure(DilatedPattern((2, 8), (1, 2), 2), 8, heads=(1, 0), spans=[(0, 1), (0, 8)])
        assert [t.get_text() for t in figure.legends[0].get_texts()] == ["counts once", "counts twice"]


@pytest.mark.parametrize("span", [(0, 1000), (0, 100_000), (0, 1_000_000), (123_400, 123_456), (0, 1 << 20)])
def test_labels_of_positions_do_not_meet(span: tuple[int, int]) -> None:
    pattern = DilatedPattern((2048, 16384, 100_000), (1, 4, 16), num_heads=2)
    figure = pattern_figure(pattern, max(span[1], 100_000), spans=[span])
    figure.canvas.draw()
    boxes = []
    for ax in figure.axes[:4]:
        left, right = sorted(ax.get_xlim())
        boxes += [t.get_window_extent() for t in ax.get_xticklabels() if left <= t.get_position()[0] <= right]
    boxes.sort(key=lambda box: box.x0)
    assert len(boxes) >= 8
    assert all(a.x1 + 2 < b.x0 for a, b in itertools.pairwise(boxes))


@pytest.mark.parametrize(
    ("position", "label"),
    [(0, "0"), (999, "999"), (4000, "4k"), (4096, "4,096"), (25_000, "25k"), (123_456, "123,456"), (1_500_000, "1.5M")],
)
def test_a_label_is_short_and_loses_no_digit(position: int, label: str) -> None:
    assert position_label(position) == label


def test_branches_stand_shortest_first() -> None:
    top = neighbours_figure(PATTERN, 40, query=20).axes[0]
    heights = {t.get_text(): t.get_window_extent().y0 for t in top.get_yticklabels()}
    assert sorted(heights, key=heights.__getitem__, reverse=True) == ["w = 6, r = 1", "w = 16, r = 2", "w = 40, r = 5"]


@pytest.mark.parametrize("count", [1, 6, 7, 9, 12])
def test_branches_differ_to_colour_blind_readers(count: int) -> None:
    """Distances as readers without red or green cones see them (Viénot and others, 1999)."""
    rgb = np.array([to_rgb(c) for c in branch_colors(count)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    missing = {
        "none": np.eye(3),
        "red": np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]]),
        "green": np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]]),
    }
    for who, loss in missing.items():
        seen = linear @ (np.linalg.inv(to_lms) @ loss @ to_lms).T
        lab = np.cbrt(
            seen.clip(0) @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
        )
        lab = np.stack((116 * lab[:, 1] - 16, 500 * (lab[:, 0] - lab[:, 1]), 200 * (lab[:, 1] - lab[:, 2])), -1)
        apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 1e3 * np.eye(count)
        assert apart.min() > 5, who  # CIELAB; 2.3 is just noticeable


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
    for ending in FORMATS:
        first, second = (save(draws["loss"](), tmp_path / f"again{i}{ending}").read_bytes() for i in range(2))
        assert first == second and b"CreationDate" not in first and b"<dc:date>" not in first
    assert not list(tmp_path.glob(".*"))  # written whole, nothing left beside


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected head in \[0, 4\), got 4"):
        pattern_figure(PATTERN, 45, heads=(4,))
    with pytest.raises(ValueError, match=r"expected spans within \[0, 45\), got \(0, 46\)"):
        pattern_figure(PATTERN, 45, spans=[(0, 46)])
    with pytest.raises(ValueError, match=r"expected query in \[0, 45\), got 45"):
        receptive_field(PATTERN, 45, query=45, num_layers=1)
    with pytest.raises(ValueError, match=r"expected query in \[0, 45\), got 45"):
        neighbours_figure(PATTERN, 45, query=45)
    # Refused before anything is made.
    for draw in (pattern_figure, partial(neighbours_figure, query=3), partial(receptive_figure, query=3, num_layers=2)):
        with pytest.raises(ValueError, match=r"expected seq_len to be below 134217729, got 1073741824"):
            draw(PATTERN, 1 << 30)
    with pytest.raises(
        ValueError, match=r"expected num_layers \+ 1 times seq_len of at most 1,073,741,824, got 65,001 x"
    ):
        receptive_field(PATTERN, 1 << 19, query=3, num_layers=65_000)
    with pytest.raises(ValueError, match=r"expected num_layers to be below 513, got 2147483648"):
        receptive_figure(PATTERN, 16, query=3, num_layers=1 << 31)
    with pytest.raises(ValueError, match=r"expected seq_len with at most 1,073,741,824 pairs in all branches, got "):
        multiplicity(PATTERN, 1 << 17, head=0)
    for name in ("x.doc", "x.gif", "x"):
        with pytest.raises(ValueError, match=rf"expected path to end in \.png, \.svg or \.pdf, got '{name}'"):
            save(pattern_figure(PATTERN, 20), tmp_path / name)
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="expected lines with 'bpb'"):
        loss_figure(tmp_path / "empty.jsonl")
    for damaged in (b'{"step": 1', b"\xff\xfe", b"3"):
        (tmp_path / "bad.jsonl").write_bytes(b'{"step": 1, "bpb": 8.0}\n' + damaged)
        with pytest.raises(ValueError, match=r"expected a JSON object in line 2 of .*bad\.jsonl, got: "):
            loss_figure(tmp_path / "bad.jsonl")


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

    def test_only_shown_tokens_are_drawn_and_fill_the_picture(self) -> None:
        orders, shown = self.orders(), (self.COORDS[:, 0] > 1) & (self.COORDS[:, 1] < 4)  # four of six rows and columns
        figures = [
            orders_figure(orders, self.COORDS, shown=shown),
            neighbourhood_figure(PATTERN, orders, self.COORDS, query=17, shown=shown),
            heat_figure({"a": torch.rand(42)}, self.COORDS, shown=shown),
        ]
        for figure in figures:
            assert figure.axes[0].images[0].get_array().shape == (4, 4)
        for ax, order in zip(figures[0].axes, orders.values(), strict=True):
            steps = self.COORDS[order.order].diff(dim=0)
            whole = shown[order.order[:-1]] & shown[order.order[1:]]
            assert len(ax.collections[0].get_segments()) == int(whole.sum()) < len(steps)
        whole = neighbourhood_figure(PATTERN, orders, self.COORDS, query=17)
        assert [ax.get_title() for ax in figures[1].axes] == [ax.get_title() for ax in whole.axes]

    def test_maps_of_one_label_share_a_scale(self) -> None:
        torch.manual_seed(0)
        values = {
            "colours": torch.rand(42, 3),
            "a": 10 ** (-6 * torch.rand(42)),
            "b": torch.rand(42),
            "c": torch.randn(42),
        }
        values["b"][7] = torch.nan
        figure = heat_figure(values, self.COORDS, labels={"a": "weight", "b": "weight", "c": "error"})
        pictures = [ax for ax in figure.axes if ax.get_title()]
        bars = [ax.get_ylabel() for ax in figure.axes if ax not in pictures and ax.axison]
        assert [ax.get_title() for ax in pictures] == list(values) and bars == ["weight", "error"]
        a, b, c = (ax.images[-1].norm for ax in pictures[1:])
        assert (a.vmin, a.vmax) == (b.vmin, b.vmax) and isinstance(a, LogNorm)
        high = max(float(values["a"].max()), float(values["b"][values["b"].isfinite()].max()))
        assert a.vmax == pytest.approx(high) and a.vmin == pytest.approx(high / 1e4)  # four decades of six
        assert not isinstance(c, LogNorm) and c.vmin == pytest.approx(float(values["c"].min()))
        assert not np.isfinite(pictures[2].images[-1].get_array().filled(np.nan)[1, 0])

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
        with pytest.raises(ValueError, match=r"expected shown of bools, shape \(42,\), got torch.int64 \(42,\)"):
            orders_figure(orders, self.COORDS, shown=torch.ones(42, dtype=torch.int64))
        with pytest.raises(ValueError, match="expected shown to hold tokens of the plane, got none"):
            orders_figure(orders, self.COORDS, shown=torch.zeros(42, dtype=torch.bool))
        with pytest.raises(ValueError, match="expected a plane that holds tokens, got 9"):
            heat_figure({"a": torch.zeros(60)}, grid_coords((3, 4, 5)), plane=9)
