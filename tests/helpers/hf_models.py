"""Tiny models of transformers with random weights, in fp64, and batches for them."""

from __future__ import annotations

import os
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import, which reads it
import torch
import transformers
from torch import Tensor

VOCAB = 99
LENGTHS, RATES = [16, 40, 96], [1, 2, 4]
PATTERN = {"dilated_segment_lengths": LENGTHS, "dilated_dilation_rates": RATES}
# The models compute in fp64, where another order of the same sums leaves logits of order 1 alike to 1e-10.
CLOSE = {"rtol": 0.0, "atol": 1e-10}
# Casts to fp32 inside some models (norms, rotary tables, routers) leave 1e-6.
NEAR = {"rtol": 0.0, "atol": 1e-5}

_DECODER = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    "initializer_range": 0.3,
}  # fmt: skip
_HALVES = {
    f"{half}_{name}": value
    for half in ("encoder", "decoder")
    for name, value in {"layers": 1, "ffn_dim": 32, "attention_heads": 4}.items()
}
_PAIR = {
    **_HALVES, "vocab_size": VOCAB, "d_model": 32, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    "decoder_start_token_id": 1, "init_std": 0.3,
}  # fmt: skip
# Class, config class and fields. Windows of 8, chunks of 16.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": 8}),
    "gemma3": (
        "Gemma3ForCausalLM", "Gemma3TextConfig",
        {**_DECODER, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "llama4": (
        "Llama4ForCausalLM", "Llama4TextConfig",
        {**_DECODER, "intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 1,
         "attention_chunk_size": 16, "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig",
        {**_DECODER, "sliding_window": 8, "use_sliding_window": True, "num_experts": 2, "num_experts_per_tok": 1,
         "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "bart": ("BartModel", "BartConfig", _PAIR),
    "marian": ("MarianModel", "MarianConfig", _PAIR),
    "whisper": (
        "WhisperModel", "WhisperConfig", {**_PAIR, "num_mel_bins": 4, "max_source_positions": 50,
         "max_target_positions": 100},
    ),
}  # fmt: skip


def make(name: str, attn_implementation: str = "dilated", **changes: Any) -> Any:
    """A model by its name in `MODELS`; the same weights every time."""
    model, config, fields = MODELS[name]
    torch.manual_seed(1)
    made = getattr(transformers, config)(**{**fields, **PATTERN, **changes})
    built = getattr(transformers, model)._from_config(
        made, attn_implementation=attn_implementation, experts_implementation="eager"
    )
    return built.double().eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(7))
