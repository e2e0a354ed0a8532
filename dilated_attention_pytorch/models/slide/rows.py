"""The rows of a batch of slides while it is encoded: padded, packed, or sharded over ranks."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch.core import torch_private
from dilated_attention_pytorch.core.precision import accumulator
from dilated_attention_pytorch.models.layers import RowMask


def as_tensor(name: str, x: Any, device: torch.device) -> Any:
    """A NumPy array as a tensor on the device; anything else as it is, for the checks that follow."""
    if isinstance(x, Tensor) or not hasattr(x, "__array_interface__"):
        return x
    try:
        return torch.tensor(x, device=device)  # a copy: an array may be read-only
    except (TypeError, ValueError) as error:
        raise TypeError(f"expected {name} of a dtype that torch has, got an array of {x.dtype}") from error


class SlideRows(NamedTuple):
    """The rows of one batch of slides, cls tokens included.

    Slides of different lengths, padded on the right, are packed: every row is real, and each slide gives what it gives
    alone, in either padding mode. A mask with holes hides keys and moves no position.
    """

    num_slides: int  # B
    num_tiles: int  # L of the padded batch
    mask: Tensor | None = None  # bool (B, rows), True = real; None where all are, or when packed
    kept: Tensor | None = None  # int64 (total,), rows of the packed batch in the flat one; None when not packed
    bounds: tuple[int, ...] | None = None  # first row of each packed slide, and the end; None when not packed
    ends: Tensor | None = None  # int64 (B,), rows of each slide, with its padding packed as a sequence of its own
    has_cls: bool = True  # whether row 0 is the cls token; of a sharded slide it is on the first rank alone

    @classmethod
    def of(
        cls, num_slides: int, num_tiles: int, mask: Tensor | None, *, has_cls: bool, pack: bool, zero_keys: bool
    ) -> SlideRows:
        """The rows for a mask of tiles `(B, L)`, True = real. A graph does not look at it: then only zero keys, whose
        number follows from a slide's own length, need the slides packed, and padding is packed with them."""
        traced = torch.compiler.is_compiling()
        if mask is None or (pack and not traced and bool(mask.all())):
            return cls(num_slides, num_tiles, has_cls=has_cls)
        full = torch.cat((mask.new_ones(num_slides, 1), mask), 1) if has_cls else mask
        lengths = full.sum(1)
        if traced:
            if not (pack and zero_keys):
                return cls(num_slides, num_tiles, full, has_cls=has_cls)
            on_the_right = full == (torch.arange(full.shape[1], device=mask.device) < lengths[:, None])
            torch_private.check_in_graph(on_the_right.all(), "expected mask to be padded on the right")
            return cls(num_slides, num_tiles, full, ends=lengths)
        if pack and bool((full == (torch.arange(full.shape[1], device=mask.device) < lengths[:, None])).all()):
            bounds = (0, *itertools.accumulate(lengths.tolist()))
            return cls(num_slides, num_tiles, None, full.flatten().nonzero()[:, 0], bounds)
        return cls(num_slides, num_tiles, full, has_cls=has_cls)

    def lay_out(self, x: Tensor) -> Tensor:
        """`(B, rows, D)` as the layers take it: packed `(total, D)`, or unchanged."""
        if self.ends is not None:
            # A copy: torch 2.13 cannot unflatten what it has concatenated at a length that it does not know.
            return x.flatten(0, 1).clone(memory_format=torch.contiguous_format)
        return x if self.kept is None else x.flatten(0, 1).index_select(0, self.kept)

    def options(self, device: torch.device) -> RowMask:
        """The mask or the bounds, as the layers take them."""
        if self.ends is not None:
            starts = (self.num_tiles + 1) * torch.arange(self.num_slides + 1, device=device)
            bounds = torch.stack((starts[:-1], starts[:-1] + self.ends), 1).flatten()
            return {"cu_seqlens": torch.cat((bounds, starts[-1:]))}
        if self.bounds is not None:
            return {"cu_seqlens": torch.tensor(self.bounds, dtype=torch.int32, device=device)}
        return {"key_padding_mask": self.mask}

    def per_row(self, factors: Tensor) -> Tensor:
        """Makes factors `(..., B)`, one per slide, broadcast to the rows."""
        if self.ends is not None:
            return factors.repeat_interleave(self.num_tiles + 1, -1)[..., None]
        if self.bounds is None:
            return factors[..., None, None]
        lengths = torch.tensor(self.bounds, device=factors.device).diff()
        return factors.repeat_interleave(lengths, -1, output_size=self.bounds[-1])[..., None]

    def cls_rows(self, h: Tensor) -> Tensor:
        """The cls token's row of each slide, `(B, D)`."""
        assert self.has_cls
        h = self._by_slide(h)
        return h[:, 0] if self.bounds is None else h[torch.tensor(self.bounds[:-1], device=h.device)]

    def tile_sums(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over each slide's real tiles `(B, D)`, in fp32 (fp64), and how many those are, `(B, 1)`."""
        dtype = accumulator(h.dtype)
        if self.bounds is not None:
            slides = itertools.pairwise(self.bounds)
            sums = torch.stack([h[start + 1 : stop].sum(0, dtype=dtype) for start, stop in slides])
            return sums, torch.tensor(self.bounds, device=h.device).diff()[:, None] - 1
        h = self._by_slide(h)
        tiles = h[:, 1:] if self.has_cls else h
        if self.mask is None:
            return tiles.sum(1, dtype=dtype), torch.full((self.num_slides, 1), tiles.shape[1], device=h.device)
        real = self.mask[:, 1:] if self.has_cls else self.mask
        return tiles.masked_fill(~real[..., None], 0.0).sum(1, dtype=dtype), real.sum(1, keepdim=True)

    def tiles(self, h: Tensor) -> Tensor:
        """The tiles' rows in the order of the batch, `(B, L, D)`; zeros where the mask has none."""
        if self.kept is not None:
            flat = h.new_zeros(self.num_slides * (self.num_tiles + 1), h.shape[-1]).index_copy(0, self.kept, h)
            return flat.view(self.num_slides, self.num_tiles + 1, -1)[:, 1:]
        h = self._by_slide(h)
        if self.mask is not None:
            h = h.masked_fill(~self.mask[..., None], 0.0)
        return h[:, 1:] if self.has_cls else h

    def _by_slide(self, h: Tensor) -> Tensor:
        """Rows that are packed with their padding, as `(B, rows, D)`; others unchanged."""
        return h if self.ends is None else h.unflatten(0, (self.num_slides, self.num_tiles + 1))
