"""Which classes of the installed transformers are what they were under one covering branch: `make hf-sweep`.

Every class that AutoModel and AutoModelForCausalLM know is built tiny, with random weights, and runs plain and padded.
One branch that covers the sequence is dense attention, so a switched model has to give the numbers that it gave before,
or be refused with a ValueError of this library. Anything else is a bug and is called so. Results go to
`huggingface_classes.json`, from which `docs/tables.py` makes the table of docs/huggingface.md.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import, which reads it
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import configuration_auto, modeling_auto

from dilated_attention_pytorch.integrations.transformers import layers, switch, use_dilated_attention

RESULTS = Path(__file__).with_suffix(".json")
TOKENS, VOCABULARY = 40, 99
# Larger than any rounding that fp32 casts inside the models leave (1e-6), smaller than what a wrong mask changes.
TOLERANCE = 1e-4
LARGEST = 30_000_000  # parameters

# Config fields by name, where a class has them. Heads of 8; windows and chunks shorter than the input.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1,
    "sliding_window": 8, "attention_chunk_size": 16, "local_attention": 8, "attention_window": 8, "window_size": 8,
    "head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "initializer_range": 0.2, "image_size": 32, "patch_size": 8,
}  # fmt: skip
for _value, _names in {
    32: "hidden_size d_model n_embd dim embed_dim hidden_dim embedding_size projection_dim moe_intermediate_size "
        "shared_expert_intermediate_size encoder_hidden_size decoder_hidden_size",
    64: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_ff ffn_hidden_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth num_decoder_layers "
       "num_encoder_layers num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_k",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
       "num_local_experts num_experts n_routed_experts",
}.items():  # fmt: skip
    SIZES |= dict.fromkeys(_names.split(), _value)


def classes() -> dict[str, str]:
    """Class names and their model types, of AutoModel and AutoModelForCausalLM."""
    found: dict[str, str] = {}
    for mapping in (modeling_auto.MODEL_MAPPING_NAMES, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        for model_type, names in mapping.items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, model_type)
    return dict(sorted(found.items()))


def tiny(config_class: type) -> Any:
    """A config of this class with small sizes."""
    return config_class(**_small(config_class()))


def _small(default: Any) -> dict[str, Any]:
    kwargs: dict[str, Any] = {}
    for name, value in SIZES.items():
        if _get(default, name) is not None and type(_get(default, name)) is type(value):
            kwargs[name] = value
    if "kv_lora_rank" in kwargs:  # latent attention has one latent for all heads
        kwargs["num_key_value_heads"] = kwargs["num_attention_heads"]
    for name, value in vars(default).items():
        if "dropout" in name and isinstance(value, float):
            kwargs[name] = 0.0
    if isinstance(types := _get(default, "layer_types"), list) and types:
        # Two layers, of two kinds where there are two.
        kwargs["layer_types"] = [types[0], next((t for t in types if t != types[0]), types[0])]
    for name in default.sub_configs:
        if (part := _get(default, name)) is not None:
            kwargs[name] = {**_small(part), "model_type": part.model_type}
    return kwargs


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a field that differs per layer (Gemma4) has no one value
        return None


def build(name: str, model_type: str) -> nn.Module | str:
    """A tiny model, or why there is none."""
    try:
        model_class = getattr(transformers, name)
        config = tiny(model_class.config_class or configuration_auto.CONFIG_MAPPING[model_type])
        with torch.device("meta"):
            size = sum(p.numel() for p in model_class._from_config(config).parameters())
        if size > LARGEST:
            return "too large"
        torch.manual_seed(0)
        implementation = "sdpa" if model_class._supports_sdpa else "eager"
        model: nn.Module = model_class._from_config(
            config, attn_implementation=implementation, experts_implementation="eager"
        )
        return model.double().eval()
    except Exception as error:
        if os.environ.get("TRACE"):
            raise
        return f"not built: {type(error).__name__}"


def inputs(model: Any, with_images: bool) -> Iterator[dict[str, Tensor]]:
    """Inputs without and with padding; models of text and images may want both, or take text alone."""
    takes = signature(model.forward).parameters
    draw = torch.Generator().manual_seed(1)
    given: dict[str, Tensor] = {}
    if "input_ids" in takes:
        given["input_ids"] = torch.randint(3, VOCABULARY, (2, TOKENS), generator=draw)
    if "decoder_input_ids" in takes:
        given["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, TOKENS), generator=draw)
    if "bbox" in takes:
        given["bbox"] = torch.zeros(2, TOKENS, 4, dtype=torch.int64)
    if "pixel_values" in takes and (with_images or "input_ids" not in takes):
        config = getattr(model.config, "vision_config", model.config)
        side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        given["pixel_values"] = torch.randn(2, getattr(config, "num_channels", 3), side, side, generator=draw)
    if "input_features" in takes and "input_ids" not in takes:
        bins = getattr(model.config, "num_mel_bins", getattr(model.config, "feature_size", 80))
        length = 2 * getattr(model.config, "max_source_positions", TOKENS)
        given["input_features"] = torch.randn(2, bins, length, generator=draw)
    if "input_values" in takes and "input_ids" not in takes:
        given["input_values"] = torch.randn(2, 4000, generator=draw)
    given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    yield given
    if "input_ids" in given and "attention_mask" in takes:
        real = torch.ones(2, TOKENS, dtype=torch.int64)
        real[0, 25:] = 0
        yield {**given, "attention_mask": real}


@torch.no_grad()
def run(model: Any, given: dict[str, Tensor]) -> list[Tensor]:
    """The floating tensors of a model's output, those at hidden tokens as zeros."""
    torch.manual_seed(2)
    found = {k: x for k, x in model(**given).items() if isinstance(x, Tensor) and x.is_floating_point()}
    if (real := given.get("attention_mask")) is not None:
        hidden = (real == 0)[..., None]
        for name, x in found.items():
            # Of an encoder and a decoder the mask is the encoder's.
            if x.shape[:2] == real.shape and ("decoder_input_ids" not in given or name.startswith("encoder")):
                found[name] = x.masked_fill(hidden.reshape(*real.shape, *[1] * (x.dim() - 2)), 0.0)
    return list(found.values())


def differs(got: list[Tensor], want: list[Tensor]) -> float | None:
    """The largest difference, relative to the norm, where it is above the tolerance."""
    pairs = zip(got, want, strict=True)
    worst = max((float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs), default=0.0)
    return None if worst <= TOLERANCE else worst


def known_inputs(model: Any) -> list[tuple[dict[str, Tensor], list[Tensor]]] | str:
    """Inputs that the model runs on, and what it makes of them; or why there are none."""
    for with_images in (False, True):
        try:
            return [(given, run(model, given)) for given in inputs(model, with_images)]
        except Exception as error:
            why = f"its inputs are not known ({type(error).__name__})"
    return why


def verdict(name: str, model_type: str) -> str:
    """ "equal", "unchanged", "refused: why", "not run: why", or what is WRONG."""
    model: Any = build(name, model_type)
    if isinstance(model, str):
        return f"not run: {model}"
    if not switch.attention_layers(model):
        return "not run: no attention through the interface"
    if isinstance(wanted := known_inputs(model), str):
        return f"not run: {wanted}"
    calls: list[int] = []
    dilated = layers._dilated
    layers._dilated = lambda *args: calls.append(1) or dilated(*args)  # type: ignore[assignment,func-returns-value]
    try:
        use_dilated_attention(model, [1 << 20], [1])
        for given, want in wanted:
            got = run(model, given)
            if not all(x.isfinite().all() for x in want):
                return "not run: its numbers are not finite"
            if differs(got, want) is not None:
                # Where a model hands sdpa no mask, a flag that was never meant for it decides; eager has the mask.
                model.set_attn_implementation("eager")
                want = run(model, given)
                model.set_attn_implementation("dilated")
            if (worst := differs(got, want)) is not None:
                return f"WRONG: off by {worst:.1e}{', padded' if 'attention_mask' in given else ''}"
    except ValueError as error:
        # Ours name the attention, or the interface that it has to go through.
        if "attn_implementation='dilated'" in str(error) or "AttentionInterface" in str(error):
            return f"refused: {error}"
        return f"WRONG: {type(error).__name__}: {error}"
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {error}"
    finally:
        layers._dilated = dilated
    return "equal" if calls else "unchanged"


def main() -> None:
    known = classes()
    names = sys.argv[1:] or list(known)
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))["classes"] if sys.argv[1:] and RESULTS.is_file() else {}
    found = {}
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[name] = verdict(name, known[name])
        print(f"{name}: {found[name]}", flush=True)
    print(dict(Counter(v.partition(":")[0] for v in found.values())))
    record = {"transformers": transformers.__version__, "classes": dict(sorted({**kept, **found}.items()))}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(v.startswith("WRONG") for v in found.values()))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
