"""Registration with transformers, under one name."""

from __future__ import annotations

from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from dilated_attention_pytorch.core.messages import quoted
from dilated_attention_pytorch.integrations.longnet import register_longnet
from dilated_attention_pytorch.integrations.transformers import hooks
from dilated_attention_pytorch.integrations.transformers.layers import attention
from dilated_attention_pytorch.integrations.transformers.masks import mask
from dilated_attention_pytorch.integrations.transformers.pattern import NAME


def register() -> None:
    """Register `attn_implementation="dilated"` and the model type `longnet`; may be called again.

    A model's config then names the pattern: `dilated_segment_lengths` and `dilated_dilation_rates`, each a list with an
    entry per branch, or a list of such lists with an entry per layer, None for a layer that stays dense. Optional are
    `dilated_offsets` (`"modulo"`), `dilated_segment_shift` (0; a number, one per layer or `"alternate"`),
    `dilated_mixing_gradient` (`"exact"`), `dilated_backend` (`"auto"`) and `dilated_stack` (`"encoder"` or `"decoder"`,
    for that part alone). With grouped heads, offsets are counted over
    key/value heads.

    A config with a pattern loads as a dilated model unless `attn_implementation` names another attention.

    Raises:
        ValueError: another function has taken the name `"dilated"`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> register()
        >>> config = LlamaConfig(
        ...     vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        ...     num_attention_heads=4,
        ...     num_key_value_heads=2, dilated_segment_lengths=[16, 64],
        ...     dilated_dilation_rates=[1, 4],
        ... )
        >>> model = LlamaForCausalLM._from_config(config, attn_implementation="dilated")
        >>> model(torch.randint(99, (1, 200))).logits.shape
        torch.Size([1, 200, 99])
    """
    for interface, ours in ((AttentionInterface(), attention), (AttentionMaskInterface(), mask)):
        known = interface.get(NAME)
        if known not in (None, ours):
            raise ValueError(
                f"expected the attention name {NAME!r} to be free, got {quoted(known)} registered under it"
            )
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    hooks.install()
    register_longnet()
