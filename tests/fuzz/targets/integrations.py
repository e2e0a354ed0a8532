"""Models of transformers: switched ones, and ours among its Auto classes; and TRIDENT's encoder."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st

from fuzz.judge import Call
from fuzz.table import target
from fuzz.targets import slides
from fuzz.targets.modules import spoil
from fuzz.values import pick

_CONFIG: dict[str, Any] = {
    "d_model": 16, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 32,
    "vocab_size": 11, "segment_lengths": [4, 8], "dilation_rates": [1, 2],
}  # fmt: skip


@cache
def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, num_key_value_heads=2, **sizes)).eval()


@target("use_dilated_attention", 12)
def _use(draw: st.DrawFn) -> Call:
    from dilated_attention_pytorch.integrations.transformers import use_dilated_attention

    given: dict[str, Any] = {
        "model": copy.deepcopy(_llama()), "segment_lengths": [4, 8], "dilation_rates": [1, 2],
        "layers": draw(st.sampled_from([None, [0], [1, 0]])), "offsets": "modulo", "segment_shift": 0,
        "mixing_gradient": "exact", "backend": "auto", "process_group": None, "mesh_dim": None,
    }  # fmt: skip
    names = pick(draw, list(given))
    spoil(draw, given, names)

    def check(_: Any) -> None:
        with torch.no_grad():
            assert bool(given["model"](torch.arange(9)[None]).logits.isfinite().all())

    return Call(use_dilated_attention, (), given, (*given, "num_key_value_heads"), check, not names)


@cache
def _language_model(name: str) -> Any:
    from dilated_attention_pytorch.integrations import longnet
    from dilated_attention_pytorch.integrations.longnet_config import LongNetHFConfig

    torch.manual_seed(0)
    return getattr(longnet, name)(LongNetHFConfig(**_CONFIG)).eval()


_CLASSES = ("LongNetForCausalLM", "LongNetForMaskedLM", "LongNetForSequenceClassification")


@target("LongNetHFConfig", 14)
def _config(draw: st.DrawFn) -> Call:
    from dilated_attention_pytorch import LongNetConfig
    from dilated_attention_pytorch.integrations.longnet import LongNetForCausalLM
    from dilated_attention_pytorch.integrations.longnet_config import LongNetHFConfig

    fields = {name: field.default for name, field in LongNetConfig.__dataclass_fields__.items()}
    del fields["padding"], fields["num_encoder_layers"]  # are none of it: transformers keeps any name
    names = pick(draw, sorted(fields))
    given = {**_CONFIG, **{name: fields[name] for name in names if name not in _CONFIG}}
    spoil(draw, given, names)

    def build(**given: Any) -> Any:
        return LongNetForCausalLM(LongNetHFConfig(**given)).eval()

    def check(model: Any) -> None:
        tokens = torch.arange(9)[None] % model.config.vocab_size
        if "scale" not in names:
            assert model(tokens).logits.shape == (1, 9, model.config.vocab_size)

    return Call(build, (), given, (*fields, "nhead", "d_model"), check, not names)


@target("LongNet of transformers", 16, *_CLASSES)
def _forward(draw: st.DrawFn) -> Call:
    name = draw(st.sampled_from(_CLASSES))
    given: dict[str, Any] = {"input_ids": torch.arange(18).view(2, 9) % 11, "attention_mask": None, "labels": None}
    given["inputs_embeds"] = None
    if draw(st.booleans()):
        given |= {"input_ids": None, "inputs_embeds": torch.linspace(-2, 2, 18 * 16).view(2, 9, 16)}
    if name != "LongNetForSequenceClassification":
        given["position_ids"] = None
    if name == "LongNetForCausalLM":
        given |= {"past_key_values": None, "use_cache": None, "logits_to_keep": 0}
    if draw(st.booleans()):
        given["attention_mask"] = torch.arange(9)[None] >= torch.tensor([[0], [3]])
    names = pick(draw, list(given))
    spoil(draw, given, names)

    def check(found: Any) -> None:
        assert names or bool(found.logits.isfinite().all())

    return Call(_language_model(name), (), given, (*given, "tokens", "cache"), check, not names, name)


@target("GigaPathSlideEncoder", 10)
def _trident(draw: st.DrawFn) -> Call:
    from dilated_attention_pytorch.integrations.trident import GigaPathSlideEncoder

    given: dict[str, Any] = {
        "weights": str(slides.folder() / "encoder"), "pretrained": True, "freeze": True, "layer": 1,
        "precision": torch.float32,
    }  # fmt: skip
    names = pick(draw, list(given))
    spoil(draw, given, names)

    def check(encoder: Any) -> None:
        if names:
            return
        batch = {"features": torch.randn(1, 9, 12), "coords": 512 * torch.arange(18).view(1, 9, 2),
                 "attributes": {"patch_size_level0": 512}}  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert bool(encoder(batch, "cpu").isfinite().all())

    return Call(GigaPathSlideEncoder, (), given, (*given, "weights"), check, not names, also=(OSError,))
