"""Documents of packed rows, against a loop over tokens; traced like read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dilated_attention_pytorch.integrations import packing

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def row(lengths: list[int], first: int = 0) -> torch.Tensor:
    return torch.cat([torch.arange(n) + first for n in lengths])[None]


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="eager", dynamic=True)


@given(LENGTHS, st.integers(0, 3))
def test_documents_begin_where_positions_do(lengths: list[int], first: int) -> None:
    numbers = packing.documents(row(lengths, first))
    if len(lengths) == 1:
        assert numbers is None
        return
    assert numbers is not None
    assert numbers.tolist() == [[i + 1 for i, n in enumerate(lengths) for _ in range(n)]]
    assert packing.bounds(numbers).tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
    assert torch.equal(packing.documents_within(packing.bounds(numbers), sum(lengths)), numbers - 1)


def test_rows_are_apart() -> None:
    numbers = packing.documents(torch.cat([row([3, 2]), row([5])]))
    assert numbers is not None and packing.bounds(numbers).tolist() == [0, 3, 5, 10]


@pytest.mark.parametrize(
    ("positions", "real", "want"),
    [
        ([0, 0, 0, 1, 2], [0, 0, 1, 1, 1], None),  # left padding, as `generate` has it
        ([1, 1, 0, 1, 2], [0, 0, 1, 1, 1], None),
        ([0, 1, 2, 3, 4], [1, 1, 1, 0, 0], None),
        ([0, 1, 2, 3, 4], [1, 1, 0, 1, 1], None),  # a hole, counted
        ([0, 1, 1, 2, 3], [1, 1, 0, 1, 1], None),  # and not
        ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0], None),
        ([0, 1, 0, 1, 2], [1, 1, 1, 1, 1], [0, 2, 5]),
        ([0, 1, 0, 1, 0], [1, 1, 1, 1, 0], [0, 2, 4, 5]),
        ([0, 1, 0, 0, 1], [1, 1, 0, 1, 1], [0, 2, 3, 5]),
        ([0, 0, 0, 1, 0], [0, 0, 1, 1, 1], [0, 1, 2, 4, 5]),
    ],
)
def test_hidden_tokens(positions: list[int], real: list[int], want: list[int] | None) -> None:
    numbers = packing.documents(torch.tensor([positions]), torch.tensor([real]).bool())
    assert (None if numbers is None else packing.bounds(numbers).tolist()) == want


def test_a_hole_in_a_packed_document() -> None:
    with pytest.raises(ValueError, match="hides no token inside a document"):
        packing.documents(torch.tensor([[0, 1, 2, 0, 1]]), torch.tensor([[1, 0, 1, 1, 1]]).bool())


def test_traced_bounds_serve_any_documents() -> None:
    def bounds(position_ids, real=None):
        return packing.bounds(packing.documents(position_ids, real))

    traced = compiled(bounds)
    for lengths in ([2, 3], [5], [1, 1, 1, 1, 1], [1, 4]):
        got, want = traced(row(lengths)), [0, *torch.tensor(lengths).cumsum(0).tolist()]
        assert got.dtype == torch.int32 and got.tolist() == want + [5] * (6 - len(want))
    real = torch.tensor([[0, 0, 1, 1, 1]]).bool()
    assert traced(torch.tensor([[0, 0, 0, 1, 2]]), real).tolist() == [0, 1, 2, 5, 5, 5]
    with pytest.raises((RuntimeError, AssertionError), match="hides no token inside a document"):
        traced(torch.tensor([[0, 1, 2, 3, 4]]), torch.tensor([[1, 1, 0, 1, 1]]).bool())
