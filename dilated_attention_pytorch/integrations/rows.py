"""Where the sequences of a batch lie, told from the arguments that transformers' models take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core.validation import check_dense, check_values
from dilated_attention_pytorch.integrations.packing import bounds, check, documents


class Rows(NamedTuple):
    """The rows of a batch: whole ones (all None), padded ones, or documents packed into them (`cu_seqlens` alone)."""

    key_padding_mask: Tensor | None = None  # bool (B, tokens), True = real
    row_start: Tensor | None = None  # int (B,), first real position; a row without one has them all before it
    cu_seqlens: Tensor | None = None  # int (documents + 1,), over all tokens of all rows

    @classmethod
    def padded(cls, attention_mask: Tensor | None, shape: tuple[int, int] | None = None) -> Rows:
        """Rows of a mask `(B, tokens)`, 1 = real, with the shape of these where it is known.

        Reading it makes the host wait; a traced one is taken as it is.
        """
        if attention_mask is None:
            return cls()
        check_values("attention_mask", attention_mask)
        if attention_mask.dim() != 2 or (shape is not None and attention_mask.shape != shape):
            wanted = "(B, tokens)" if shape is None else shape
            raise ValueError(f"expected attention_mask of shape {wanted}, got {tuple(attention_mask.shape)}")
        if not torch.compiler.is_compiling() and bool(attention_mask.all()):
            return cls()
        real = attention_mask != 0  # a tensor of its own, which a gradient may keep
        return cls(real, (real.cumsum(1) == 0).sum(1))

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        *,
        seq_idx: Tensor | None = None,
        cu_seq_lens: Tensor | None = None,
        cached: bool = False,
    ) -> Rows:
        """The rows of (B, T) tokens. Bounds tell of packing, else numbers of documents, else positions.

        Args:
            shape: B and T.
            attention_mask: `(B, T)`, 1 = real; with a cache longer, its tokens in front.
            position_ids: int `(B, T)` or `(1, T)`: a document begins where they do not go on by one.
            seq_idx: int `(B, T)`, the number of each token's document.
            cu_seq_lens: int `(documents + 1,)`, bounds of the documents of one row.
            cached: whether they go through a cache, which takes whole rows and padding on the left.

        Raises:
            ValueError: what does not go together. A traced call raises a RuntimeError when it runs.
        """
        rows = cls.padded(attention_mask, None if cached else shape)
        real = None if rows.key_padding_mask is None else rows.key_padding_mask[:, -shape[1] :]
        packed = cu_seq_lens is not None or seq_idx is not None
        if packed and real is not None:
            check(real.all(), "expected no 0 in an attention_mask beside cu_seq_lens_q or seq_idx, got some")
        if cached and packed:
            raise ValueError("expected one sequence per row with a cache, got cu_seq_lens_q or seq_idx")
        if cu_seq_lens is not None:
            if shape[0] != 1:
                raise ValueError(f"expected one row with cu_seq_lens_q, got {shape[0]}")
            return cls(cu_seqlens=cu_seq_lens)
        numbers, of_each = None, position_ids if seq_idx is None else seq_idx
        if of_each is not None and shape[1] > 1:
            name = "position_ids" if seq_idx is None else "seq_idx"
            check_dense(name, of_each)
            if of_each.shape not in ((1, shape[1]), shape):
                raise ValueError(f"expected {name} of shape {shape}, got {tuple(of_each.shape)}")
            of_each = of_each.expand(shape)
            numbers = documents(of_each, real) if seq_idx is None else of_each
        if cached:
            if numbers is not None:
                last = numbers == numbers[:, -1:]
                message = "expected one sequence per row with a cache, got packed position_ids"
                check((last if real is None else last | ~real).all(), message)
            check(rows.left(), "expected padding on the left alone with a cache, got an attention_mask with 0 after 1")
            return rows
        return rows if numbers is None else cls(cu_seqlens=bounds(numbers))

    def left(self) -> Tensor:
        """True if only positions before a row's first real one are hidden."""
        if self.key_padding_mask is None or self.row_start is None:
            return torch.tensor(True, device="cpu")
        positions = torch.arange(self.key_padding_mask.shape[1], device=self.row_start.device)
        return (self.key_padding_mask == (positions >= self.row_start[:, None])).all()

    def suit_a_cache(self) -> bool:
        """Whether a cache may be made unasked: a traced call cannot tell, and gets none."""
        return not torch.compiler.is_compiling() and self.cu_seqlens is None and bool(self.left())
