"""What both passes of the gradient need of each query besides q and dO, laid out as their tiles read it."""

import triton
import triton.language as tl

from dilated_attention_pytorch.kernels.triton import attention_backward, softmax


@triton.jit(do_not_specialize=["num_queries", "num_heads", "num_sequences", "padded"])
def residue_terms_kernel(
    out, grad_out, lse, grad_lse, terms_0, terms_1, terms_2, terms_3, terms_4, out_strides, grad_strides,
    num_queries, num_heads, num_sequences, padded, STRIDES: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The lse in units of log2 (+inf where it is -inf) and `delta = rowsum(out * dO) - grad_lse` of each row.

    Args:
        lse, grad_lse: `(B, H, N)`, contiguous; the latter None where nobody used the lse.
        terms_0, ..: for each of STRIDES, `[2, B * H, stride, padded // stride]`: the rows of one residue side by side.
            What lies past a residue's last row stays unwritten.
        num_sequences: B * H.
    """
    # Heads lie side by side in memory: programs that run together read whole rows.
    head, tile = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    num_tiles = tl.cdiv(num_queries, BM)
    batch, tile = (tile // num_tiles).to(tl.int64), tile % num_tiles
    rows = tile * BM + tl.arange(0, BM)
    inside = rows < num_queries
    rows64 = rows.to(tl.int64)
    delta = attention_backward.rowsum(out, grad_out, out_strides, grad_strides, batch, head, rows64, inside, D, D)
    sequence = batch * num_heads + head
    at = sequence * num_queries + rows
    row_lse = softmax.load_lse(lse + at, inside)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + at, mask=inside, other=0.0)
    terms = (terms_0, terms_1, terms_2, terms_3, terms_4)
    apart = num_sequences.to(tl.int64) * padded
    for i in tl.static_range(len(STRIDES)):
        to = terms[i] + (sequence * STRIDES[i] + rows % STRIDES[i]) * (padded // STRIDES[i]) + rows // STRIDES[i]
        tl.store(to, row_lse, mask=inside)
        tl.store(to + apart, delta, mask=inside)
