"""Says, once, that a context is longer than what can reach it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from dilated_attention_pytorch._deprecated import warn_user
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.reach import MOST_POSITIONS
from dilated_attention_pytorch.core.validation import check_bool

_warned: set[tuple[object, ...]] = set()


@lru_cache(maxsize=64)
def out_of_reach(
    pattern: DilatedPattern, shifts: tuple[int, ...], seq_len: int, *, is_causal: bool = True
) -> str | None:
    """What to know and to do where no position of a sequence knows all of it; None where one does.

    Args:
        pattern: the branches, for the key/value heads.
        shifts: segment shift of each layer.
        seq_len: N; beyond 2^27 positions the question is asked of those.
        is_causal: whether queries see no later keys.
    """
    found = pattern.reach(len(shifts), min(seq_len, MOST_POSITIONS), is_causal=is_causal, segment_shift=shifts)
    if found.best >= min(seq_len, MOST_POSITIONS) - 1:
        return None
    return (
        f"the context of {seq_len:,} positions is longer than what can reach it: with segments of "
        f"{', '.join(f'{w:,}' for w in pattern.segment_lengths)} and {len(shifts)} layers, no position depends on an "
        f"input more than {found.best:,} positions away, half of them on none more than {found.median:,} away, and the "
        f"worst on none more than {found.worst:,} away. Segments of DilatedPattern.geometric reach everything, "
        "segment_shift='alternate' adds half of the largest segment per layer, and `dilated-attention plan --suggest "
        f"{seq_len}` compares them"
    )


def warn_out_of_reach(pattern: DilatedPattern, shifts: Sequence[int], seq_len: int, *, is_causal: bool = True) -> None:
    """Gives one UserWarning per process and pattern, at the user's line; arguments as in `out_of_reach`."""
    # A traced length is not looked at; and where one segment holds all, nothing is, call by call.
    if type(seq_len) is not int or max(pattern.segment_lengths) >= seq_len + max(shifts, default=0) or not shifts:
        return
    key = pattern, tuple(shifts), check_bool("is_causal", is_causal)
    if key in _warned:
        return
    message = out_of_reach(pattern, tuple(shifts), seq_len, is_causal=is_causal)
    if message is not None:
        warn_user(message, UserWarning)
        _warned.add(key)  # after the warning: where a filter makes it an error, it is one every time
