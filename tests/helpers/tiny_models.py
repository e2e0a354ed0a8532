"""Every model with parameters, tiny, and what its forward takes: for whatever is done to modules from outside."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dilated_attention_pytorch import MultiheadDilatedAttention
from dilated_attention_pytorch.models import LongNet, LongNetEncoder, LongNetLM, LongViT, SlideEncoder

PATTERN: dict[str, Any] = {"segment_lengths": (6, 16), "dilation_rates": (1, 2)}
SIZES: dict[str, Any] = {"d_model": 16, "nhead": 4, "num_decoder_layers": 2, "dim_feedforward": 24, **PATTERN}
LONGNET: dict[str, Any] = {**SIZES, "num_encoder_layers": 2, "activation": "gelu"}
VISION: dict[str, Any] = {**PATTERN, "embed_dim": 16, "depth": 2, "num_heads": 4, "ffn_dim": 24, "drop_path": 0.0}
MODELS = ["LongNet", "LongNetEncoder", "LongNetLM", "SlideEncoder", "LongViT"]
KINDS = [*MODELS, "MultiheadDilatedAttention"]
if importlib.util.find_spec("transformers") is not None:
    KINDS += ["LongNetForCausalLM", "LongNetForMaskedLM", "LongNetForSequenceClassification"]


class Tiny(NamedTuple):
    """A model whose biases and norms are not at their start, and the arguments of its forward: a batch of two."""

    model: nn.Module
    given: tuple[Tensor, ...]


def build(kind: str, *, dtype: torch.dtype = torch.float64, **options: Any) -> Tiny:
    """The same weights and inputs each time; `options` are further arguments of the model's class."""
    generator = torch.Generator().manual_seed(0)
    ours: dict[str, Any] = {"dtype": dtype, **options}
    rows = torch.randn(2, 20, 16, dtype=dtype, generator=generator)
    tokens = torch.randint(11, (2, 20), generator=generator)
    given: tuple[Tensor, ...] = (rows,)
    model: nn.Module
    if kind == "SlideEncoder":
        model = SlideEncoder(**VISION, in_chans=6, dropout=0.0, **ours)
        given = (rows[..., :6], torch.randint(200_000, (2, 20, 2), generator=generator))
    elif kind == "LongViT":
        model = LongViT(**VISION, patch_size=4, num_classes=3, **ours)
        given = (torch.randn(2, 3, 16, 20, dtype=dtype, generator=generator),)
    elif kind == "LongNetLM":
        model, given = LongNetLM(**LONGNET, vocab_size=11, **ours), (tokens,)
    elif kind == "MultiheadDilatedAttention":
        model, given = MultiheadDilatedAttention(16, 4, **PATTERN, **ours), (rows, rows, rows)
    elif kind.startswith("LongNetFor"):
        os.environ["HF_HUB_OFFLINE"] = "1"
        from dilated_attention_pytorch.integrations import longnet

        config = longnet.LongNetHFConfig(vocab_size=11, pad_token_id=0, use_cache=False, **SIZES, **options)
        model, given = getattr(longnet, kind)(config).to(dtype), (tokens,)
    else:
        model = {"LongNet": LongNet, "LongNetEncoder": LongNetEncoder}[kind](**LONGNET, **ours)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return Tiny(model, given)


def values(out: Any) -> Tensor:
    """Everything that a model gives, in one tensor."""
    if isinstance(out, Tensor):
        return out.flatten()
    parts = out.values() if hasattr(out, "values") else out
    return torch.cat([x.flatten() for x in parts if x is not None])


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Its linear layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def has_own(module: nn.Module) -> bool:
    """Whether it has parameters beside its children's."""
    return next(module.parameters(recurse=False), None) is not None
