"""torchscale's settings in the words of this package, and what of them no model here computes.

A torchscale model is made from an `EncoderConfig` or a `DecoderConfig`; training scripts keep the same names in an
`argparse.Namespace`. Weights tell little of it: a relu network has the names and shapes of a gelu network.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping
from typing import Any, Literal

from dilated_attention_pytorch.core import validation as check

Stack = Literal["encoder", "decoder"]

_POST_LN = (
    "this is a post-LN/deepnorm checkpoint (deepnorm=True, or normalize_before=False): its LayerNorms stand after the "
    "sums, where those of the models here stand before attention and feed-forward network"
)
_NO_SUBLN = (
    "this is a pre-LN checkpoint without sub-LN (subln=False): it has no LayerNorm before out_proj and fc2, which the "
    "models here have"
)
_NO_END = (
    "this is a checkpoint without a LayerNorm at the end (normalize_output=False), which LongNetEncoder has; where it "
    "is LongViT's, convert the whole model with source 'longvit'"
)
# Settings that ask for something else than the models here compute, and what that is.
_OTHERS = {
    "moe_freq": "a mixture of experts",
    "multiway": "multiway layers",
    "layernorm_embedding": "a LayerNorm of the embeddings",
    "rel_pos_buckets": "a bias of relative positions",
}
_NAMES = {
    "{}_attention_heads": "num_heads",
    "segment_length": "segment_lengths",
    "dilated_ratio": "dilation_rates",
    "activation_fn": "activation",
    "layernorm_eps": "layer_norm_eps",
}


def settings(args: Any, stack: Stack) -> dict[str, Any]:
    """The options of `convert` that torchscale's settings hold.

    Args:
        args: an `EncoderConfig`, a `DecoderConfig`, an `argparse.Namespace`, or such values by name. Names that are
            absent are left to the caller.
        stack: whose settings they are.

    Raises:
        TypeError: no settings by name.
        ValueError: settings of a network that no model here is, such as post-LN, with the reason.
    """
    if not isinstance(args, Mapping) and not hasattr(args, "__dict__"):
        raise TypeError(f"expected args to hold settings by name, got {check.shown(args)}")
    values: Mapping[str, Any] = args if isinstance(args, Mapping) else vars(args)
    deepnorm = bool(values.get("deepnorm"))
    subln = bool(values.get("subln", True)) and not deepnorm  # as torchscale settles the three of them
    if deepnorm or not (subln or values.get(f"{stack}_normalize_before", True)):
        raise ValueError(f"expected settings of a pre-LN network with sub-LN, got others: {_POST_LN}")
    if not subln:
        raise ValueError(f"expected settings of a pre-LN network with sub-LN, got others: {_NO_SUBLN}")
    for name, what in _OTHERS.items():
        if values.get(name):
            raise ValueError(f"expected {name} to be off, got {check.quoted(values[name])}: {what}, which no model has")
    if stack == "encoder" and values.get("xpos_rel_pos"):
        raise ValueError(
            "expected xpos_rel_pos to be off in an encoder, got True: without causality the weight of later keys grows "
            "exponentially"
        )
    names = {there.format(stack): here for there, here in _NAMES.items()}
    found = {here: values[there] for there, here in names.items() if values.get(there) not in (None, "")}
    for name in ("segment_lengths", "dilation_rates"):
        if name in found:
            found[name] = _ints(name, found[name])
    if "activation" in found and found["activation"] not in ("relu", "gelu"):
        got = check.quoted(found["activation"])
        raise ValueError(f"expected activation_fn to be 'relu' or 'gelu', got {got}: no model here has it")
    if values.get("no_scale_embedding") is not None:
        found["scale_embedding"] = not values["no_scale_embedding"]
    if stack == "decoder" and values.get("xpos_scale_base") is not None:
        found["xpos_scale_base"] = float(values["xpos_scale_base"])
    return found


def _ints(name: str, value: Any) -> tuple[int, ...]:
    """The ints of a list, or of a list's text: torchscale takes `"[2048,4096]"` and evaluates it."""
    try:
        return tuple(int(one) for one in (ast.literal_eval(value) if isinstance(value, str) else value))
    except (ValueError, SyntaxError, TypeError):
        raise ValueError(f"expected {name} as a list of ints, got {check.quoted(value)}") from None


def check_norms(names: Collection[str], stack: Stack) -> None:
    """Raises a ValueError for the weights of another kind of layer, whose LayerNorms are missing everywhere.

    Args:
        names: as they are here, `encoder.layers.N...`.
        stack: which layers they are of.
    """
    layers = [name for name in names if name.startswith(f"{stack}.layers.")]
    inner = any(name.endswith(("inner_attn_ln.weight", "ffn_layernorm.weight")) for name in layers)
    end = any(name.startswith(f"{stack}.layer_norm.") for name in names)
    why = ""
    if not inner:
        why = _NO_SUBLN if end else _POST_LN
    elif not end and stack == "encoder":
        why = _NO_END
    if layers and why:
        raise ValueError(f"expected the weights of a pre-LN network with sub-LN, got others: {why}")
