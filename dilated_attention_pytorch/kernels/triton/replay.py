"""Record a call's allocations and launches once; replay them with new pointers.

What a call allocates and launches depends on its problem and on the layout of its tensors alone. The first call of a
kind notes that on a tape; a later one looks the tape up, allocates, puts its own pointers in and launches the compiled
kernels directly. That spares the host most of what a launch costs: sizing grids, choosing configurations, describing
views, and Triton's own binding and specialisation of some sixty arguments.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

_KEPT = 512  # tapes; sequence lengths may never repeat
_tapes: dict[Hashable, Tape] = {}


def find(key: Hashable | None, inputs: Sequence[Tensor | None]) -> Tape | None:
    """The tape of a key for inputs of this layout, if one was recorded."""
    return None if key is None else _tapes.get(_kind(key, inputs))


class Tape:
    """The allocations and launches of one call, in terms of numbered tensors: the inputs first, then the new ones.

    Args:
        key: everything beside the inputs' layout that decides what is launched; None to record nothing.
        inputs: the tensors that the launches read. A kernel's tensors must be among them or come from `empty`.
    """

    def __init__(self, key: Hashable | None = None, inputs: Sequence[Tensor | None] = ()) -> None:
        present = [id(x) for x in inputs if x is not None]
        # A tape could not tell which of two equal inputs an argument was.
        self.is_recording = key is not None and len(set(present)) == len(present)
        if not self.is_recording:
            return
        self.kind = _kind(key, inputs)
        self.device = next(x.device for x in inputs if x is not None)
        self.steps: list[Launch | NewTensor] = []
        self.results: list[int] = []
        # While recording, what the numbers stand for: held weakly, so that it takes no more memory than the call.
        self.tensors = [(lambda: None) if x is None else weakref.ref(x) for x in inputs]

    def empty(
        self, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None, *, fill: float | None = None
    ) -> Tensor:
        """A new contiguous tensor, filled or not."""
        step = NewTensor(tuple(shape), dtype or like.dtype, fill)
        tensor = torch.empty(step.shape, dtype=step.dtype, device=like.device)
        if fill is not None:
            tensor.fill_(fill)
        if self.is_recording:
            self.steps.append(step)
            self.tensors.append(weakref.ref(tensor))
        return tensor

    def note(self, kernel: Any, grid: tuple[int, ...], args: Sequence[Any], flags: dict[str, Any], handle: Any) -> None:
        """Takes down a launch just made, `handle = kernel[grid](*args, **flags)`."""
        if self.is_recording:
            self.steps.append(Launch(kernel, grid, args, flags, handle, self))

    def keep(self, results: Sequence[Tensor]) -> None:
        """Ends the recording, and keeps the tape if it can be played."""
        if not self.is_recording:
            return
        launches = [x for x in self.steps if isinstance(x, Launch)]
        numbers = [self.number(x) for x in results]
        self.results = [x for x in numbers if x is not None]
        free = set(range(len(self.tensors))) - set(self.results)
        # Playing frees what is needed no longer, as the first call did.
        for launch in reversed(launches):
            used = {number for _, number, *_ in (*launch.pointers, *launch.views)}
            launch.last = tuple(used & free)
            free -= used
        self.is_recording, self.tensors = False, []
        if None not in numbers and launches and all(x.complete for x in launches):
            if len(_tapes) >= _KEPT:
                # Whole at once: other threads may add meanwhile.
                oldest, *_ = tuple(_tapes)
                _tapes.pop(oldest, None)
            _tapes[self.kind] = self

    def number(self, tensor: Tensor) -> int | None:
        """Which of the tensors this is; None for one that the tape does not know."""
        return next((i for i, x in enumerate(self.tensors) if x() is tensor), None)

    def play(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The call once more, on other tensors of the same layout."""
        tensors = list(inputs)
        pointers = [None if x is None else x.data_ptr() for x in tensors]
        for step in self.steps:
            if isinstance(step, Launch):
                step.again(tensors, pointers)
                for i in step.last:
                    tensors[i] = None
                continue
            tensor = torch.empty(step.shape, dtype=step.dtype, device=self.device)
            tensors.append(tensor if step.fill is None else tensor.fill_(step.fill))
            pointers.append(tensor.data_ptr())
        return tuple(tensors[i] for i in self.results)  # type: ignore[misc]


class NewTensor(NamedTuple):
    """An allocation."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float | None


class Launch:
    """One launch of a kernel: its arguments in the order of the signature, with gaps where tensors go."""

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], args: Sequence[Any], flags: dict[str, Any], handle: Any, tape: Tape
    ) -> None:
        names = kernel.arg_names
        self.grid = (*grid, 1, 1)[:3]
        self.values = [*args, *(flags[name] for name in names[len(args) :])]
        self.options = {name: value for name, value in flags.items() if name not in names}
        self.pointers: list[tuple[int, int]] = []
        self.views: list[tuple[int, int, Any]] = []
        self.complete = True
        # The tensors that no later launch reads.
        self.last: tuple[int, ...] = ()
        for i, value in enumerate(self.values):
            # Triton's descriptors and Gluon's.
            base = getattr(value, "base", value)
            if not isinstance(base, Tensor):
                continue
            number = tape.number(base)
            # A tensor that was made beside the tape cannot be made again.
            if number is None:
                self.complete = False
            elif base is value:
                self.pointers.append((i, number))
            else:
                self.views.append((i, number, _rebased(value, None)))
            self.values[i] = None
        self.kernel = kernel
        # What Triton compiled can be launched as it is, and takes pointers as plain numbers. The key of a tape fixes
        # all that a kernel is specialised on. Without it (in the interpreter) the kernel is called as the first time.
        self.handle = handle if isinstance(handle, triton.compiler.CompiledKernel) else None

    def again(self, tensors: Sequence[Tensor | None], pointers: Sequence[int | None]) -> None:
        """Launches with other tensors."""
        args = self.values.copy()
        for i, number, view in self.views:
            args[i] = _rebased(view, tensors[number])
        if self.handle is not None:
            for i, number in self.pointers:
                args[i] = pointers[number]
            self.handle[self.grid](*args)
        else:
            for i, number in self.pointers:
                args[i] = tensors[number]
            self.kernel[self.grid](*args, **self.options)


def _rebased(view: Any, base: Tensor | None) -> Any:
    """The same descriptor of another tensor, without the checks that it has passed."""
    other = object.__new__(type(view))
    other.__dict__.update(view.__dict__)
    other.base = base
    return other


def _kind(key: Hashable, inputs: Sequence[Tensor | None]) -> Hashable:
    return key, inputs[0].device, *map(_layout, inputs)  # type: ignore[union-attr]


def _layout(x: Tensor | None) -> Hashable:
    """What kernels may be specialised on in a tensor. A 16-byte boundary is what Triton asks of a pointer."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16)
