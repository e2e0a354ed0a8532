"""Runs Gluon kernels for Hopper on a CPU: what Triton's interpreter is to Triton kernels, as far as ours need it.

The kernels' own Python runs, with stand-ins for what they import. Partitions are threads. Barriers have phases,
arrivals and bytes that wait. Shared memory starts as NaN. The copy engine copies boxes and fills up with zeros. A
product is computed when it is waited for. So memory given back too early shows as a wrong result, and a missing arrival
as a deadlock. Layouts mean nothing here, and neither do speed, registers and the memory model.
"""

from __future__ import annotations

import ast
import inspect
import math
import threading
import types
from contextlib import contextmanager

import torch
from triton.experimental.gluon import language as real_gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper as real_hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy as real_async_copy
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

DEADLOCK = 20.0  # seconds without an arrival


class Shared:
    """Shared memory, or a part of it; as a barrier one element is a `Barrier`."""

    def __init__(self, data):
        self.data = data

    @property
    def shape(self):
        return self.data.shape

    @property
    def dtype(self):
        return self.data.dtype

    def index(self, i):
        return Shared(self.data[int(i)])

    def _reinterpret(self, dtype, shape, layout):
        return Shared(self.data.view(shape))

    def slice(self, start, length, dim):
        return Shared(self.data.narrow(dim, start, length))

    def permute(self, order):
        return Shared(self.data.permute(*order))

    def load(self, layout):
        return self.data.clone()

    def store(self, value):
        self.data.copy_(value)


class Barrier:
    def __init__(self):
        self.phase, self.count, self.pending, self.bytes = 0, 0, 0, 0


class Block:
    """The barrier's lock of one program, and what each of its partitions has in flight."""

    def __init__(self, pid, programs):
        self.pid, self.programs = pid, programs
        self.changed = threading.Condition()
        self.failed = None


class Token:
    def __init__(self, compute):
        self.compute, self.value = compute, None


_here = threading.local()
_atomics = threading.Lock()


class Number(int):
    """An int32 scalar of a kernel, `Wide` an int64; as immutable as a kernel's values are."""

    bits = 32

    def __new__(cls, value):
        assert -(1 << cls.bits - 1) <= value < 1 << cls.bits - 1, f"{int(value)} needs more than {cls.bits} bits"
        return super().__new__(cls, value)

    def to(self, dtype):
        return (
            torch.tensor(float(self)) if dtype.is_floating_point else (Wide if dtype == torch.int64 else Number)(self)
        )


class Wide(Number):
    bits = 64


def _closed(name):
    def operate(self, other):
        result = getattr(int, name)(self, other)
        if result is NotImplemented:
            return result
        if name == "__floordiv__" and (self < 0) != (other < 0):
            result = -(abs(int(self)) // abs(int(other)))  # towards zero
        elif name == "__mod__" and self < 0:
            result = -(abs(int(self)) % abs(int(other)))
        return (Wide if Wide in (type(self), type(other)) else Number)(result)

    return operate


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift"):
    setattr(Number, f"__{_name}__", _closed(f"__{_name}__"))
    setattr(Number, f"__r{_name}__", _closed(f"__r{_name}__"))


def value_of(x):
    return x.value if isinstance(x, Token) else x


# Barriers.


def _init(bar, count):
    bar.data[0].count = bar.data[0].pending = count


def _turn(bar):
    if bar.pending == 0 and bar.bytes == 0:
        bar.phase ^= 1
        bar.pending = bar.count
        _here.block.changed.notify_all()


def _arrive(bar, *, count=1, pred=True):
    if not pred:
        return
    with _here.block.changed:
        bar.data[0].pending -= count
        assert bar.data[0].pending >= 0, "more arrivals than a barrier counts"
        _turn(bar.data[0])


def _expect(bar, size, pred=True):
    if not pred:
        return
    with _here.block.changed:
        bar.data[0].bytes += int(size)
        bar.data[0].pending -= 1
        assert bar.data[0].pending >= 0, "more arrivals than a barrier counts"
        _turn(bar.data[0])


def _wait(bar, phase, pred=True, deps=()):
    block = _here.block
    with block.changed:
        passed = block.changed.wait_for(lambda: block.failed or bar.data[0].phase != int(phase), DEADLOCK)
    if block.failed:
        raise RuntimeError("another partition failed")
    if not passed:
        raise RuntimeError(f"deadlock: a barrier of {bar.data[0].count} waits for {bar.data[0].pending} arrivals")


class Descriptor:
    """What a kernel sees of a host's descriptor."""

    def __init__(self, host):
        self.host, self.layout, self.dtype, self.block_shape = host, host.layout, host.base.dtype, host.block_shape
        self.block_type = types.SimpleNamespace(
            nbytes=math.prod(host.block_shape) * host.base.element_size(), shape=host.block_shape
        )


def _copy(descriptor, at, bar, to, pred=True):
    host = descriptor.host
    at = [int(x) for x in at]
    box = torch.zeros(host.block_shape, dtype=host.base.dtype)
    size = [max(0, min(b, n - a)) for a, b, n in zip(at, host.block_shape, host.shape, strict=True)]
    assert min(at) >= 0
    if 0 not in size:
        start = host.base.storage_offset() + sum(a * s for a, s in zip(at, host.strides, strict=True))
        box[tuple(slice(n) for n in size)] = torch.as_strided(host.base, size, host.strides, start)
    with _here.block.changed:
        to.data.copy_(box.view(to.data.shape))
        bar.data[0].bytes -= descriptor.block_type.nbytes
        _turn(bar.data[0])


# Products.


def _operand(x):
    return (x.data if isinstance(x, Shared) else value_of(x)).float()


def _mma(a, b, acc, *, use_acc=True, is_async=False, precision=None):
    def compute():
        product = _operand(a) @ _operand(b)
        return product + value_of(acc) if use_acc else product

    if not is_async:
        return compute()
    token = Token(compute)
    _here.flight.append(token)
    return token


def _mma_wait(num_outstanding=0, deps=()):
    while len(_here.flight) > num_outstanding:
        token = _here.flight.pop(0)
        token.value = token.compute()
    results = tuple(x if isinstance(x, Token) and x.value is None else value_of(x) for x in deps)
    return results[0] if len(results) == 1 else results


# Memory.


class Pointer:
    def __init__(self, tensor, offset=0):
        self.tensor, self.offset = tensor, offset
        self.dtype = types.SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, other):
        return Pointer(self.tensor, self.offset + other)

    def places(self):
        offset = torch.as_tensor(self.offset).long() + self.tensor.storage_offset()
        size = self.tensor.untyped_storage().nbytes() // self.tensor.element_size()
        return torch.as_strided(self.tensor, (size,), (1,), 0), offset


def _load(pointer, mask=None, other=None):
    data, at = pointer.places()
    if mask is None:
        return data[at]
    mask = torch.as_tensor(mask)
    at, mask = torch.broadcast_tensors(at, mask)
    return torch.where(mask, data[torch.where(mask, at, 0)], 0.0 if other is None else other)


def _store(pointer, value, mask=None):
    data, at = pointer.places()
    at, value = torch.broadcast_tensors(at, torch.as_tensor(value, dtype=data.dtype))
    if mask is not None:
        mask = torch.as_tensor(mask).expand(at.shape)
        at, value = at[mask], value[mask]
    data[at] = value


def _atomic_add(pointer, value, sem=None):
    data, at = pointer.places()
    with _atomics:
        before = int(data[at])
        data[at] = before + value
    return Number(before)


def _allocate(dtype, shape, layout):
    if isinstance(layout, str):  # of barriers
        return Shared([[Barrier()] for _ in range(shape[0])])
    unset = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max
    return Shared(torch.full(tuple(int(n) for n in shape), unset, dtype=dtype))


def _specialize(partitions, warps, registers):
    block = _here.block

    def run(function, args):
        _here.block, _here.flight = block, []
        try:
            function(*args)
            assert not _here.flight, "products that nobody waited for"
        except BaseException as error:
            with block.changed:
                block.failed = block.failed or error
                block.changed.notify_all()

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if block.failed:
        raise block.failed


def _elementwise(function, of_numbers=None):
    def apply(*args):
        if of_numbers is not None and all(isinstance(x, int | float) for x in args):
            return of_numbers(*args)
        return function(*(torch.as_tensor(x) for x in args))

    return apply


def _pick(condition, a, b):
    if not any(isinstance(x, torch.Tensor) and x.ndim for x in (condition, a, b)):
        chosen = a if condition else b
        return Number(chosen) if isinstance(chosen, int) and not isinstance(chosen, Number) else chosen
    return torch.where(torch.as_tensor(condition), a, b)


def _max(x, axis):
    found = x.amax(axis)
    return found if found.ndim or found.is_floating_point() else Number(int(found))


def _loop(*bounds):
    return map(Number, range(*(int(x) for x in bounds)))


def _filled(shape, value, dtype, layout=None):
    return torch.full([int(n) for n in shape], value, dtype=dtype)


_LANGUAGE = types.SimpleNamespace(
    bfloat16=torch.bfloat16, float16=torch.float16, float32=torch.float32, int32=torch.int32, int64=torch.int64,
    constexpr=lambda x: x, static_range=range, to_tensor=lambda x: Number(x) if isinstance(x, int) else x,
    program_id=lambda axis: Number(_here.block.pid), num_programs=lambda axis: Number(_here.block.programs),
    where=_pick, minimum=_elementwise(torch.minimum, min), maximum=_elementwise(torch.maximum, max),
    exp2=_elementwise(torch.exp2), log2=_elementwise(torch.log2), cdiv=lambda a, b: (a + b - 1) // b,
    max=_max, sum=lambda x, axis: x.sum(axis), expand_dims=torch.unsqueeze,
    arange=lambda a, b, layout=None: torch.arange(a, b, dtype=torch.int32), full=_filled,
    zeros=lambda shape, dtype, layout=None: _filled(shape, 0, dtype), convert_layout=lambda x, layout: x,
    # All that is written in assembly, in `rescale.py`, is a product.
    inline_asm_elementwise=lambda _asm, _constraints, args, *_, **__: args[0] * args[1],
    broadcast=torch.broadcast_tensors,
    load=_load, store=_store, atomic_add=_atomic_add, allocate_shared_memory=_allocate, warp_specialize=_specialize,
    NVMMASharedLayout=types.SimpleNamespace(get_default_for=lambda *_: None), NVMMADistributedLayout=lambda **_: None,
    DotOperandLayout=lambda *_, **__: None, SliceLayout=lambda *_: None, BlockedLayout=lambda *_: None,
    SwizzledSharedLayout=lambda *_: None,
)  # fmt: skip
_BARRIERS = types.SimpleNamespace(
    init=_init, wait=_wait, arrive=_arrive, expect=_expect, MBarrierLayout=lambda: "barrier"
)
_COPIES = types.SimpleNamespace(async_copy_global_to_shared=_copy)
# A copy's arrival, of each thread of a warpgroup; there are no copies.
_ARRIVALS = types.SimpleNamespace(mbarrier_arrive=lambda bar, increment_count: _arrive(bar, count=128))
_STAND_INS = {
    id(real_gl): _LANGUAGE, id(real_hopper.mbarrier): _BARRIERS, id(real_hopper.tma): _COPIES,
    id(real_async_copy): _ARRIVALS,
    id(real_hopper.fence_async_shared): lambda: None, id(real_hopper.warpgroup_mma): _mma,
    id(real_hopper.warpgroup_mma_wait): _mma_wait, id(real_hopper.warpgroup_mma_init): lambda x: x,
}  # fmt: skip
_namespaces: dict = {}
_reading = threading.RLock()


def plain(kernel):
    """A `gluon.jit` function as a Python function."""
    home = kernel.fn.__globals__
    with _reading:
        if id(home) not in _namespaces:
            _read(home)
    return _namespaces[id(home)][kernel.fn.__name__]


def _read(home):
    """Reads the functions of a module."""
    space = _namespaces[id(home)] = {"range": _loop, "__builtins__": __builtins__}
    for name, value in list(home.items()):
        if isinstance(value, GluonJITFunction) and value.fn.__globals__ is home:
            # A kernel's values are immutable: `x += y` binds x anew, where a tensor would change in all places.
            tree = ast.fix_missing_locations(_NoAugment().visit(ast.parse(value.src)))
            ast.increment_lineno(tree, value.starting_line_number - 1)
            exec(compile(tree, inspect.getsourcefile(value.fn), "exec"), space)
        elif name not in space:
            space[name] = _stand_in(value)


class _NoAugment(ast.NodeTransformer):
    def visit_AugAssign(self, node):
        target = ast.Name(node.target.id, ast.Load())
        return ast.Assign([node.target], ast.BinOp(target, node.op, node.value))


def _stand_in(value):
    """What a kernel's name stands for here; a module of kernels becomes one of Python functions."""
    value = _STAND_INS.get(id(value), value)
    if isinstance(value, GluonJITFunction):
        return plain(value)
    if isinstance(value, types.ModuleType) and value.__name__.startswith("dilated"):
        return Module(value)
    return value.value if isinstance(value, real_gl.constexpr) else value


class Module:
    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        return _stand_in(getattr(self.module, name))


def _argument(x):
    if isinstance(x, TensorDescriptor):
        return Descriptor(x)
    if isinstance(x, torch.Tensor):
        return Pointer(x)
    if isinstance(x, tuple):  # Strides keep their names
        return type(x)(*map(_argument, x)) if hasattr(x, "_fields") else tuple(map(_argument, x))
    return Number(x) if isinstance(x, int) and not isinstance(x, bool) else x


def run(kernel, *args, grid, warmup=False, **options):
    """In place of `GluonJITFunction.run`."""
    names = list(inspect.signature(kernel.fn).parameters)
    args = [*map(_argument, args), *(options[name] for name in names[len(args) :] if name in options)]
    constants = {name: options.get(name, 4) for name in ("num_warps",) if name in names[len(args) :]}
    for pid in range(grid[0]):
        _here.block, _here.flight = Block(pid, grid[0]), []
        plain(kernel)(*args, **constants)


@contextmanager
def emulating():
    """Lets every launch of a Gluon kernel run here."""
    before = GluonJITFunction.__dict__.get("run")
    GluonJITFunction.run = run
    try:
        yield
    finally:
        if before is None:
            del GluonJITFunction.run
        else:
            GluonJITFunction.run = before
