"""Orders along curves: the Hilbert curve against its oracle and its defining properties, every order a permutation."""

from __future__ import annotations

import itertools
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hilbertcurve.hilbertcurve import HilbertCurve
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dilated_attention_pytorch.kernels import hilbert_tables
from dilated_attention_pytorch.kernels.hilbert import (
    CURVES,
    CurveOrder,
    curve_order,
    grid_coords,
    hilbert_decode,
    hilbert_encode,
    hilbert_order,
)

POWERS = [(2, bits) for bits in range(1, 11)] + [(3, bits) for bits in range(1, 7)]


def steps(coords: Tensor) -> Tensor:
    """How far each step goes, in sides of cells."""
    return coords.diff(dim=0).abs().sum(1)


@pytest.mark.parametrize(("num_dims", "bits"), POWERS)
def test_bijective_with_unit_steps(num_dims: int, bits: int) -> None:
    index = torch.arange(1 << num_dims * bits)
    points = hilbert_decode(index, num_dims, bits)
    assert torch.equal(hilbert_encode(points, bits), index)
    assert int(points.min()) == 0 and int(points.max()) == (1 << bits) - 1
    assert bool((steps(points) == 1).all())


@pytest.mark.parametrize(("num_dims", "bits"), [(2, b) for b in range(1, 7)] + [(3, b) for b in range(1, 5)])
def test_the_oracle_everywhere(num_dims: int, bits: int) -> None:
    points = torch.tensor(list(itertools.product(range(1 << bits), repeat=num_dims)))
    want = HilbertCurve(bits, num_dims).distances_from_points(points.tolist())
    assert hilbert_encode(points, bits).tolist() == list(want)


@pytest.mark.parametrize(("num_dims", "bits"), [(2, 7), (2, 10), (2, 16), (2, 31), (3, 5), (3, 6), (3, 11), (3, 20)])
def test_the_oracle_at_random_points(num_dims: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    points = torch.randint(1 << bits, (300, num_dims), generator=generator)
    want = HilbertCurve(bits, num_dims).distances_from_points(points.tolist())
    got = hilbert_encode(points, bits)
    assert got.tolist() == list(want)
    assert torch.equal(hilbert_decode(got, num_dims, bits), points)


@pytest.mark.parametrize(("num_dims", "bits"), [(2, 5), (3, 3)])
def test_an_aligned_stretch_is_a_square(num_dims: int, bits: int) -> None:
    """What segments of dilated attention gain: `2 ** (D * b)` tokens in a row fill a cube of side `2 ** b`."""
    points = hilbert_decode(torch.arange(1 << num_dims * bits), num_dims, bits)
    for inner in range(bits + 1):
        stretches = points.unflatten(0, (-1, 1 << num_dims * inner))
        sides = stretches.amax(1) - stretches.amin(1)
        assert bool((sides == (1 << inner) - 1).all())


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64],
)
def test_any_shape_and_integer(dtype: torch.dtype) -> None:
    points = torch.randint(64, (3, 5, 2)).to(dtype)
    got = hilbert_encode(points, 6)
    assert got.shape == (3, 5) and got.dtype == torch.int64
    assert torch.equal(got.flatten(), hilbert_encode(points.flatten(0, 1).long(), 6))
    assert torch.equal(hilbert_order(points.flatten(0, 1)).order, hilbert_order(points.flatten(0, 1).long()).order)
    assert hilbert_encode(torch.empty(0, 3, dtype=dtype), 4).shape == (0,)
    assert hilbert_decode(torch.empty(2, 0, dtype=dtype), 3, 4).shape == (2, 0, 3)


def test_quarter_of_a_million_points_are_quick() -> None:
    """In time of the processor, which a busy machine does not stretch: 250 ms of two cores are 500 of one."""
    points, times = grid_coords((512, 512)), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            start = time.thread_time()
            hilbert_tables.encode(points.unbind(-1), 9)
            times.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert len(points) == 262_144
    assert min(times) < 0.5, times  # about 0.01


def check_permutation(found: CurveOrder, size: int) -> None:
    everything = torch.arange(size)
    assert torch.equal(found.order.sort().values, everything)
    assert torch.equal(found.order[found.inverse], everything)
    x = torch.randn(2, size, 3)
    assert torch.equal(found.undo(found.apply(x)), x)
    assert torch.equal(found.apply(x)[:, 0] if size else x[:, :0], x[:, found.order[0]] if size else x[:, :0])


@settings(max_examples=60, deadline=None)
@given(grid=st.lists(st.integers(1, 23), min_size=2, max_size=3), name=st.sampled_from(CURVES))
def test_any_grid_is_a_permutation(grid: list[int], name: Any) -> None:
    found = curve_order(name, grid=grid)
    check_permutation(found, torch.Size(grid).numel())
    # A grid is its coordinates.
    assert torch.equal(found.order, curve_order(name, grid_coords(grid)).order)
    assert curve_order(name, grid=tuple(grid)) is found  # cached


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(CURVES), num_dims=st.sampled_from([2, 3]), floats=st.booleans())
def test_any_coordinates_are_a_permutation(data: Any, name: Any, num_dims: int, floats: bool) -> None:
    number = st.floats(-1e6, 1e6, width=32) if floats else st.integers(-1000, 1000)
    points = data.draw(st.lists(st.tuples(*[number] * num_dims), max_size=40))
    coords = torch.tensor(points, dtype=torch.float32 if floats else torch.int64).reshape(-1, num_dims)
    check_permutation(curve_order(name, coords), len(points))


@pytest.mark.parametrize("name", CURVES)
def test_tokens_at_one_place_keep_their_order(name: Any) -> None:
    coords = grid_coords((4, 5)).repeat(3, 1)
    found = curve_order(name, coords).order
    assert torch.equal(
        found, curve_order(name, grid=(4, 5)).order.repeat_interleave(3) + torch.tensor([0, 20, 40] * 20)
    )


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("grid", [(13, 9), (5, 7, 6)])
def test_only_places_matter_not_pixels(name: Any, grid: tuple[int, ...]) -> None:
    """Tiles' pixels at any stride and offset, tokens in any order, floats: one walk."""
    coords = grid_coords(grid)
    walk = coords[curve_order(name, coords).order]
    shuffled = coords[torch.randperm(len(coords), generator=torch.Generator().manual_seed(0))]
    strides = torch.tensor([224, 37, 512][: len(grid)])
    for moved in (shuffled, shuffled * strides - 5000, shuffled.to(torch.int32) * 3, shuffled.to(torch.uint8)):
        assert torch.equal(shuffled[curve_order(name, moved).order], walk)
    if name in ("raster", "snake"):
        assert torch.equal(shuffled[curve_order(name, shuffled * 0.37 - 11).order], walk)


def test_floats_of_a_power_of_two_are_the_grid() -> None:
    """The walk through 2 ** b cells is that through 2 ** 26, as long as cells keep apart."""
    coords = grid_coords((16, 16))
    got = hilbert_order(coords / 16 + torch.rand(256, 2, generator=torch.Generator().manual_seed(0)) / 64)
    assert len(got.order) == 256
    assert float((steps(coords[got.order]) == 1).double().mean()) > 0.9


def test_simple_curves_by_definition() -> None:
    assert torch.equal(curve_order("raster", grid=(7, 5)).order, torch.arange(35))
    for grid in ((7, 5), (6, 4), (1, 9), (3, 4, 5), (4, 6, 3), (2, 2, 2), (5, 3, 3)):
        assert bool((steps(grid_coords(grid)[curve_order("snake", grid=grid).order]) == 1).all()), grid
    assert curve_order("morton", grid=(4, 4)).order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert curve_order("morton", grid=(2, 2, 2)).order.tolist() == list(range(8))


@pytest.mark.parametrize("grid", [(32, 64), (64, 32), (16, 16), (8, 16, 16), (16, 16, 8), (16, 8, 16)])
def test_unit_steps_where_one_side_is_twice_another(grid: tuple[int, ...]) -> None:
    assert bool((steps(grid_coords(grid)[hilbert_order(grid=grid).order]) == 1).all())


def test_no_longer_side_has_long_jumps_only_at_the_rim() -> None:
    """Elsewhere the walk leaves the grid and comes back: steps longer than one start and end at its rim."""
    walk = grid_coords((37, 53))[hilbert_order(grid=(37, 53)).order]
    long = (steps(walk) > 1).nonzero().flatten()
    assert 0 < len(long) < 0.05 * len(walk)
    for end in (long, long + 1):
        assert bool(((walk[end] == 0) | (walk[end] == torch.tensor([36, 52]))).any(1).all())


def test_what_inference_left_in_a_cache_serves_training() -> None:
    hilbert_tables._tables.cache_clear()
    grid = (7, 11)  # no other test's
    with torch.inference_mode():
        hilbert_order(grid=grid)
    x = torch.randn(1, 77, 2, requires_grad=True)
    hilbert_order(grid=grid).apply(x).sum().backward()
    assert not any(table.is_inference() for table in hilbert_tables._tables(2, "cpu")[:2])


class TestHilbertsfc:
    """Used where it is installed and gives this curve; what comes out does not depend on it."""

    @pytest.fixture(autouse=True)
    def _asked_anew(self) -> Iterator[None]:
        hilbert_tables._hilbertsfc_agrees.cache_clear()
        yield
        hilbert_tables._hilbertsfc_agrees.cache_clear()

    def install(self, monkeypatch: pytest.MonkeyPatch, encode: Callable[..., Tensor]) -> list[int]:
        calls: list[int] = []

        def counted(x: Tensor, y: Tensor, *, nbits: int) -> Tensor:
            calls.append(nbits)
            return encode(x, y, nbits)

        module = types.ModuleType("hilbertsfc.torch")
        module.hilbert_encode_2d = counted  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "hilbertsfc", types.ModuleType("hilbertsfc"))
        monkeypatch.setitem(sys.modules, "hilbertsfc.torch", module)
        return calls

    def test_one_that_agrees_is_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def theirs(x: Tensor, y: Tensor, nbits: int) -> Tensor:
            return hilbert_tables.encode((y, x) if nbits % 2 else (x, y), nbits).to(torch.int32)

        calls = self.install(monkeypatch, theirs)
        points = torch.randint(1 << 9, (50, 2))
        assert torch.equal(hilbert_encode(points, 9), hilbert_tables.encode(points.unbind(-1), 9))
        assert calls[-1] == 9

    @pytest.mark.parametrize("curve", ["swapped", "broken"])
    def test_one_that_does_not_is_left_alone(self, monkeypatch: pytest.MonkeyPatch, curve: str) -> None:
        def theirs(x: Tensor, y: Tensor, nbits: int) -> Tensor:
            if curve == "broken":
                raise RuntimeError("no compiler")
            return hilbert_tables.encode((y, x), nbits)

        self.install(monkeypatch, theirs)
        points = torch.randint(1 << 9, (50, 2))
        assert torch.equal(hilbert_encode(points, 9), hilbert_tables.encode(points.unbind(-1), 9))

    def test_the_real_one(self) -> None:
        pytest.importorskip("hilbertsfc.torch", reason="hilbertsfc needs Python 3.12")
        assert hilbert_tables._hilbertsfc_agrees()
        for bits in range(1, 11):
            points = hilbert_decode(torch.arange(1 << 2 * bits), 2, bits)
            assert torch.equal(hilbert_encode(points, bits), torch.arange(1 << 2 * bits))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: curve_order("peano", grid=(2, 2)), ValueError, "expected name to be one of"),
        (lambda: hilbert_order(), ValueError, "expected either coords or grid, got neither"),
        (lambda: hilbert_order(torch.zeros(3, 2), grid=(3, 1)), ValueError, "got both"),
        (lambda: hilbert_order(grid=(4,)), ValueError, "expected grid of 2 or 3 sizes, got 1"),
        (lambda: hilbert_order(grid=(4, 0)), ValueError, r"expected grid\[1\] to be at least 1, got 0"),
        (lambda: hilbert_order(grid=(4, 2.0)), TypeError, r"expected grid\[1\] to be an int"),
        (lambda: hilbert_order(grid=7), TypeError, "expected grid to be"),
        (lambda: hilbert_order(torch.zeros(3, 4)), ValueError, r"expected coords of shape .* got \(3, 4\)"),
        (lambda: hilbert_order([[0, 1]]), TypeError, "expected coords to be a Tensor, got list"),
        (lambda: hilbert_order(torch.zeros(3, 2, dtype=torch.bool)), TypeError, "expected coords of integers"),
        (lambda: hilbert_order(torch.tensor([[0.0, torch.nan]])), ValueError, "expected finite coords"),
        (lambda: hilbert_order(torch.tensor([[0, 0], [1, 1], [2, 1 << 40]])), ValueError, "at most"),
        (lambda: hilbert_encode(torch.tensor([[0, 4]]), 2), ValueError, r"expected coords in \[0, 2 \*\* 2\), got"),
        (lambda: hilbert_encode(torch.tensor([[0, -1]]), 2), ValueError, "got -1 to 0"),
        (lambda: hilbert_encode(torch.tensor([[0.0, 1.0]]), 2), TypeError, "expected coords to be of integers"),
        (lambda: hilbert_encode(torch.zeros(5, dtype=torch.int64), 2), ValueError, "expected coords of shape"),
        (lambda: hilbert_encode(torch.zeros(1, 3, dtype=torch.int64), 21), ValueError, "at most 20 in 3-D, got 21"),
        (lambda: hilbert_encode(torch.zeros(1, 3, dtype=torch.int64), 0), ValueError, "at least 1, got 0"),
        (lambda: hilbert_decode(torch.tensor([16]), 2, 2), ValueError, r"expected index in \[0, 2 \*\* 4\)"),
        (lambda: hilbert_decode(torch.tensor([1.0]), 2, 2), TypeError, "expected index to be of integers"),
        (lambda: hilbert_decode([0, 1], 2, 1), TypeError, "expected index to be a Tensor, got list"),
        (lambda: hilbert_decode(torch.tensor([1]), [2], 1), TypeError, "expected num_dims to be an int, got list"),
        (lambda: hilbert_order(torch.tensor([[0, 2**63]], dtype=torch.uint64)), ValueError, r"below 2 \*\* 63"),
        (lambda: hilbert_decode(torch.tensor([1]), 4, 2), ValueError, "expected num_dims to be 2 or 3, got 4"),
        (lambda: hilbert_order(grid=(2, 2)).apply(torch.zeros(1, 5)), ValueError, "expected 4 tokens along"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_numbers_of_numpy_are_no_eight_bit_arithmetic():
    index = torch.arange(64)
    got = hilbert_decode(index, np.uint8(3), np.uint8(2))
    assert torch.equal(got, hilbert_decode(index, 3, 2))
    assert torch.equal(hilbert_encode(got, np.uint8(2)), index)
