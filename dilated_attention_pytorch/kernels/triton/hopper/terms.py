"""What both passes of the gradient need of each query, laid out as their tiles read it."""

import triton
import triton.language as tl

from dilated_attention_pytorch.kernels.triton import softmax


@triton.jit(do_not_specialize=["num_queries", "rate", "length", "num_sequences"])
def residue_terms_kernel(lse, delta, terms, num_queries, rate, length, num_sequences, BM: tl.constexpr):
    """The lse in units of log2 (+inf where it is -inf) and delta of each row, as `[2, B * H, rate, length]`: the rows
    of one residue side by side. What lies past a residue's last row stays unwritten."""
    num_tiles = tl.cdiv(num_queries, BM)
    tile, sequence = tl.program_id(0) % num_tiles, (tl.program_id(0) // num_tiles).to(tl.int64)
    rows = tile * BM + tl.arange(0, BM)
    inside = rows < num_queries
    at = sequence * num_queries + rows
    to = (sequence * rate + rows % rate) * length + rows // rate
    tl.store(terms + to, softmax.load_lse(lse + at, inside), mask=inside)
    to += num_sequences.to(tl.int64) * rate * length
    tl.store(terms + to, tl.load(delta + at, mask=inside, other=0.0), mask=inside)
