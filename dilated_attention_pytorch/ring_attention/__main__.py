"""Prints the bytes that ring attention moves for a given length, world size and pattern, before anything runs.

    python -m dilated_attention_pytorch.ring_attention --seq-len 1048576 --world-size 8 \\
        --segment-lengths 2048 262144 1048576 --dilation-rates 1 8 32 --heads 32 --head-dim 128
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.ring_attention.plan import RingPlan, closed_form_units, equal_bounds, unit_bytes


def describe(
    pattern: DilatedPattern, seq_len: int, world_size: int, head_dim: int, *, batch: int = 1, element_size: int = 2,
    is_causal: bool = False,
) -> str:  # fmt: skip
    """The bytes of one layer's forward, rank by rank, beside what dense K and V would cost."""
    bounds = equal_bounds(seq_len, world_size)
    per_unit = unit_bytes(batch, head_dim, element_size)
    lines = [f"{'rank':>4} {'shard':>22} {'receives MiB':>13} {'sends MiB':>10} {'dense MiB':>10}"]
    for rank in range(world_size):
        plan = RingPlan(pattern, bounds, rank, is_causal)
        start, stop = plan.shard
        dense = (seq_len - stop + start) * pattern.num_heads * per_unit
        sizes = (plan.received_bytes(batch, head_dim, element_size), plan.sent_bytes(batch, head_dim, element_size))
        received, sent, dense_mib = (x / 2**20 for x in (*sizes, dense))
        lines.append(f"{rank:>4} {f'[{start}, {stop})':>22} {received:13.3f} {sent:10.3f} {dense_mib:10.3f}")
    closed = None if is_causal else closed_form_units(pattern, seq_len, world_size)
    lines.append(
        f"closed form: {'does not apply' if closed is None else f'{closed * per_unit / 2**20:.3f} MiB a rank'}"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints `describe` for a pattern given on the command line."""
    parser = argparse.ArgumentParser(description="Bytes that ring attention moves in one layer's forward.")
    parser.add_argument("--seq-len", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--segment-lengths", type=int, nargs="+", required=True)
    parser.add_argument("--dilation-rates", type=int, nargs="+", required=True)
    parser.add_argument("--heads", type=int, required=True, help="key/value heads")
    parser.add_argument("--head-dim", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--element-size", type=int, default=2, help="bytes of a K or V element")
    parser.add_argument("--offsets", choices=["modulo", "blocked"], default="modulo")
    parser.add_argument("--causal", action="store_true")
    given = parser.parse_args(arguments)
    pattern = DilatedPattern(
        tuple(given.segment_lengths), tuple(given.dilation_rates), given.heads, offsets=given.offsets
    )
    sizes = {"batch": given.batch, "element_size": given.element_size, "is_causal": given.causal}
    print(describe(pattern, given.seq_len, given.world_size, given.head_dim, **sizes))


if __name__ == "__main__":
    main()
