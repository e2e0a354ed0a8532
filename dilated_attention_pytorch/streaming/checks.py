"""Checks of what streaming is given: all of them pass before anything is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.streaming import pages

# What `dilated_attention` has and streaming has not, with the only value that is taken.
REFUSED = {"dropout_p": 0.0, "row_start": None, "cu_seqlens": None, "mixing_gradient": "exact", "padding": "none"}


class Spec(NamedTuple):
    """The shape and dtype that an argument has to have."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, device: str) -> Tensor:
        """A tensor of the kind."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


def refuse(**options: Any) -> None:
    """Raises for an option of `dilated_attention` that streaming has not, unless it has its default."""
    for name, value in options.items():
        default = REFUSED[name]
        # An array or tensor compares element by element.
        is_plain = isinstance(value, (int, float, str)) and value == default
        if value is not default and not is_plain:
            raise NotImplementedError(
                f"streaming has no {name}={check.quoted(value)}: dilated_attention computes it, on sequences that fit "
                "the device"
            )


def check_source(name: str, x: object) -> Spec:
    """The shape and dtype of a tensor in host memory or of a range source."""
    if isinstance(x, Tensor):
        check.check_dense(name, x)
        if x.device.type != "cpu":
            raise ValueError(
                f"expected {name} in host memory, got it on {x.device}: dilated_attention computes what lies there"
            )
        return Spec(tuple(x.shape), x.dtype)
    missing = [part for part in ("shape", "dtype", "read") if not hasattr(x, part)]
    if missing:
        raise TypeError(
            f"expected {name} to be a Tensor or a source with shape, dtype and read(start, stop), "
            f"got {type(x).__name__} without {', '.join(missing)}"
        )
    source: Any = x  # whatever its attributes are
    _check_method(f"{name}.read", source.read)
    _check_method(f"{name}.read_into", getattr(source, "read_into", None), optional=True)
    if not isinstance(source.dtype, torch.dtype):
        raise TypeError(
            f"expected {name}.dtype to be a torch.dtype, got {type(source.dtype).__name__} {source.dtype!r}"
        )
    if isinstance(source.shape, str | bytes) or not isinstance(source.shape, Sequence):
        raise TypeError(
            f"expected {name}.shape to be a sequence of ints, got {type(source.shape).__name__} {source.shape!r}"
        )
    shape = tuple(check.check_int(f"{name}.shape[{i}]", size, 0) for i, size in enumerate(source.shape))
    if math.prod(shape) * source.dtype.itemsize >= 2**63:
        raise ValueError(f"expected {name} of fewer than 2**63 bytes, got {source.dtype} {shape}")
    return Spec(shape, source.dtype)


def check_read(call: str, rows: object, want: Spec) -> None:
    """What a source's `read` gave has the shape and dtype that the source named."""
    if not isinstance(rows, Tensor):
        raise TypeError(f"expected {call} to give a Tensor, got {type(rows).__name__}")
    check.check_dense(call, rows)
    if tuple(rows.shape) != want.shape or rows.dtype != want.dtype or rows.device.type != "cpu":
        raise ValueError(
            f"expected {call} to give {want.dtype} {want.shape} on the CPU, "
            f"got {rows.dtype} {tuple(rows.shape)} on {rows.device}"
        )


def check_spec(name: str, got: Spec, want: Spec) -> None:
    """The shape and dtype of an argument are those wanted."""
    if got != want:
        raise ValueError(f"expected {name} of {want.dtype} {want.shape}, got {got.dtype} {got.shape}")


def check_target(name: str, x: object, want: Spec, taken: Sequence[object]) -> None:
    """A sink, or a host tensor that can be written to and shares no memory with the tensors already taken.

    Memory counts from a tensor's first element to its last: views that interleave are refused although no element is
    shared.
    """
    if not isinstance(x, Tensor):
        if not callable(getattr(x, "write", None)):
            raise TypeError(f"expected {name} to be a Tensor or have write(start, rows), got {type(x).__name__}")
        _check_method(f"{name}.commit", getattr(x, "commit", None), optional=True)
        return
    check.check_dense(name, x)
    check_spec(name, Spec(tuple(x.shape), x.dtype), want)
    if x.device.type != "cpu":
        raise ValueError(f"expected {name} in host memory, got it on {x.device}")
    if x.requires_grad:
        raise ValueError(f"expected {name} without requires_grad: it is overwritten")
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"expected {name} to be writable, got an inference tensor outside inference mode")
    if _folds(x):
        raise ValueError(
            f"expected {name} with memory of its own for each element, got strides {x.stride()} for shape "
            f"{tuple(x.shape)}"
        )
    # Results are written while inputs of later ranges have not been read.
    if any(isinstance(y, Tensor) and _overlap(x, y) for y in taken):
        raise ValueError(
            f"expected {name} in memory of its own, got a tensor whose memory, from its first element to its last, "
            "overlaps another argument's"
        )


def check_device(device: torch.device | str | None) -> torch.device:
    """The CPU or a CUDA device that is there, with its index; by default a CUDA device if there is one."""
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    found = check.check_device("device", chosen)
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"expected device to be a CPU or a CUDA device, got {found}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"expected a device that is there, got {found} on a machine without CUDA")
    return torch.device("cuda", torch.cuda.current_device()) if found == torch.device("cuda") else found


def _check_method(name: str, method: object, *, optional: bool = False) -> None:
    if not callable(method) and not (optional and method is None):
        raise TypeError(f"expected {name} to be a method, got {type(method).__name__}")


def _folds(x: Tensor) -> bool:
    """True if elements may share memory: a stride is below what it has to step over."""
    covered = 1  # elements that the dimensions so far span, from the smallest stride on
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < covered:
            return True
        covered += max(0, size - 1) * stride
    return False


def _overlap(x: Tensor, y: Tensor) -> bool:
    """True if the addresses that two host tensors span have one in common."""
    if x.numel() == 0 or y.numel() == 0:
        return False
    (first, last), (other_first, other_last) = pages.extent(x), pages.extent(y)
    return first < other_last and other_first < last
