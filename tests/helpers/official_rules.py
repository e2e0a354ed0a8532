"""What the official slide encoder computes, written down plainly from its description; no code of the library in it.

Sources: the rules of zero keys and of the scatter (docs/spec.md section 5 and `core/zero_keys.py` say them in words),
and the architecture of Prov-GigaPath's `LongNetViT`. Everything is dense and slow, in whatever dtype the inputs have.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Branches = list[tuple[int, int]]  # (segment length, dilation rate)
SLIDE: Branches = [(1024, 1), (5792, 2), (32768, 4), (185363, 8), (1048576, 16)]
SLIDE_250000: Branches = [(1024, 1), (4870, 2), (23170, 4), (110217, 8), (524288, 16)]


def attention(q: Tensor, k: Tensor, v: Tensor, branches: Branches, *, causal: bool = False) -> Tensor:
    """Gather, attend, scatter and mix, for `(N, H, D)`."""
    n, heads, width = q.shape
    outs, lses = [], []
    for w, r in branches:
        g = min(w, n)  # a segment is never longer than the sequence
        segments, slots = -(-n // g), -(-g // r)
        out_rows, lse_rows = [], []
        for h in range(heads):
            o = h // -(-heads // r)  # heads share offsets in blocks

            rows = []
            for x in (q * width**-0.5, k, v):  # filled up with rows of zeros: (segments, slots, D)
                x = F.pad(x[:, h], (0, 0, 0, segments * g - n)).view(segments, g, width)
                rows.append(F.pad(x, (0, 0, 0, slots * r - g))[:, o::r])
            s = rows[0] @ rows[1].transpose(1, 2)
            if causal:
                s = s.masked_fill(torch.ones(slots, slots).tril() == 0, -torch.inf)
            mine, total = s.softmax(-1) @ rows[2], s.detach().logsumexp(-1)  # constants to the gradient
            one_hot = F.one_hot(torch.tensor(o), r).to(q.dtype)
            out_rows.append(mine[:, :, None] * one_hot[:, None])
            # -1e8 is "not kept", and so is a log-sum-exp of exactly 0.
            lse_rows.append(torch.where((one_hot == 1) & (total != 0)[..., None], total[..., None], -1e8))
        # Slot (s, j) is written to s * slots * r + j * r + o, although it was read from s * g + j * r + o.
        out, lse = torch.stack(out_rows), torch.stack(lse_rows)
        outs.append(out.flatten(1, 3)[:, :n])
        lses.append(lse.flatten(1, 3)[:, :n])
    weights = torch.stack(lses).softmax(0)
    mixed = sum(weight[..., None] * out for weight, out in zip(weights, outs, strict=True))
    return mixed.transpose(0, 1)


def position(coords: Tensor, width: int) -> Tensor:
    """The rows of the table of 1,000 x 1,000 places: a code of y, then a code of x."""
    number = (coords[:, 0] // 256) * 1000 + coords[:, 1] // 256
    omega = 1.0 / 10000.0 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    codes = [at.double()[:, None] * omega for at in (number % 1000, number // 1000)]
    return torch.cat([part for code in codes for part in (code.sin(), code.cos())], 1)


def encode(
    state: dict[str, Tensor], tiles: Tensor, coords: Tensor, branches: Branches, heads: int, global_pool: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """One slide, `(L, in_chans)`: the last output, and the outputs of all hidden states."""

    def norm(x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def outcome(x: Tensor) -> Tensor:
        return norm(x[1:].mean(0), "norm", 1e-6) if global_pool else norm(x, "norm", 1e-6)[0]

    x = linear(tiles, "patch_embed.proj")
    x = x + position(coords, x.shape[-1]).to(x.dtype)
    x = torch.cat((state["cls_token"][0], x))
    hidden = [x]
    depth = sum(name.endswith("self_attn.q_proj.weight") for name in state)
    for i in range(depth):
        layer = f"encoder.layers.{i}"
        h = norm(x, f"{layer}.self_attn_layer_norm")
        q, k, v = (linear(h, f"{layer}.self_attn.{p}_proj").unflatten(-1, (heads, -1)) for p in "qkv")
        h = norm(attention(q, k, v, branches).flatten(1), f"{layer}.self_attn.inner_attn_ln")
        x = x + linear(h, f"{layer}.self_attn.out_proj")
        h = F.gelu(linear(norm(x, f"{layer}.final_layer_norm"), f"{layer}.ffn.fc1"))
        x = x + linear(norm(h, f"{layer}.ffn.ffn_layernorm"), f"{layer}.ffn.fc2")
        hidden.append(x)
    return outcome(norm(x, "encoder.layer_norm")), [outcome(h) for h in hidden]
