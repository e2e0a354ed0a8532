"""Every private part of torch that the library uses, in one place: what a new torch may move.

Nothing here changes what a public function of torch would do; there is no public one for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from datetime import timedelta
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
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


def below_autograd_function() -> AbstractContextManager[object]:
    """`below_autograd` inside a Function's forward, which has no grad mode: levels of torch.func below need theirs."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return below_autograd()
    levels = ExitStack()
    levels.enter_context(below_autograd())
    levels.enter_context(torch.enable_grad())
    levels.enter_context(forward_ad._set_fwd_grad_enabled(True))
    return levels


def apply_at_level(function: Any, *arguments: Any) -> Any:
    """`function.apply` from an op's Autograd key: transforms of torch.func have unwrapped to their level by then."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return function.apply(*arguments)
    from torch._functorch.utils import enable_single_level_autograd_function

    with enable_single_level_autograd_function():
        return super(torch.autograd.Function, function).apply(*arguments)


def is_watched() -> bool:
    """True inside a torch mode, a functorch transform or forward-mode differentiation: they have to see each call."""
    return (
        torch._C._len_torch_function_stack() > 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def outside_modes() -> AbstractContextManager[object]:
    """A context in which tensors are what they seem, inside `FakeTensorMode` and its kin too: for tables of our own,
    whose values are read."""
    from torch.utils._python_dispatch import _disable_current_modes

    mode: AbstractContextManager[object] = _disable_current_modes()
    return mode


def has_tangent(x: Tensor) -> bool:
    """True if x carries a forward-mode tangent."""
    if forward_ad._current_level < 0:
        return False
    while torch._C._functorch.is_batchedtensor(x):  # vmap has no rule for looking at a tangent
        x = torch._C._functorch.get_unwrapped(x)
    return forward_ad.unpack_dual(x).tangent is not None


def has_hooks(module: nn.Module) -> bool:
    """True if a call of the module calls something else too: hooks of its own, or of all modules."""
    own = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return bool(any(getattr(module, name) for name in own) or nn.modules.module._has_any_global_hook())


def is_jit_tracing() -> bool:
    """True inside `torch.jit.trace`, where sizes are tensors; `torch.jit.is_tracing` is not typed."""
    return torch._C._is_tracing()


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


def register_decomposition(op: Any, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Gives exporters what an op can be written out as; tracers, which only need shapes, keep taking `fake`.

    A fake tensor of symbolic sizes takes an op's decomposition for its shapes unless the op has a Python meta.
    """
    from torch import _decomp

    _decomp.register_decomposition(op, type="meta")(fake)
    _decomp.register_decomposition(op)(function)


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


def forget_meshes() -> None:
    """Empties DTensor's caches of sharding rules, whose entries hold meshes, and these their process groups.

    A gloo group that outlives `destroy_process_group` this way still runs threads when the interpreter is gone, and
    may abort the process.
    """
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import _collective_utils, _redistribute, debug

        for owner, names in (
            (debug, ["_clear_sharding_prop_cache"]),
            (_redistribute, ["clear_redistribute_planner_cache", "_gen_transform_infos.cache_clear"]),
            (_collective_utils, ["MeshTopoInfo.build_from_mesh.cache_clear"]),
        ):
            for name in names:
                with suppress(AttributeError):  # older versions have fewer caches
                    attrgetter(name)(owner)()


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
