"""Every private part of torch that the library uses, in one place: what a new torch may move.

Nothing here changes what a public function of torch would do; there is no public one for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
except ImportError:  # another torch names them otherwise: tests/memory/test_pool_compile.py shows if pools mind
    set_code_exec_strategy = None  # type: ignore[assignment]

F = TypeVar("F", bound=Callable[..., Any])
_Made = TypeVar("_Made")
if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store as Store
    from torch.distributed import ProcessGroup, Work


def below_autograd() -> AbstractContextManager[None]:
    """A context in which ops skip their Autograd key: what an op's own `autograd.Function` calls it in."""
    return torch._C._AutoDispatchBelowAutograd()


def is_watched() -> bool:
    """True inside a torch mode, a functorch transform or forward-mode differentiation: they have to see each call."""
    return (
        torch._C._len_torch_function_stack() > 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def has_tangent(x: Tensor) -> bool:
    """True if x carries a forward-mode tangent."""
    if forward_ad._current_level < 0:
        return False
    while torch._C._functorch.is_batchedtensor(x):  # vmap has no rule for looking at a tangent
        x = torch._C._functorch.get_unwrapped(x)
    return forward_ad.unpack_dual(x).tangent is not None


def is_fake(x: Tensor) -> bool:
    """True for a tensor of a tracer, which has no values to read."""
    return isinstance(x, torch._subclasses.FakeTensor)


def check_in_graph(holds: Tensor, message: str) -> None:
    """A check of a bool scalar that a traced graph makes each time it runs: it raises RuntimeError."""
    torch._assert_async(holds, message)


def called_beside(x: Tensor, function: Callable[[], _Made]) -> _Made:
    """What a function returns; where x is fake, the tensors that it makes are fake too."""
    if torch.compiler.is_compiling() or not is_fake(x):
        return function()
    with x.fake_mode:  # type: ignore[attr-defined]
        return function()


def has_amx() -> bool:
    """True if this CPU multiplies half-precision matrices in hardware."""
    return torch.cpu._is_amx_tile_supported()


def uncompiled(function: F) -> F:
    """Keeps `torch.compile` out of a function, as `torch.compiler.disable` does, without importing Dynamo.

    That import more than doubles the time of importing the package. A decorator for what Dynamo cannot trace: locks,
    weak references, threads, memory-mapped files. Inside compiled code the function runs as it stands, with everything
    that it calls.
    """
    marked: Any = function
    marked._torchdynamo_disable = True  # its callers do not inline it
    marked._torchdynamo_disable_msg = "it lends memory or runs threads"
    if set_code_exec_strategy is not None:  # neither its frame nor those below are traced
        set_code_exec_strategy(marked.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return function


# torch.distributed is imported when one of these is called: the package works without it.


def process_group(name: str) -> ProcessGroup:
    """The process group of a name: an op cannot take the group itself."""
    from torch._C import _distributed_c10d

    known: Any = name  # newer stubs have a type of its own for it
    group: ProcessGroup = _distributed_c10d._resolve_process_group(known)
    return group


def group_timeout(group: ProcessGroup) -> timedelta:
    """How long a group's collectives wait: what `init_process_group` or `new_group` was given, or torch's default."""
    from torch.distributed.distributed_c10d import default_pg_timeout

    options = (getattr(group._get_backend(device), "options", None) for device in group._device_types)
    return min((x._timeout for x in options if x is not None), default=default_pg_timeout)


def group_store(group: ProcessGroup) -> Store:
    """The store that a group met in, on a connection of its own where the store allows it."""
    from torch.distributed import distributed_c10d

    store: Any = distributed_c10d._world.pg_map[group][1]
    # A wait holds the connection, which others (NCCL's watchdog) share.
    with suppress(Exception):
        store = store.clone()
    return store  # type: ignore[no-any-return]


# The group's own methods, which are what torch.distributed's functions call: only they take a timeout.


def all_to_all(
    group: ProcessGroup, result: Tensor, send: Tensor, incoming: list[int], outgoing: list[int], timeout: timedelta
) -> Work:
    """Starts an all-to-all of uneven parts of the first dimension."""
    from torch._C._distributed_c10d import AllToAllOptions

    options = AllToAllOptions()
    options.timeout, options.asyncOp = timeout, True
    return group.alltoall_base(result, send, incoming, outgoing, options)


def all_gather(group: ProcessGroup, result: Tensor, send: Tensor, timeout: timedelta) -> Work:
    """Starts an all-gather of equally many elements per rank."""
    from torch._C._distributed_c10d import AllgatherOptions

    options = AllgatherOptions()
    options.timeout, options.asyncOp = timeout, True
    return group._allgather_base(result, send, options)


def broadcast(group: ProcessGroup, x: Tensor, timeout: timedelta) -> Work:
    """Starts a broadcast of the first rank's tensor into everybody's."""
    from torch._C._distributed_c10d import BroadcastOptions

    options = BroadcastOptions()
    options.rootRank, options.rootTensor, options.timeout, options.asyncOp = 0, 0, timeout, True
    return group.broadcast([x], options)
