"""What `torch.compile` leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

try:
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
except ImportError:  # a torch that names them otherwise: tests/memory/test_pool_compile.py tells what it makes of pools
    set_code_exec_strategy = None  # type: ignore[assignment]

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """What `torch.compiler.disable` does, which itself imports Dynamo and so more than doubles the time of an import.

    A decorator for what Dynamo cannot trace: locks, weak references, threads, memory-mapped files. The function runs as
    it stands inside compiled code, with everything that it calls.
    """
    marked: Any = function
    marked._torchdynamo_disable = True  # its callers do not inline it
    marked._torchdynamo_disable_msg = "it lends memory or runs threads"
    if set_code_exec_strategy is not None:  # neither its frame nor those below are traced
        set_code_exec_strategy(marked.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return function
