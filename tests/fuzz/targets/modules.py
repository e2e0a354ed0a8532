"""The modules and models: their construction, and their calls against a copy in fp64."""

from __future__ import annotations

import copy
import json
import operator
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from dilated_attention_pytorch import (
    DilatedAttention,
    LongNet,
    LongNetConfig,
    LongNetEncoder,
    LongNetLM,
    LongViT,
    LongViTConfig,
    MultiheadDilatedAttention,
    SlideEncoder,
    SlideEncoderConfig,
)
from fuzz.judge import Call
from fuzz.table import target
from fuzz.targets.attention import values_can_be_read
from fuzz.values import FLOATS, anything, dense, numbers, pick, sequences, spoiled, strided

_BRANCHES: dict[str, Any] = {"segment_lengths": [4, 8], "dilation_rates": [1, 2]}
_OPTIONS = ("backend", "gradient_checkpointing", "device", "dtype")


def spoil(draw: st.DrawFn, given: dict[str, Any], names: list[str]) -> None:
    """Puts something else in the place of the arguments named."""
    for name in names:
        value = given.get(name)
        if name in ("segment_lengths", "dilation_rates", "position_grid"):
            given[name] = draw(sequences())
        elif name == "dtype":
            given[name] = draw(st.one_of(st.sampled_from([*FLOATS, torch.int64, torch.complex64]), anything))
        elif name == "device":
            given[name] = draw(st.one_of(st.sampled_from(["meta", "cuda", "cuda:7", "cpu:0", "nowhere"]), anything))
        elif isinstance(value, Tensor):
            given[name] = draw(st.one_of(strided(value), spoiled(value)))
        else:
            given[name] = draw(st.one_of(numbers, numbers, anything))


def by_reference(model: nn.Module) -> nn.Module:
    """A copy that computes with the reference."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, DilatedAttention):
            module.backend = "reference"
    return other


def compare(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], got: tuple[Tensor | None, ...]) -> None:
    """What a model gave against its copy in fp64."""
    if not values_can_be_read(*args, *kwargs.values(), *model.parameters()):
        return
    with torch.no_grad():
        plain = as_tuple(by_reference(model)(*args, **kwargs))
        args, kwargs = tuple(_widened(x) for x in args), {key: _widened(x) for key, x in kwargs.items()}
        want = as_tuple(by_reference(model).double()(*args, **kwargs))
    for a, b, c in zip(got, want, plain, strict=True):
        if a is None:
            continue
        # A layer norm of small numbers makes rounding large, for the reference in the same dtype too.
        error, theirs = ((x.detach().double() - b).norm() / (b.norm() + b.numel() ** 0.5 * 1e-3) for x in (a, c))
        allowed = 8 * (theirs + torch.finfo(a.dtype).eps)
        assert a.shape == b.shape and (not b.numel() or error <= allowed), f"off by {error:.2e}, {allowed:.2e} allowed"


def _widened(x: Any) -> Any:
    return dense(x) if isinstance(x, Tensor) and x.is_floating_point() else x


def as_tuple(result: Any) -> tuple[Tensor | None, ...]:
    """The tensors of a result."""
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def construction(cls: type, given: dict[str, Any], names: list[str], inputs: tuple[Tensor, ...]) -> Call:
    """A construction; what is constructed has to compute, on rows of its `embed_dim` where it has one."""

    def check(model: nn.Module) -> None:
        places = {x.device.type for x in model.parameters()} or {"cpu"}
        dtypes = [x.dtype for x in model.parameters()] or [torch.float32]
        # A scale may be too large for the rows' dtype; zero keys know no causality, which xpos asks for.
        if places != {"cpu"} or "scale" in names or (given.get("positions") == "xpos" and "padding" in names):
            return
        model.eval()
        taken = tuple(x.to(dtypes[0]) if x.is_floating_point() else x for x in inputs)
        if (width := getattr(model, "embed_dim", None)) is not None:  # which ints of every kind may have said
            taken = tuple(torch.randn(*x.shape[:-1], width, dtype=x.dtype) for x in taken)
        with torch.no_grad():
            result = model(*taken, **({"is_causal": True} if given.get("positions") == "xpos" else {}))
        compare(model, taken, {}, as_tuple(result)) if given.get("positions") != "xpos" else None

    return Call(cls, (), given, (*given, "positions"), check, not names)


@target("DilatedAttention", 14)
def _dilated(draw: st.DrawFn) -> Call:
    given = {
        **_BRANCHES, "scale": None, "offsets": "modulo", "attention_dropout": 0.1, "mixing_gradient": "exact",
        "padding": "none", "segment_shift": 0, "backend": "auto",
        "head_groups": draw(st.sampled_from([None, True, False])),
    }  # fmt: skip
    names = pick(draw, list(given))
    spoil(draw, given, names)
    return construction(DilatedAttention, given, names, (torch.randn(1, 11, 2, 4),) * 3)


def arrange_rows(draw: st.DrawFn, given: dict[str, Any]) -> None:
    """Two rows of eleven: whole, with a mask, padded on the left, or the first one as two packed sequences."""
    rows = draw(st.sampled_from(["whole", "masked", "left", "packed"]))
    if rows == "masked":
        given["key_padding_mask"] = torch.rand(2, 11) > 0.3
    elif rows == "left":
        given["row_start"] = torch.tensor([0, 3])
    elif rows == "packed":
        given |= {name: given[name][0] for name in ("query", "key", "value")}
        given["cu_seqlens"] = torch.tensor([0, 4, 11], dtype=torch.int32)


@target("DilatedAttention.forward", 20)
def _dilated_forward(draw: st.DrawFn) -> Call:
    module = DilatedAttention(**_BRANCHES, head_groups=draw(st.booleans())).eval()
    given: dict[str, Any] = {
        "query": torch.randn(2, 11, 2, 4), "key": torch.randn(2, 11, 2, 4), "value": torch.randn(2, 11, 2, 4),
        "is_causal": draw(st.booleans()), "key_padding_mask": None, "row_start": None, "cu_seqlens": None,
        "q_start": 0, "k_start": 0, "seq_len": None, "seed": None,
    }  # fmt: skip
    arrange_rows(draw, given)
    names = pick(draw, list(given))
    spoil(draw, given, names)

    def check(result: Tensor) -> None:
        compare(module, (), given, (result,))

    return Call(module, (), given, (*given, "q", "k", "v"), check, not names)


@target("MultiheadDilatedAttention", 16)
def _multihead(draw: st.DrawFn) -> Call:
    given = {
        "embed_dim": 16, "num_heads": 4, "dropout": 0.1, "bias": True, **_BRANCHES, "num_kv_heads": None,
        "layer_norm": True, "layer_norm_eps": 1e-5, "gamma_init": 1.0, "rotary_base": 10_000.0, "scale_base": 512.0,
        "positions": draw(st.sampled_from([None, "rotary", "xpos"])), "scale": None, "offsets": "modulo",
        "mixing_gradient": "exact", "padding": "none", "segment_shift": 3, "backend": "auto", "head_groups": None,
        "batch_first": True,
        "device": None, "dtype": None,
    }  # fmt: skip
    names = pick(draw, list(given))
    spoil(draw, given, names)
    return construction(MultiheadDilatedAttention, given, names, (torch.randn(1, 11, 16),) * 3)


@cache
def _multihead_module(positions: str | None) -> MultiheadDilatedAttention:
    torch.manual_seed(0)
    return MultiheadDilatedAttention(16, 4, num_kv_heads=2, positions=positions, **_BRANCHES).eval()  # type: ignore[arg-type]


@target("MultiheadDilatedAttention.forward", 24)
def _multihead_forward(draw: st.DrawFn) -> Call:
    module = _multihead_module(draw(st.sampled_from([None, "rotary"])))
    given: dict[str, Any] = {
        "query": torch.randn(2, 11, 16), "key": torch.randn(2, 11, 16), "value": torch.randn(2, 11, 16),
        "key_padding_mask": None, "is_causal": draw(st.booleans()), "need_weights": False, "row_start": None,
        "cu_seqlens": None, "rotation": None, "cache": None,
    }  # fmt: skip
    arrange_rows(draw, given)
    names = pick(draw, list(given))
    spoil(draw, given, names)

    def check(result: tuple[Tensor, None]) -> None:
        compare(module, (), given, result)

    return Call(module, (), given, (*given, "q", "k", "v"), check, not names)


_CONFIGS: dict[type, dict[str, Any]] = {
    LongNetConfig: {"d_model": 16, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 32,
                    "vocab_size": 11, **_BRANCHES},
    SlideEncoderConfig: {"in_chans": 6, "embed_dim": 16, "depth": 1, "num_heads": 2, "ffn_dim": 32, **_BRANCHES},
    LongViTConfig: {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "ffn_dim": 32,
                    "position_grid": [2, 2], "num_classes": 3, **_BRANCHES},
}  # fmt: skip


@target("configs", 30, "LongNetConfig", "SlideEncoderConfig", "LongViTConfig")
def _configs(draw: st.DrawFn) -> Call:
    cls = draw(st.sampled_from(list(_CONFIGS)))
    fields = {name: field.default for name, field in cls.__dataclass_fields__.items()}
    names = pick(draw, list(fields))
    given = {**_CONFIGS[cls], **{name: fields[name] for name in names if name not in _CONFIGS[cls]}}
    spoil(draw, given, names)

    def check(config: Any) -> None:
        kept = json.loads(json.dumps(config.to_dict()))
        assert cls.from_dict(kept) == config

    if draw(st.booleans()):
        return Call(cls, (), given, (*fields, "nhead", "d_model"), check, not names)
    return Call(cls.from_dict, (given,), {}, (*fields, "nhead", "d_model"), check, not names)


_MODELS: dict[type, tuple[type, tuple[Tensor, ...]]] = {
    LongNet: (LongNetConfig, (torch.linspace(-2, 2, 2 * 9 * 16).view(2, 9, 16).sin(),)),
    LongNetEncoder: (LongNetConfig, (torch.linspace(-2, 2, 2 * 9 * 16).view(2, 9, 16).sin(),)),
    LongNetLM: (LongNetConfig, (torch.arange(18).view(2, 9) % 11,)),
    SlideEncoder: (SlideEncoderConfig, (torch.linspace(-2, 2, 2 * 9 * 6).view(2, 9, 6).sin(),
                                        256 * torch.arange(36).view(2, 9, 2))),
    LongViT: (LongViTConfig, (torch.linspace(-2, 2, 2 * 3 * 8 * 12).view(2, 3, 8, 12).sin(),)),
}  # fmt: skip


@target("models", 30, "LongNet", "LongNetEncoder", "LongNetLM", "SlideEncoder", "LongViT")
def _models(draw: st.DrawFn) -> Call:
    cls = draw(st.sampled_from(list(_MODELS)))
    config, inputs = _MODELS[cls]
    given = dict(_CONFIGS[config])
    names = pick(draw, [*_OPTIONS, *_OPTIONS, "config", *given])
    defaults = {"backend": "auto", "gradient_checkpointing": False, "device": None, "dtype": None, "config": None}
    given |= {name: defaults[name] for name in names if name in defaults}
    spoil(draw, given, names)
    # Other inputs are needed; or a LayerNorm over two or three features makes much of each one's rounding.
    changed = {"d_model", "vocab_size", "in_chans", "patch_size", "embed_dim", "dim_feedforward", "ffn_dim"} & set(
        names
    )
    call = construction(cls, given, names, inputs)
    call.names = (*config.__dataclass_fields__, *_OPTIONS, "config", "nhead", "d_model")
    if changed:
        call.check = None
    return call


@cache
def fuzzed_model(cls: type) -> Any:
    """A small model of a class, with weights at random."""
    torch.manual_seed(0)
    return cls(**_CONFIGS[_MODELS[cls][0]]).eval()  # type: ignore[no-any-return]


_ROWS = ("key_padding_mask", "row_start", "cu_seqlens")
_ARGUMENTS: dict[type, tuple[tuple[str, ...], tuple[str, ...]]] = {
    LongNet: (("x",), ("is_causal", *_ROWS)),
    LongNetEncoder: (("x",), ("is_causal", *_ROWS)),
    LongNetLM: (("tokens",), ("is_causal", *_ROWS, "cache", "seq_len", "inputs_embeds", "return_hidden", "states")),
    SlideEncoder: (("tiles", "coords"), ("mask", "all_layer_embed")),
    LongViT: (("images",), ()),
}


@target("models' forward", 40)
def _forward(draw: st.DrawFn) -> Call:
    cls = draw(st.sampled_from(list(_MODELS)))
    model, inputs = fuzzed_model(cls), _MODELS[cls][1]
    tensors, options = _ARGUMENTS[cls]
    given: dict[str, Any] = dict(zip(tensors, inputs, strict=True))
    rows = draw(st.sampled_from(["whole", "masked", "left", "packed"]))
    if rows == "masked" and "key_padding_mask" in options:
        given["key_padding_mask"] = torch.arange(18).view(2, 9) % 5 > 0
    elif rows == "left" and "row_start" in options:
        given["row_start"] = torch.tensor([0, 3])
    elif rows == "packed" and "cu_seqlens" in options:
        given |= {name: given[name][0] for name in tensors}
        given["cu_seqlens"] = torch.tensor([0, 4, 9], dtype=torch.int32)
    elif rows == "masked" and "mask" in options:
        given["mask"] = torch.arange(9)[None] < torch.tensor([[9], [5]])
    flags = (name for name in ("is_causal", "return_hidden", "all_layer_embed") if name in options)
    given |= {name: draw(st.booleans()) for name in flags}
    if "inputs_embeds" in options and draw(st.booleans()):
        x = torch.linspace(-2, 2, 16 * given["tokens"].numel()).view(*given["tokens"].shape, 16)
        given |= {"tokens": None, "inputs_embeds": x}
    names = pick(draw, [*tensors, *tensors, *options])
    spoil(draw, given, names)

    def check(result: Any) -> None:
        compare(model, (), given, as_tuple(result))

    return Call(model, (), given, (*tensors, *options, "vocab_size", "patch_size"), check, not names, cls.__name__)


@target("generate", 20)
def _generate(draw: st.DrawFn) -> Call:
    model = fuzzed_model(LongNetLM)
    given: dict[str, Any] = {"prompt": torch.arange(10).view(2, 5), "max_new_tokens": draw(st.integers(0, 6))}
    defaults = {
        "temperature": 1.0, "top_k": None, "top_p": None, "greedy": False, "seed": 0, "generator": None,
        "eos_token": None, "row_start": torch.tensor([0, 2]), "prefill_chunk": None, "graphed": False,
    }  # fmt: skip
    given |= {name: defaults[name] for name in draw(st.lists(st.sampled_from(sorted(defaults)), unique=True))}
    names = pick(draw, ["prompt", "max_new_tokens", *defaults])
    given |= {name: defaults[name] for name in names if name in defaults}
    spoil(draw, given, names)
    if isinstance(given["max_new_tokens"], int) and 100 < given["max_new_tokens"] < 2**63:
        given["max_new_tokens"] = 100  # a promise that would be kept, in years

    def check(result: Tensor) -> None:
        assert result.dtype == torch.int64 and result.shape[0] == given["prompt"].shape[0]
        assert result.shape[1] <= operator.index(given["max_new_tokens"]) and bool(
            ((result >= 0) & (result < 11)).all()
        )

    return Call(model.generate, (), given, (*defaults, "prompt", "tokens", "max_new_tokens"), check, not names)  # type: ignore[arg-type]
