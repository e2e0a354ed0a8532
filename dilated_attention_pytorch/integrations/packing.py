"""Documents packed into rows, as transformers' collators and models describe them, and their bounds for the op.

Nothing here branches on values while a graph is traced: a traced call is packed, into one document per row or more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dilated_attention_pytorch.core import torch_private


def documents(position_ids: Tensor, real: Tensor | None = None) -> Tensor | None:
    """Number the documents of each row, which begin where positions do not go on by one.

    A hidden token is a document of its own, so that nobody sees it. Positions go on behind hidden tokens if they count
    them, or if they do not.

    Args:
        position_ids: int `(B, T)`.
        real: bool `(B, T)`, True = real; None if nothing is hidden.

    Returns:
        int32 `(B, T)`, equal within a document and rising along a row; None if no row holds two documents. A traced
        call cannot tell, and always gets numbers.

    Raises:
        ValueError: packed documents with hidden tokens inside one. A traced call raises when it runs, and for a single
            document too.
    """
    index = torch.arange(position_ids.shape[1], device=position_ids.device)
    before = index - 1  # of each token, the last real one before it; -1 for none
    if real is not None:
        before = torch.where(real, index, -1).cummax(1).values.roll(1, 1)
        before[:, 0] = -1
    before = before.expand(position_ids.shape)
    step = position_ids - position_ids.gather(1, before.clamp(min=0))
    goes_on = (before >= 0) & ((step == 1) | (step == index - before))
    begins = ~goes_on
    if real is None:
        if is_readable(begins) and not bool(begins[:, 1:].any()):
            return None
    else:
        packed = begins & real & (before >= 0)
        if is_readable(begins) and not bool(packed.any()):
            return None
        check(
            ~(goes_on & real & (before < index - 1)).any(),
            "expected packed position_ids with an attention_mask that hides no token inside a document: pad between "
            "documents, or give each a row",
        )
        begins = begins | ~real
    return begins.cumsum(1, dtype=torch.int32)


def bounds(numbers: Tensor) -> Tensor:
    """`cu_seqlens` of documents numbered as `documents` does, over all tokens of all rows.

    Returns:
        int32 `(documents + 1,)`; `(B * T + 1,)` for a traced call, whose graph then serves any documents: the last
        ones are empty.
    """
    begins = torch.ones_like(numbers, dtype=torch.bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    # A last flag marks the end of all tokens; none of what follows makes a constant of a traced length.
    begins = torch.nn.functional.pad(begins.flatten(), (0, 1), value=True)
    index = torch.arange(begins.shape[0], device=begins.device)
    starts = index[begins] if is_readable(begins) else index.where(begins, index[-1]).sort().values
    return starts.to(torch.int32)


def documents_within(cu_seqlens: Tensor, total: int) -> Tensor:
    """Number the documents of one row, int32 `(1, total)`, from their bounds `(documents + 1,)`."""
    index = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True, out_int32=True)[None]


def is_readable(x: Tensor) -> bool:
    """True if a branch may depend on the values of x: while a graph is traced none may, and a meta tensor has none."""
    return not torch.compiler.is_compiling() and not torch_private.is_fake(x) and not x.is_meta


def check(holds: Tensor, message: str) -> None:
    """Raise ValueError unless a bool scalar holds; a traced graph raises RuntimeError when it runs."""
    if not is_readable(holds):
        torch_private.check_in_graph(holds, message)
    elif not holds:
        raise ValueError(message)
