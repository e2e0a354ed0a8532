"""Weights of other implementations, read into the models of this package: a table of names for each source.

A source that computes what these models compute gives the same numbers. Any other is refused, or, for fkodom's models,
taken as a start for training when `as_initialisation=True` asks for that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.models.config import LongNetConfig, Model
from dilated_attention_pytorch.models.longnet import LongNet, LongNetEncoder, LongNetLM
from dilated_attention_pytorch.models.longvit import LongViT, official_config
from dilated_attention_pytorch.models.slide.encoder import SlideEncoder
from dilated_attention_pytorch.models.torchscale import check_norms, settings
from dilated_attention_pytorch.models.weights import WeightsSource, count_layers, load_into, read_checkpoint

Tensors = dict[str, Tensor]
Source = Literal["gigapath", "longvit", "torchscale-encoder", "torchscale-decoder", "fkodom", "fkodom-lm"]
# What weights do not tell and a source has a default for, which is taken, and said, where nobody gives it.
_NUMBERS: dict[str, Any] = {"activation": "gelu", "layer_norm_eps": 1e-5}
ASSUMED: dict[str, dict[str, Any]] = {
    "gigapath": {
        "num_heads": 16, "max_wsi_size": 262_144, "tile_size": 256, "global_pool": False, "layer_norm_eps": 1e-5,
        "norm_eps": 1e-6,
    },
    "longvit": {"num_heads": 16, "layer_norm_eps": 1e-5},
    "torchscale-encoder": {**_NUMBERS, "scale_embedding": False},
    "torchscale-decoder": {**_NUMBERS, "scale_embedding": False, "xpos_scale_base": 512.0},
    "fkodom": {"activation": "relu", "layer_norm_eps": 1e-5},
    "fkodom-lm": {"activation": "relu", "layer_norm_eps": 1e-5},
}  # fmt: skip

# What torchscale's and fkodom's weights do not tell, and no default can be right for.
SHAPE = ("num_heads", "segment_lengths", "dilation_rates")
# Patterns of names there, and names here; None where the name has no place. A name that no pattern matches is an error.
_FKODOM = (
    (r"(encoder|decoder)\.layers\.(\d+)\.self_attn\.([qkv]|out)_proj\.(\w+)", r"\1.layers.\2.self_attn.\3_proj.\4"),
    (r"(encoder|decoder)\.layers\.(\d+)\.norm1\.(\w+)", r"\1.layers.\2.self_attn_layer_norm.\3"),
    (r"(encoder|decoder)\.layers\.(\d+)\.linear([12])\.(\w+)", r"\1.layers.\2.ffn.fc\3.\4"),
    (r"encoder\.layers\.(\d+)\.self_attn\.norm\.(\w+)", r"encoder.layers.\1.self_attn.inner_attn_ln.\2"),
    (r"encoder\.layers\.(\d+)\.norm2\.(\w+)", r"encoder.layers.\1.final_layer_norm.\2"),
    (r"encoder\.layers\.(\d+)\.norm3\.(\w+)", r"encoder.layers.\1.ffn.ffn_layernorm.\2"),
    (r"decoder\.layers\.(\d+)\.multihead_attn\.norm\.(\w+)", r"decoder.layers.\1.encoder_attn.inner_attn_ln.\2"),
    (r"decoder\.layers\.(\d+)\.multihead_attn\.(\w+)\.(\w+)", r"decoder.layers.\1.encoder_attn.\2.\3"),
    (r"decoder\.layers\.(\d+)\.norm2\.(\w+)", r"decoder.layers.\1.encoder_attn_layer_norm.\2"),
    (r"decoder\.layers\.(\d+)\.norm3\.(\w+)", r"decoder.layers.\1.final_layer_norm.\2"),
    (r"decoder\.layers\.(\d+)\.norm4\.(\w+)", r"decoder.layers.\1.ffn.ffn_layernorm.\2"),
)
NAMES: dict[str, tuple[tuple[str, str | None], ...]] = {
    "longvit": (
        (r"patch_embed\.proj\.(\w+)", r"patch_embed.\1"),
        (r"(pos_embed|head\.\w+|encoder\.layers\.\d+\.(?!self_attn\.xpos).+)", r"\1"),
        (r"fc_norm\.(\w+)", r"encoder.layer_norm.\1"),
    ),
    "torchscale-encoder": (
        (r"(layers\.\d+\.(?!self_attn\.xpos).+)", r"encoder.\1"),
        (r"layer_norm\.(\w+)", r"encoder.layer_norm.\1"),
    ),
    "torchscale-decoder": (
        (r"layers\.\d+\.self_attn\.xpos\.scale", None),  # a table that follows from the head width
        (r"(layers\.\d+\..+)", r"decoder.\1"),
        (r"layer_norm\.(\w+)", r"decoder.layer_norm.\1"),
        (r"(embed_tokens|output_projection)\.weight", r"\1.weight"),
    ),
    "fkodom": _FKODOM,
    "fkodom-lm": (
        *((rf"long_net\.{there}", here) for there, here in _FKODOM),
        (r"norm\.(\w+)", r"decoder.layer_norm.\1"),
        (r"token_embedding\.weight", None),
        (r"pos_embedding\.scale", None),
        (r"out\.(weight|bias)", None),
    ),
}
# Reasons for names that no table has.
_REASONS = (
    (r"embed_positions\..+", "added positions, which LongNet here does not have"),
    (r".*relative_position\..+", "a bias of relative positions, which LongNet here does not have"),
    (r".*\.xpos\.scale", "xPos without causality, which makes the weight of later keys grow exponentially"),
    (r".*\.moe_layer\..+", "a mixture of experts"),
    (r"layernorm_embedding\..+", "a LayerNorm of the embeddings"),
    (r".*\.[AB]\.(weight|bias)", "a multiway layer"),
    (r"(embed_tokens|output_projection)\.weight", "an encoder's tokens: LongNetEncoder takes embeddings"),
)
_OURS = r"(encoder|decoder)\.layer_norm\.\w+|decoder\.layers\.\d+\.self_attn\.inner_attn_ln\.\w+"  # not fkodom's
_FKODOM_DIFFERS = (
    "its heads are shared out among the branches, where here every head is in all of them",
    "it divides a branch's output by its sum over the sequence, where here branches mix by their softmax denominators",
    "it adds xPos to the token embeddings of its language model, and has an encoder beside the decoder there",
    "its decoder has no LayerNorm between self-attention and out_proj, and its stacks have none at their end",
)


class Conversion(NamedTuple):
    """A model with converted weights.

    Attributes:
        model: in evaluation mode.
        source: whose weights they are.
        notes: the differences from the source, in words, and what was assumed of it; empty where everything was given
            and the model computes the source's numbers.
    """

    model: Model[Any]
    source: Source
    notes: tuple[str, ...]


def convert(weights: WeightsSource, source: Source | None = None, *, args: Any = None, **options: Any) -> Conversion:
    """A model of this package with the weights of another implementation's.

    Args:
        weights: a file or a state dict, as `models.weights.read_state` takes it.
        source: whose weights they are; told by their names when absent.
        args: torchscale's `EncoderConfig` or `DecoderConfig`, an `argparse.Namespace` or a mapping with such names, for
            what weights do not tell; by default what the file has under `"args"`. Options come before it.
        options: for `"gigapath"`, those of `SlideEncoder.from_pretrained`; for `"longvit"`, fields of `LongViTConfig`.
            For torchscale, `num_heads`, `segment_lengths` and `dilation_rates`; further `activation="gelu"`,
            `layer_norm_eps=1e-5`, `scale_embedding=False` (torchscale's `not no_scale_embedding`) and, for the decoder,
            `xpos_scale_base=512.0`. For fkodom, `num_heads`, `segment_lengths`, `dilation_rates`, `activation="relu"`,
            `layer_norm_eps=1e-5`, and `as_initialisation=True`.

    Returns:
        `Conversion(model, source, notes)`.

    Raises:
        ValueError: names that are missing, unexpected (with the reason where it is known) or of another shape; a source
            that cannot be told; a source that computes something else (post-LN, no sub-LN, swish), or fkodom's without
            `as_initialisation`.
        TypeError: an option that the source does not have.

    Example:
        >>> state = LongNetEncoder(d_model=32, nhead=4, dim_feedforward=64,
        ...                        num_encoder_layers=2).state_dict()
        >>> theirs = {name.removeprefix("encoder."): x for name, x in state.items()}
        >>> convert(theirs, num_heads=4, segment_lengths=[16], dilation_rates=[1]).source
        'torchscale-encoder'
    """
    state, own = read_checkpoint(weights)
    if source is None:
        source = sniff(state)
    check.check_choice("source", source, Source)
    if source.startswith("torchscale"):
        stack: Any = source.removeprefix("torchscale-")
        options = settings(own if args is None else args, stack) | options
    elif args is not None:
        raise ValueError(f"expected args with weights of torchscale alone, got them with weights of {source}")
    options, notes = _with_assumed(state, source, options)
    model: Model[Any]
    if source == "gigapath":
        return Conversion(SlideEncoder.from_pretrained(state, **options), source, tuple(notes))
    found, left_out = rename(state, source)
    if source == "longvit":
        model = LongViT(official_config(found, **options), device="meta")
    elif source == "torchscale-encoder":
        check_norms(found, "encoder")
        if options.pop("scale_embedding"):
            notes.append(
                "LongNetEncoder takes embeddings as they are: multiply them by sqrt(d_model), as the source did"
            )
        shape = _shape(found, "encoder", **options)
        model = LongNetEncoder(LongNetConfig(**shape, offsets="blocked", padding="zero_keys"), device="meta")
    elif source == "torchscale-decoder":
        check_norms(found, "decoder")
        model = _decoder(found, bool(left_out), **options)
    else:
        model, differences = _fkodom(found, source, **options)
        notes += differences + [f"left out, LongNet has no place for it: {name}" for name in left_out]
    load_into(model, found)
    return Conversion(model.eval(), source, tuple(notes))


def _with_assumed(state: Tensors, source: str, options: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The options with the source's defaults for what weights do not tell, and the note that says so."""
    assumed = dict(ASSUMED[source])
    for name in ("scale_embedding", "global_pool", "as_initialisation"):
        check.check_bool(name, options.get(name, False))
    if source == "gigapath" and "segment_lengths" in options:
        del assumed["max_wsi_size"], assumed["tile_size"]
    if source == "torchscale-decoder" and not any(name.endswith(".xpos.scale") for name in state):
        del assumed["xpos_scale_base"]
    assumed = {name: value for name, value in assumed.items() if name not in options}
    for name in SHAPE if source.startswith(("torchscale", "fkodom")) else ():
        if name not in options:
            raise ValueError(f"expected {name} with weights of {source}, which do not tell it, got none")
    named = ", ".join(f"{name}={check.quoted(value)}" for name, value in assumed.items())
    return assumed | options, [f"assumed, since weights do not tell: {named}"] if named else []


def sniff(state: Mapping[str, Tensor]) -> Source:
    """The source of a state dict, by its names; a ValueError where none or several have them."""

    def some(pattern: str) -> bool:
        return any(re.match(pattern, name) for name in state)

    if {"cls_token", "patch_embed.proj.weight"} <= state.keys():
        return "gigapath"
    if some(r"(model\.)?patch_embed\.proj\.weight$"):
        return "longvit"
    if some(r"long_net\."):
        return "fkodom-lm"
    if some(r"(encoder|decoder)\.layers\.\d+\.norm1\.weight$"):
        return "fkodom"
    if some(r"encoder\.layers\.") and not some(r"(?!encoder\.)"):
        return "torchscale-encoder"
    if some(r"decoder\.layers\.") and not some(r"(?!decoder\.)"):
        return "torchscale-decoder"
    if not some(r"layers\."):
        raise ValueError(
            f"expected weights with the names of one of {list(get_args(Source))}, got names that none of them has: "
            f"{check.listed(sorted(state))}"
        )
    if "embed_tokens.weight" in state:
        raise ValueError(
            "expected source to be torchscale-encoder or torchscale-decoder, got none: the names of one that has "
            "tokens do not tell which"
        )
    return "torchscale-encoder"


def rename(state: Mapping[str, Tensor], source: str) -> tuple[Tensors, list[str]]:
    """The tensors under the names they have here, and the names that have no place.
    A ValueError tells names that are not in the source's table, with the reason where it is known."""
    prefix = {"torchscale-encoder": "encoder.", "torchscale-decoder": "decoder.", "longvit": "model."}.get(source, "")
    if source != "longvit" and not all(name.startswith(prefix) for name in state):
        prefix = ""
    found: Tensors = {}
    left_out, unknown = [], []
    for name, tensor in state.items():
        bare = name.removeprefix(prefix)
        rules = ((match, here) for there, here in NAMES[source] if (match := re.fullmatch(there, bare)))
        match, here = next(rules, (None, None))
        if match is None:
            unknown.append(name + next((f" ({why})" for there, why in _REASONS if re.fullmatch(there, bare)), ""))
        elif here is None:
            left_out.append(name)
        else:
            found[match.expand(here)] = tensor
    if unknown:
        raise ValueError(f"expected the names of a {source} state dict, got unexpected {check.listed(unknown, '; ')}")
    return found, left_out


def _decoder(
    found: Tensors, xpos: bool, *, scale_embedding: bool, xpos_scale_base: float = 512.0, **pattern: Any
) -> LongNetLM:
    """The model, and in `found` its weights: scaled, tied, and with the channels of heads in our order."""
    for name in ("embed_tokens.weight", "output_projection.weight"):
        if name not in found:
            raise ValueError(f"expected the weights of a LongNetLM, got: missing {name}")
    shape = _shape(found, "decoder", **pattern)
    uneven = [(w, r) for w, r in zip(shape["segment_lengths"], shape["dilation_rates"], strict=False) if w % r]
    if uneven:
        raise ValueError(
            f"expected segment lengths that are multiples of their rates, got {uneven}: the official code then moves "
            "rows, which causal attention here does not"
        )
    embedding = found["embed_tokens.weight"]
    vocab_size, width = embedding.shape
    tied = scale_embedding and torch.equal(embedding, found["output_projection.weight"])
    if tied:
        del found["output_projection.weight"]
    if not scale_embedding:  # the model here multiplies by the root
        found["embed_tokens.weight"] = embedding / math.sqrt(width)
    shape |= {"positions": "xpos" if xpos else None, "scale_base": xpos_scale_base, "offsets": "blocked"}
    model = LongNetLM(LongNetConfig(**shape, vocab_size=vocab_size, tie_weights=tied), device="meta")
    for name in [name for name in found if xpos and re.search(r"self_attn\.[qk]_proj\.(weight|bias)$", name)]:
        # Rotated pairs of a head's channels are (2j, 2j + 1) there, (j, j + D / 2) here; logits are sums over pairs.
        heads = found[name].unflatten(0, (model.config.nhead, -1, 2))
        found[name] = heads.transpose(1, 2).flatten(0, 2)
    return model


def _fkodom(
    found: Tensors, source: Source, *, as_initialisation: bool = False, **pattern: Any
) -> tuple[LongNet, list[str]]:
    """The model and its notes, and in `found` the LayerNorms that exist here alone, which start as they are."""
    if not as_initialisation:
        raise ValueError(
            f"expected as_initialisation=True with weights of {source}, got False. No model here computes what its "
            f"weights were trained for: {'; '.join(_FKODOM_DIFFERS)}. They can be a start for training"
        )
    config = LongNetConfig(**_shape(found, "decoder", **pattern) | _shape(found, "encoder", **pattern))
    model = LongNet(config, dtype=next(iter(found.values())).dtype)
    fresh = {name: x for name, x in model.state_dict().items() if name not in found and re.fullmatch(_OURS, name)}
    found |= fresh
    notes = [f"not the numbers of {source}, a start for training: {why}" for why in _FKODOM_DIFFERS]
    return model, notes + [f"new, as a LayerNorm starts: {name}" for name in fresh]


def _shape(
    found: Tensors, stack: str, *, num_heads: int, segment_lengths: Any, dilation_rates: Any, **numbers: Any
) -> dict[str, Any]:
    """Fields of `LongNetConfig`, from the caller and from shapes; `load_into` finds missing weights.
    `numbers` are activation and layer_norm_eps."""
    fields: dict[str, Any] = {"nhead": num_heads, "positions": None, **numbers}
    for name, values in (("segment_lengths", segment_lengths), ("dilation_rates", dilation_rates)):
        fields[name] = check.check_positive_ints(name, values)
    if layers := count_layers(found, stack):
        fields[f"num_{stack}_layers"] = layers
    first = found.get(f"{stack}.layers.0.ffn.fc1.weight")
    if first is not None and first.dim() == 2:
        fields |= {"dim_feedforward": first.shape[0], "d_model": first.shape[1]}
    return fields
