"""Checks of what users pass: each error names the argument, what was expected and what came."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.core import torch_private
from dilated_attention_pytorch.core.messages import listed as listed  # beside the checks, for those who use both
from dilated_attention_pytorch.core.messages import quoted as quoted
from dilated_attention_pytorch.core.messages import shown as shown
from dilated_attention_pytorch.core.precision import accumulator
from dilated_attention_pytorch.types import QKV, Masks

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# 2^16, and 2^45 for fp64: beyond, a logit of q . k = 1 is rounded by more than 1%, and exponentials of fp32 kernels can
# overflow.
_LARGEST_SCALE = {dtype: 2**-7 / torch.finfo(accumulator(dtype)).eps for dtype in FLOAT_DTYPES}
INT_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_choice(name: str, value: Any, options: Any) -> Any:
    """One of the strings of the Literal `options`."""
    allowed = get_args(options)
    if not isinstance(value, str) or value not in allowed:
        got = quoted(value) if isinstance(value, str) else shown(value)
        raise ValueError(f"expected {name} to be one of {list(allowed)}, got {got}")
    return value if type(value) is str else allowed[allowed.index(value)]


def check_int(name: str, value: object, minimum: int, below: int = 2**63) -> int:
    """The value as an int of 64 bits; bools and floats are refused."""
    # A plain or traced int is kept as it is; other integer types (NumPy's) become one.
    is_int = isinstance(value, int | torch.SymInt) and not isinstance(value, bool)
    number: Any = value if is_int else _index(name, value)
    if number < minimum:
        raise ValueError(f"expected {name} to be at least {minimum}, got {quoted(number)}")
    if number >= below:
        limit = "2**63" if below == 2**63 else below
        raise ValueError(f"expected {name} to be below {limit}, got {quoted(number)}")
    return number if type(number) in (int, torch.SymInt) else int(number)


def _index(name: str, value: object) -> int:
    if not isinstance(value, (bool, Tensor)) and hasattr(type(value), "__index__"):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except Exception:  # an array of several, of floats or of objects
            pass
    raise TypeError(f"expected {name} to be an int, got {shown(value)}")


def check_bool(name: str, value: object) -> bool:
    """True or False, and nothing that merely equals them."""
    if not isinstance(value, bool):
        raise TypeError(f"expected {name} to be a bool, got {shown(value)}")
    return value


def check_instance(name: str, value: object, *kinds: type) -> None:
    """An object of one of these classes."""
    if not isinstance(value, kinds):
        raise TypeError(f"expected {name} to be of {' or '.join(x.__name__ for x in kinds)}, got {shown(value)}")


def check_device(name: str, value: object) -> torch.device:
    """Parse a str or torch.device; does not check that the device exists."""
    if not isinstance(value, (str, torch.device)):
        raise TypeError(f"expected {name} to be a str or torch.device, got {shown(value)}")
    try:
        return torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"expected {name} to name a device, as 'cpu' or 'cuda:0' do, got {quoted(value)}") from error


def check_factory(device: object, dtype: object) -> None:
    """Where parameters are made, and in which dtype; None for torch's defaults."""
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in FLOAT_DTYPES):
        raise TypeError(f"expected dtype to be float16, bfloat16, float32 or float64, got {shown(dtype)}")
    if device is None:
        return
    if isinstance(device, bool) or not isinstance(device, int):
        device = check_device("device", device)
    try:
        torch.empty(0, device=device)
    except Exception as error:  # of several types, with advice on torch's build
        raise ValueError(f"expected device to be one that is there, got {quoted(device)}") from error


def check_float(name: str, value: object) -> float:
    """A finite number, as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected {name} to be a float, got {shown(value)}")
    if not abs(value) <= sys.float_info.max:  # NaN is not, either
        raise ValueError(f"expected {name} to be finite, got {quoted(value)}")
    return float(value)


def check_above_zero(name: str, value: object) -> float:
    """A finite number above 0, as a float."""
    number = check_float(name, value)
    if number <= 0.0:
        raise ValueError(f"expected {name} above 0, got {quoted(value)}")
    return number


def check_scale(scale: object, head_dim: int, dtype: torch.dtype | None = None) -> float:
    """The factor on q . k, `head_dim ** -0.5` for None; with a dtype, small enough that logits keep a meaning in it."""
    if scale is None:
        root: float = float(head_dim) ** -0.5
        return root
    number = check_float("scale", scale)
    if dtype is not None and abs(number) > _LARGEST_SCALE[dtype]:
        raise ValueError(
            f"expected scale between -{_LARGEST_SCALE[dtype]:.0f} and {_LARGEST_SCALE[dtype]:.0f} for {dtype}, beyond "
            f"which rounding decides the weights, got {quoted(scale)}"
        )
    return number


def check_seed(seed: object) -> None:
    """Raises unless the seed is None, a 64-bit int or an integer scalar tensor."""
    if isinstance(seed, Tensor):
        check_dense("seed", seed)
        if seed.dtype not in INT_DTYPES or seed.numel() != 1:
            raise TypeError(
                f"expected seed to be an int or an integer scalar tensor, got {seed.dtype} {tuple(seed.shape)}"
            )
    elif seed is not None:
        check_int("seed", seed, -(2**63))


def check_positive_int(name: str, value: object) -> int:
    """An int of at least 1."""
    return check_int(name, value, 1)


def check_index(name: str, value: object, size: int) -> int:
    """An int in [0, size)."""
    number = check_int(name, value, 0)
    if number >= size:
        raise ValueError(f"expected {name} in [0, {size}), got {quoted(number)}")
    return number


def check_width(name: str, value: object) -> int:
    """The width of a layer: an int of at least 1, and no more than memory has room for."""
    return check_int(name, value, 1, 1 << 24)


def check_depth(name: str, value: object) -> int:
    """A number of layers: an int of at least 1, and no more than can be made."""
    return check_int(name, value, 1, 1 << 16)


def check_positive_ints(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """A non-empty sequence of ints of at least 1."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"expected {name} to be a sequence of ints, got {shown(values)}")
    if len(values) == 0:
        raise ValueError(f"expected {name} to hold at least one branch, got an empty sequence")
    return tuple(check_positive_int(f"{name}[{i}]", v) for i, v in enumerate(values))


def check_int_range(name: str, value: object) -> tuple[int, int]:
    """Two ints `(start, stop)`, neither below 0."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"expected {name} to be a tuple (start, stop), got {shown(value)}")
    return check_int(f"{name}[0]", value[0], 0), check_int(f"{name}[1]", value[1], 0)


def check_probability(name: str, value: float) -> float:
    """A float in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected {name} to be a float, got {shown(value)}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"expected {name} in [0, 1), got {quoted(value)}")
    return float(value)


def check_dense(name: str, x: Any) -> None:
    """A tensor of numbers at strides; sparse, nested and mkldnn ones have no pointer, some of them no shape."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected {name} to be a Tensor, got {type(x).__name__}")
    is_nested = False  # while compiling, one says so by its layout
    if not torch.compiler.is_compiling():
        is_nested = x.is_nested
        if torch_private.is_jit_tracing():
            raise NotImplementedError(
                f"expected no torch.jit.trace, got {name} of one: it would keep the example's lengths; use "
                "torch.export.export, torch.compile or torch.onnx.export(dynamo=True)"
            )
    if x.layout != torch.strided or is_nested or x.is_quantized:
        instead = "pack its sequences with cu_seqlens" if is_nested or x.layout == torch.jagged else "call to_dense()"
        instead = "call dequantize()" if x.is_quantized else instead
        got = "a nested one" if is_nested else "a quantized one" if x.is_quantized else x.layout
        raise TypeError(f"expected {name} to be a dense tensor, got {got}; {instead}")


def check_values(name: str, x: Any, beside: Tensor | None = None) -> None:
    """A dense tensor whose values can be looked at: no meta and no fake one, unless it stands beside another one."""
    check_dense(name, x)
    if _has_no_values(x) and (beside is None or not _has_no_values(beside)):
        raise TypeError(f"expected {name} with values to look at, got a {'meta' if x.is_meta else 'fake'} tensor")


def _has_no_values(x: Tensor) -> bool:
    return x.is_meta or (not torch.compiler.is_compiling() and torch_private.is_fake(x))


def check_readable(name: str, x: Tensor, device: torch.device) -> None:
    """On the device, or on a CPU from which it can be brought there."""
    if x.device != device and x.device.type != "cpu":
        raise ValueError(f"expected {name} on q's device {device} or on the CPU, got {x.device}")


def _is_usual(x: Tensor) -> bool:
    return type(x) is Tensor and not x.is_inference()


def check_all_or_none_fake(first: Tensor, others: Mapping[str, object]) -> None:
    """Fake tensors, which have no values, come only with others of their kind."""
    if torch.compiler.is_compiling():
        return
    for name, x in others.items():
        if isinstance(x, Tensor) and torch_private.is_fake(x) != torch_private.is_fake(first):
            raise TypeError(f"expected {name} to be a fake tensor like all others or none, got {type(x).__name__}")


def check_savable(named: Mapping[str, Tensor], *others: Tensor) -> None:
    """None made in inference mode where any or another requires a gradient: autograd keeps them for the backward."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if any(x.requires_grad for x in (*named.values(), *others)):
        for name, x in named.items():
            if x.is_inference():
                raise ValueError(
                    f"expected {name} made outside inference mode where a gradient is wanted; clone it outside"
                )


def check_multiplicand(name: str, x: Any, *modules: nn.Module) -> None:
    """A dense tensor of the device and dtype of the weights that plain modules multiply it by.

    Modules of other classes, or with hooks, may bring the tensor there themselves: adapters, FSDP, offloading.
    """
    check_dense(name, x)
    if torch.compiler.is_compiling():
        return
    weight = modules[0]._parameters.get("weight")
    if weight is None or (x.dtype == weight.dtype and x.device == weight.device and _is_usual(x)):
        return  # the common case, once per layer: it costs a microsecond
    if _are_plain(modules):
        check_beside(name, x, weight)
        if x.dtype != weight.dtype and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
            raise TypeError(f"expected {name} of the parameters' dtype {weight.dtype}, got {x.dtype}")


def check_looked_up(name: str, x: Any, embedding: nn.Module) -> None:
    """A dense tensor on the device of the table that it looks up."""
    check_dense(name, x)
    if _are_plain((embedding,)):
        check_beside(name, x, embedding.weight)  # type: ignore[arg-type]


def check_beside(name: str, x: Tensor, parameter: Tensor) -> None:
    """A tensor on a parameter's device, not fake beside a real one, nor of inference mode beside one that learns."""
    if x.device != parameter.device:
        raise ValueError(f"expected {name} on the model's device {parameter.device}, got {x.device}")
    if not torch.compiler.is_compiling() and not torch_private.is_watched():
        check_all_or_none_fake(parameter, {name: x})
        check_savable({name: x}, parameter)


def _are_plain(modules: Sequence[nn.Module]) -> bool:
    """Whether modules compute what their classes say, of what they are given; never said while compiling."""
    if torch.compiler.is_compiling() or torch_private.is_watched():
        return False
    return all(
        type(module) in (nn.Linear, nn.LayerNorm, nn.Embedding)
        and type(module.weight) is nn.Parameter
        and not module._forward_pre_hooks
        and "forward" not in vars(module)
        for module in modules
    )


def check_qkv(inputs: QKV, *, packed: bool = False) -> QKV:
    """Three tensors whose ranks, dtypes, devices and sizes agree."""
    q, k, v = inputs
    layout = "(total, H, D)" if packed else "(B, N, H, D)"
    rank = 3 if packed else 4
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_dense(name, x)
        if x.dim() != rank:
            raise ValueError(f"expected {name} of shape {layout}, got {x.dim()} dimensions {tuple(x.shape)}")
        if x.dtype not in FLOAT_DTYPES:
            raise TypeError(f"expected {name} to be float16, bfloat16, float32 or float64, got {x.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"expected {name} to have q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"expected {name} on q's device {q.device}, got {x.device}")
    if k.shape != v.shape:
        raise ValueError(f"expected k and v of one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if not packed and k.shape[0] != q.shape[0]:
        raise ValueError(f"expected q and k of one batch size, got {q.shape[0]} and {k.shape[0]}")
    if packed and k.shape[0] != q.shape[0]:
        raise ValueError(f"expected packed q and k of one total length, got {q.shape[0]} and {k.shape[0]}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"expected q and k of one head_dim, got {q.shape[-1]} and {k.shape[-1]}")
    if q.shape[-1] == 0 or k.shape[-2] == 0 or q.shape[-2] == 0:
        raise ValueError(f"expected at least one head and head_dim >= 1, got q {tuple(q.shape)}, k {tuple(k.shape)}")
    if q.shape[-2] % k.shape[-2] != 0:
        raise ValueError(
            f"expected q's heads to be a multiple of k's, got {q.shape[-2]} query and {k.shape[-2]} key heads"
        )
    return inputs


def check_range(x: QKV, q_start: object, k_start: object, seq_len: object) -> tuple[int, int, int]:
    """The positions of the first query and key, and N; by default the later end of the two ranges."""
    q_start, k_start = check_int("q_start", q_start, 0), check_int("k_start", k_start, 0)
    q_end, k_end = q_start + x.q.shape[1], k_start + x.k.shape[1]
    end = max(q_end, k_end)
    if (q_start or k_start) and end >= 2**63:
        raise ValueError(
            f"expected q_start and k_start to leave every position below 2**63, got {q_start} with {x.q.shape[1]} "
            f"queries and {k_start} with {x.k.shape[1]} keys"
        )
    if seq_len is None:
        return q_start, k_start, end
    seq_len = check_int("seq_len", seq_len, 0)
    if seq_len < end:
        raise ValueError(
            f"expected seq_len of at least {end}, where queries [{q_start}, {q_end}) and keys [{k_start}, {k_end}) "
            f"end, got {seq_len}"
        )
    return q_start, k_start, seq_len


def check_packed_alone(masks: Masks, q_start: object, k_start: object, seq_len: object) -> None:
    """Raises where packed sequences come with what describes padded or partial ones."""
    starts = check_int("q_start", q_start, 0), check_int("k_start", k_start, 0)
    if any(x is not None for x in (masks.key_padding, masks.row_start, seq_len)) or any(starts):
        raise ValueError(
            "expected cu_seqlens alone: key_padding_mask, row_start, q_start, k_start and seq_len describe "
            "padded or partial sequences, packed ones are whole and have no padding"
        )


def check_masks(masks: Masks, q: Tensor, seq_len: int) -> None:
    """Masks of padded sequences fit q `(B, Nq, H, D)` and N."""
    if masks.key_padding is not None:
        check_key_padding_mask(masks.key_padding, q.shape[0], seq_len, q.device)
    if masks.row_start is not None:
        check_row_start(masks.row_start, q.shape[0])
        check_readable("row_start", masks.row_start, q.device)
    if masks.cu_seqlens is not None:
        check_readable("cu_seqlens", masks.cu_seqlens, q.device)
    if isinstance(masks.seed, Tensor):
        check_readable("seed", masks.seed, q.device)
    if any(x is not None for x in masks):
        check_all_or_none_fake(
            q,
            {"key_padding_mask": masks.key_padding, "row_start": masks.row_start, "cu_seqlens": masks.cu_seqlens,
             "seed": masks.seed},
        )  # fmt: skip


def check_key_padding_mask(mask: Tensor, batch: int, seq_len: int, device: torch.device) -> None:
    """A bool (B, N) mask over the whole sequence, True = real."""
    check_dense("key_padding_mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"expected key_padding_mask of dtype torch.bool (True = real), got {mask.dtype}")
    if tuple(mask.shape) != (batch, seq_len):
        raise ValueError(f"expected key_padding_mask of shape (B, N) = {(batch, seq_len)}, got {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"expected key_padding_mask on q's device {device}, got {mask.device}")


def check_row_start(row_start: Tensor, batch: int) -> None:
    """Shape and dtype; the values are checked by `check_row_start_values` where they may be read."""
    check_dense("row_start", row_start)
    if row_start.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"expected row_start of dtype int32 or int64, got {row_start.dtype}")
    if tuple(row_start.shape) != (batch,):
        raise ValueError(f"expected row_start of shape (B,) = {(batch,)}, got {tuple(row_start.shape)}")


def check_row_start_values(row_start: Tensor) -> None:
    """None below 0; on a GPU they are not read, which would make the host wait."""
    if not row_start.is_cuda and not row_start.is_meta:
        for i, first in enumerate(row_start.tolist()):
            if first < 0:
                raise ValueError(f"expected row_start of at least 0, got {first} at index {i}")


def check_cu_seqlens(cu_seqlens: Tensor) -> None:
    """Shape and dtype; the values are checked by `check_cu_seqlens_values` where they may be read."""
    check_dense("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"expected cu_seqlens of dtype int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"expected cu_seqlens of shape (num_sequences + 1,), got {tuple(cu_seqlens.shape)}")


def check_cu_seqlens_values(bounds: list[int], total: int) -> None:
    """Starts at 0, never falls, ends at the packed length."""
    if bounds[0] != 0 or bounds[-1] != total:
        raise ValueError(f"expected cu_seqlens to run from 0 to {total}, got {bounds[0]} to {bounds[-1]}")
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        if b < a:
            raise ValueError(f"expected cu_seqlens to be non-decreasing, got {a} then {b} at index {i + 1}")
