"""The pattern of a layer, as a model's config holds it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from dilated_attention_pytorch.core.messages import quoted

NAME = "dilated"
WITH = f"with attn_implementation={NAME!r}"
NEEDED = ("dilated_segment_lengths", "dilated_dilation_rates")
# One branch over everything: dense attention, of any length.
DENSE_LENGTH = 1 << 40
_DENSE = ([DENSE_LENGTH], [1])


class LayerPattern(NamedTuple):
    """Segment lengths and dilation rates of one layer, one of each per branch."""

    segment_lengths: list[int]
    dilation_rates: list[int]

    @classmethod
    def of(cls, module: nn.Module) -> LayerPattern:
        """The pattern that a module's config has for it; dense if the config leaves this layer out.

        Raises:
            ValueError: a config without a pattern, or with one per layer that does not fit the module.
        """
        config: Any = getattr(module, "config", None)
        name, owner = type(module).__name__, type(config).__name__
        if missing := [field for field in NEEDED if getattr(config, field, None) is None]:
            raise ValueError(
                f"expected {' and '.join(missing)} in the {owner} of {name}, got none: name the pattern in the config, "
                "or call use_dilated_attention(model, segment_lengths, dilation_rates)"
            )
        if (stack := getattr(config, "dilated_stack", None)) is not None:
            is_decoder = getattr(module, "is_decoder", None)
            if stack not in ("encoder", "decoder") or is_decoder is None:
                raise ValueError(
                    "expected dilated_stack 'encoder' or 'decoder', of layers that know which one they are in, got "
                    f"{quoted(stack)} in the {owner} of {name} with is_decoder={is_decoder}"
                )
            if is_decoder != (stack == "decoder"):
                return cls(*_DENSE)
        lengths, rates = (getattr(config, field) for field in NEEDED)
        if not is_per_layer(lengths) and not is_per_layer(rates):
            return cls(lengths, rates)
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or not index < len(lengths) == len(rates):
            raise ValueError(
                f"expected one entry per layer in dilated_segment_lengths and dilated_dilation_rates, and a layer that "
                f"knows its index, got {len(lengths)} and {len(rates)} entries in the {owner} of {name} with layer_idx="
                f"{index}"
            )
        if (lengths[index] is None) != (rates[index] is None):
            raise ValueError(
                f"expected segment lengths and dilation rates for the same layers, got {lengths[index]} and "
                f"{rates[index]} for layer {index}"
            )
        return cls(*_DENSE) if lengths[index] is None else cls(lengths[index], rates[index])


def is_per_layer(values: object) -> bool:
    """True for a list with one entry per layer, each a list or None; False for one list of ints for all layers."""
    return isinstance(values, (list, tuple)) and any(x is None or isinstance(x, (list, tuple)) for x in values)


def setting(config: object, name: str) -> Any:
    """A field of transformers' own; None where a config does not have it, or has one per layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # what a config whose layers differ raises for it
        return None


def has_pattern(config: object) -> bool:
    """True if a config names segment lengths and dilation rates."""
    return all(getattr(config, field, None) is not None for field in NEEDED)
