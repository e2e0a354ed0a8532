"""One sequence over many ranks for a switched model: ring attention in its layers, and batches cut into shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from dilated_attention_pytorch.core import torch_private
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.integrations.transformers.masks import Form
from dilated_attention_pytorch.integrations.transformers.pattern import WITH
from dilated_attention_pytorch.ring_attention import RingAttentionConfig, RingDilatedAttention
from dilated_attention_pytorch.types import QKV

_GROUP = "_dilated_group_name"  # of an attention layer; the name alone, so that a model can be copied
IGNORED = -100  # a label of no loss, as everywhere in transformers


def set_group(layers: list[nn.Module], group: ProcessGroup | None) -> None:
    """Let attention layers share each sequence over a group's ranks; with None they take whole sequences again."""
    for layer in layers:
        setattr(layer, _GROUP, "" if group is None else str(group.group_name))


def is_sharded(module: nn.Module) -> bool:
    """Whether an attention layer gets shards of sequences."""
    return bool(getattr(module, _GROUP, ""))


def check_shards(module: nn.Module, form: Form | None, queries: int, keys: int) -> None:
    """Raise a ValueError for attention that a rank cannot compute from its shard."""
    what = None
    if form is None:
        what = "a window, chunks or cross-attention"
    elif form.cu_seqlens is not None:
        what = "packed documents"
    elif queries != keys:
        what = f"a cache, {queries} queries over {keys} keys"
    if what is not None:
        raise ValueError(
            f"expected whole sequences, padded on the right at most, in {type(module).__name__} {WITH} and a "
            f"process_group, got {what}"
        )


def ring(module: nn.Module, x: QKV, pattern: DilatedPattern, form: Form, **options: Any) -> Tensor:
    """Attention of a rank's shard, `(B, n, H, D)`; options are further fields of `RingAttentionConfig`."""
    lengths, rates = pattern.segment_lengths, pattern.dilation_rates
    config = RingAttentionConfig(segment_lengths=lengths, dilation_rates=rates, offsets=pattern.offsets, **options)
    group = torch_private.process_group(getattr(module, _GROUP))
    return RingDilatedAttention(config, group)(*x, form.is_causal, form.real)  # type: ignore[no-any-return]


class ShardingCollator:
    """A data collator that gives this rank its shard of every sequence, with positions and labels of the whole.

    All ranks of the group have to collate the same examples. The shard has `input_ids`, `position_ids` and, where the
    batch has labels, `shift_labels` (each position's next token), the same as `labels`, and `num_items_in_batch`: the
    model's loss is then this rank's sum of losses, scaled so that the mean over the ranks is the mean over tokens, as
    FSDP and DDP average gradients.

    Args:
        process_group: of the ranks that share a sequence.
        collator: makes a batch of whole sequences, padded on the right, such as `DataCollatorForLanguageModeling`.

    Raises:
        ValueError: a length that the ranks do not divide (`pad_to_multiple_of` of most collators), padding on the left,
            an entry of the batch that is no row of tokens.

    Example:
        >>> whole = DataCollatorForLanguageModeling(tokenizer, mlm=False)  # doctest: +SKIP
        >>> collate = ShardingCollator(group, whole)  # doctest: +SKIP
    """

    def __init__(self, process_group: ProcessGroup, collator: Callable[[Any], Mapping[str, Any]]) -> None:
        self.rank, self.size, self.collator = process_group.rank(), process_group.size(), collator

    def __call__(self, examples: Any) -> dict[str, Tensor]:
        """The shard `(B, N / ranks)` of the batch of some examples."""
        batch = dict(self.collator(examples))
        length = batch["input_ids"].shape[1]
        if length % self.size:
            raise ValueError(
                f"expected a length that is a multiple of {self.size} ranks, got {length}: give the collator "
                f"pad_to_multiple_of={self.size}"
            )
        if (labels := batch.pop("labels", None)) is not None:
            # Shifted before the cut: the last label of a shard is the first token of the next one.
            shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
            batch |= {"labels": shifted, "shift_labels": shifted}
        mask = batch.get("attention_mask")
        if mask is not None and not bool((mask[:, 1:] <= mask[:, :-1]).all()):
            raise ValueError("expected padding on the right alone, got an attention_mask with 1 after 0")
        if mask is None or bool(mask.all()):
            batch.pop("attention_mask", None)
        batch.setdefault("position_ids", torch.arange(length, device="cpu")[None])
        for name, x in batch.items():
            if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != length:
                shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"expected {name} of shape (B, {length}), got {shape}")
        n = length // self.size
        shard = {name: x[:, self.rank * n : (self.rank + 1) * n].contiguous() for name, x in batch.items()}
        if labels is not None:
            shard["num_items_in_batch"] = (shifted != IGNORED).sum() / self.size
        return shard
