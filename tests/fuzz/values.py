"""Odd and wrong values: numbers, things that stand where a number should, tensors of every layout and stride."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OTHER_DTYPES = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)

FAKE = FakeTensorMode()

# Where tensors of the op, of streaming and of the pool lie; `--device cuda` changes it, before anything is drawn.
PLACE = torch.device("cpu")


def placed(x: Any) -> Any:
    """A tensor where the run wants it."""
    return x.to(PLACE) if isinstance(x, Tensor) else x


class Width(int):
    """An int by inheritance."""


class Share(float):
    """A float by inheritance."""


class Word(str):
    """A str by inheritance."""


class Length(enum.IntEnum):
    EIGHT = 8


class Index:
    """An int by `__index__`."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return f"Index({self.value})"


class Liar:
    """Claims to be an int, and raises when asked which."""

    def __index__(self) -> int:
        raise RuntimeError("no number")


class Subclass(Tensor):
    """A tensor by inheritance."""


# Numbers that a count, a position or a factor may be, and numbers that it may not.
NUMBERS: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 3, 5, 7, 8, 16, 100, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64),
    *(-(2**31), -(2**63), -(2**63) - 1, 10**30, -(10**30), 10**400, 10**5000),
    *(0.0, -0.0, 0.1, 0.5, 1.0, 2.5, -3.0, float("nan"), float("inf"), -float("inf"), 1e30, 1e308, -1e308, 5e-324),
    *(True, False, None, 1j, Width(8), Length.EIGHT, Share(0.5), Index(4), Index(-1), Index(2**70), Liar()),
    *(np.int64(8), np.int32(-1), np.uint8(3), np.uint64(2**64 - 1), np.bool_(True), np.complex64(1)),
    *(np.float16(0.5), np.float32(0.25), np.float64(0.5), np.float64("nan"), Fraction(1, 2), Decimal(1)),
)

# Everything else; made anew each time, so that no call sees what another one did.
_OTHERS: tuple[Callable[[], Any], ...] = (
    lambda: "",
    lambda: "3",
    lambda: "modulo",
    lambda: Word("modulo"),
    lambda: np.str_("none"),
    lambda: "x" * 5000,
    lambda: b"sdpa",
    list,
    tuple,
    dict,
    lambda: [1],
    lambda: (8,),
    lambda: [[8]],
    lambda: {1},
    lambda: range(3),
    lambda: iter([8]),
    object,
    lambda: int,
    lambda: len,
    lambda: ...,
    lambda: slice(None),
    lambda: torch.float32,
    lambda: torch.device("cpu"),
    lambda: np.array(8),
    lambda: np.array([8]),
    lambda: np.array([8, 16]),
    lambda: np.array([]),
    lambda: np.array(0.5),
    lambda: np.array("modulo"),
    lambda: np.array([True, False]),
    lambda: np.array(None, dtype=object),
    lambda: torch.tensor(8),
    lambda: torch.tensor(0.5),
    lambda: torch.tensor(True),
    lambda: torch.tensor([8]),
    lambda: torch.tensor([8, 16]),
    lambda: torch.tensor([]),
    lambda: torch.tensor(8, device="meta"),
    lambda: torch.tensor(1j),
    lambda: torch.zeros(2, 3),
    lambda: FAKE.from_tensor(torch.tensor(8)),
    lambda: torch.tensor([8]).to_sparse(),
    lambda: torch.tensor(8).as_subclass(Subclass),
    lambda: torch.nn.Parameter(torch.zeros(2)),
)

WORDS = ("modulo", "blocked", "exact", "detached", "none", "zero_keys", "auto", "reference", "sdpa", "triton", "mod")

numbers = st.sampled_from(NUMBERS)
anything = st.one_of(numbers, st.sampled_from(_OTHERS).map(lambda make: make()), st.sampled_from(WORDS))


@st.composite
def sequences(draw: st.DrawFn) -> Any:
    """What may stand where a sequence of lengths or rates should."""
    kind = draw(st.sampled_from(["numbers", "numbers", "right", "array", "tensor", "nested", "anything", "generator"]))
    if kind == "numbers":
        values = draw(st.lists(numbers, max_size=3))
        return draw(st.sampled_from([list, tuple]))(values)
    few = draw(st.lists(st.integers(-1, 40), max_size=4))
    if kind == "right":
        return [np.int64(abs(x) + 1) for x in few]
    if kind == "array":
        return np.array(few, dtype=draw(st.sampled_from(["int64", "int32", "float64", "bool", "object"])))
    if kind == "tensor":
        return torch.tensor(few, dtype=draw(st.sampled_from([torch.int64, torch.int32, torch.float32])))
    if kind == "nested":
        return [few, few]
    if kind == "generator":
        return (x for x in few)
    return draw(anything)


def _noise(x: Tensor) -> Tensor:
    """What stands beside x's numbers and is never to be read."""
    return torch.full_like(x, torch.nan) if x.is_floating_point() else torch.ones_like(x)


@st.composite
def strided(draw: st.DrawFn, x: Tensor) -> Tensor:
    """The same numbers at other strides; or other numbers, where rows are to overlap."""
    kind = draw(st.sampled_from(["dense", "dense", "permuted", "spread", "shifted", "expanded", "overlapping", "zero"]))
    if kind == "permuted":
        order = draw(st.permutations(range(x.dim())))
        back = sorted(range(x.dim()), key=lambda i: order[i])
        return x.permute(order).contiguous().permute(back)
    if kind == "spread":
        dim = draw(st.integers(0, x.dim() - 1))
        return torch.stack([x, _noise(x)], dim + 1).select(dim + 1, 0)
    if kind == "shifted" and x.numel():
        skipped = draw(st.integers(1, 3))
        return torch.cat([_noise(x).flatten()[:1].expand(skipped), x.flatten()])[skipped:].view(x.shape)
    if kind == "expanded":
        dim = draw(st.integers(0, x.dim() - 1))
        return x.narrow(dim, 0, 1).expand(x.shape) if x.shape[dim] else x
    if kind == "overlapping" and x.numel():
        strides = [draw(st.integers(0, 3)) for _ in x.shape]
        needed = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) + 1
        return torch.as_strided(x.flatten().repeat(1 + needed // x.numel()), x.shape, strides)
    if kind == "zero":
        return x.flatten()[:1].as_strided(x.shape, [0] * x.dim()) if x.numel() else x
    return x


def _nested(x: Tensor, layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor(list(x.unbind(0)) or [x.new_zeros(x.shape[1:])], layout=layout)


def _compressed(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it is in beta
        return x.reshape(x.shape[0], -1).to_sparse_csr()


def _quantized(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


# Tensors that hold x's numbers and stand for it.
ODD_TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "subclass": lambda x: x.clone().as_subclass(Subclass),
    "parameter": lambda x: torch.nn.Parameter(x.detach().clone(), requires_grad=x.is_floating_point()),
    "negative bit": lambda x: torch._neg_view(-x) if x.dtype != torch.bool else x,
    "of inference": _inference,
    "of a graph": lambda x: x.clone().requires_grad_() * 1 if x.is_floating_point() else x,
}

# Tensors that cannot; but nothing hinders a call of three meta or three fake ones.
WRONG_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "sparse": lambda x: x.to_sparse(),
    "hybrid": lambda x: x.to_sparse(1),
    "compressed": _compressed,
    "nested": lambda x: _nested(x, torch.strided),
    "jagged": lambda x: _nested(x, torch.jagged),
    "mkldnn": lambda x: x.detach().float().to_mkldnn(),
    "quantized": _quantized,
    "meta": lambda x: x.to("meta"),
    "fake": lambda x: FAKE.from_tensor(x.detach().contiguous()),
    "complex": lambda x: torch.complex(x.float(), x.float()),
    "no rows": lambda x: x[:, :0],
    "no batch": lambda x: x[:0],
    "no width": lambda x: x[..., :0],
    "one more dimension": lambda x: x[None],
    "one dimension less": lambda x: x[0] if len(x) else x.flatten(),
    "scalar": lambda x: x.sum(),
    "one row more": lambda x: torch.cat([x, x[:, :1]], 1),
    "one head more": lambda x: torch.cat([x, x[..., :1, :]], -2),
    "wider": lambda x: torch.cat([x, x[..., :1]], -1),
    "elsewhere": lambda x: x.cpu(),  # right in a run on a CPU
    "list": lambda x: x.tolist(),
    "array": lambda x: x.detach().cpu().float().numpy(),
    "shape": lambda x: x.shape,
}


@st.composite
def spoiled(draw: st.DrawFn, x: Tensor) -> Any:
    """Something in a tensor's place: odd, of another dtype, wrong, or no tensor at all."""
    kind = draw(st.sampled_from(["odd", "dtype", "wrong", "wrong", "wrong", "anything"]))
    if kind == "anything":
        return draw(anything)
    if kind == "dtype":
        return x.to(draw(st.sampled_from(FLOATS + OTHER_DTYPES)))
    kinds = ODD_TENSORS if kind == "odd" else WRONG_TENSORS
    name = draw(st.sampled_from(sorted(kinds)))
    try:
        return kinds[name](x)
    except (RuntimeError, IndexError, ValueError, NotImplementedError):
        return None  # this shape has no such form, and None is as wrong


def shown(value: Any) -> str:
    """What a report says of a value."""
    if isinstance(value, Tensor):
        kind = "nested" if value.is_nested else str(tuple(value.shape))
        where = f" {value.device}" if value.device.type != "cpu" else ""
        strides = f" strides {value.stride()}" if value.layout == torch.strided and not value.is_nested else ""
        return f"{type(value).__name__}[{value.dtype} {kind}{where} {value.layout}{strides}]"
    if isinstance(value, (list, tuple)) and any(isinstance(x, Tensor) for x in value):
        return f"{type(value).__name__}({', '.join(shown(x) for x in value)})"
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python prints
        text = f"{type(value).__name__} too long to print"
    return text if len(text) <= 200 else f"{text[:200]}..."


def dense(x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """A plain copy with numbers of its own."""
    plain = x.detach().as_subclass(Tensor)
    return plain.resolve_neg().to(dtype, copy=True, memory_format=torch.contiguous_format)


def pick(draw: st.DrawFn, names: Sequence[str], most: int = 2) -> list[str]:
    """The arguments to spoil: often none, seldom several."""
    count = min(len(names), draw(st.sampled_from([0, *[1] * 4, *range(2, most + 1)])))
    return draw(st.lists(st.sampled_from(list(names)), min_size=count, max_size=count, unique=True))
