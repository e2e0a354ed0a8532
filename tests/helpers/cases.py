"""Attention calls drawn at random: every mode of `docs/spec.md`, any lengths."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dilated_attention_pytorch import dilated_attention_with_lse
from dilated_attention_pytorch.testing import gradient_scale, relative_norm

MODES = ("whole", "partial", "masked", "left_padded", "packed", "dropout", "detached", "zero_keys")
LENGTHS = (1, 2, 3, 5, 7, 13, 16, 31, 33, 64, 97)
SEGMENTS = (1, 2, 3, 4, 7, 8, 16, 20, 33, 64, 200)
RATES = (1, 2, 3, 4, 5, 6, 8, 12)


@dataclass
class Case:
    """One call: tensors' shapes, keyword arguments, and the seed of its data."""

    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    data_seed: int = 0
    uses_lse: bool = False

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.data_seed)
        shapes = self.q_shape, self.k_shape, self.k_shape
        return tuple(torch.randn(s, dtype=torch.float64, generator=generator).to(device, dtype) for s in shapes)

    def run(self, backend: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict[str, Tensor]:
        """out, lse and the gradients under a random cotangent."""
        q, k, v = (x.requires_grad_() for x in self.tensors(dtype, device))
        options = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in self.options.items()}
        out, lse = dilated_attention_with_lse(q, k, v, backend=backend, **options)
        generator = torch.Generator().manual_seed(self.data_seed + 1)
        grad_out = torch.randn(out.shape, dtype=torch.float64, generator=generator).to(device, dtype)
        grad_lse = torch.randn(lse.shape, dtype=torch.float64, generator=generator).to(device, lse.dtype)
        objective = (out * grad_out).sum()
        if self.uses_lse:
            objective = objective + (lse.masked_fill(torch.isneginf(lse), 0.0) * grad_lse).sum()
        dq, dk, dv = torch.autograd.grad(objective, (q, k, v))
        scale = abs(self.options.get("scale", q.shape[-1] ** -0.5))
        used = grad_lse if self.uses_lse else None
        self.scales = {
            "dq": gradient_scale(grad_out, used, v, k, scale),
            "dk": gradient_scale(grad_out, used, v, q, scale),
        }
        return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}

    def errors(self, got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
        """The relative norm of each result; `run` must have been called before."""
        return {name: relative_norm(got[name], want[name], scale=self.scales.get(name, 0.0)) for name in want}


SHIFTS = (1, 2, 5, 8, 16, 24, 32, 64, 100, 300)


@st.composite
def shifted(draw: st.DrawFn, mode: str) -> Case:
    """The same with a segment shift, half of the time one that branches of the pattern divide."""
    case = draw(cases(mode))
    lengths = case.options["segment_lengths"]
    multiples = [w * m for w in lengths for m in (1, 3)]
    case.options["segment_shift"] = draw(st.one_of(st.sampled_from(SHIFTS), st.sampled_from(multiples)))
    return case


@st.composite
def cases(draw: st.DrawFn, mode: str) -> Case:
    """Calls of one mode; the other options are drawn too where they go together."""
    branches = draw(st.integers(1, 4))
    n = draw(st.sampled_from(LENGTHS))
    options: dict[str, Any] = {
        "segment_lengths": [draw(st.sampled_from(SEGMENTS)) for _ in range(branches)],
        "dilation_rates": [draw(st.sampled_from(RATES)) for _ in range(branches)],
        "offsets": draw(st.sampled_from(["modulo", "blocked"])),
        "is_causal": mode != "zero_keys" and draw(st.booleans()),
    }
    kv_heads, group = draw(st.sampled_from([1, 2, 3, 5])), draw(st.sampled_from([1, 1, 2, 3]))
    batch, width = draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 5]))
    if mode in ("dropout", "detached", "zero_keys"):
        # These three combine with how the sequence is given.
        layouts = (
            ["whole", "packed"] if mode == "zero_keys" else ["whole", "partial", "masked", "left_padded", "packed"]
        )
        options |= {
            "dropout": {"dropout_p": 0.4, "seed": draw(st.integers(-(2**62), 2**62))},
            "detached": {"mixing_gradient": "detached"},
            "zero_keys": {"padding": "zero_keys", "mixing_gradient": draw(st.sampled_from(["exact", "detached"]))},
        }[mode]
        mode = draw(st.sampled_from(layouts))
    queries = keys = n
    if mode == "partial":
        start, stop = sorted((draw(st.integers(0, n)), draw(st.integers(0, n))))
        k_start, k_stop = sorted((draw(st.integers(0, n)), draw(st.integers(0, n))))
        options |= {"q_start": start, "k_start": k_start, "seq_len": n}
        queries, keys = stop - start, k_stop - k_start
    if mode == "masked" or (mode in ("partial", "left_padded") and draw(st.booleans())):
        bits = draw(st.lists(st.booleans(), min_size=batch * n, max_size=batch * n))
        options["key_padding_mask"] = torch.tensor(bits).reshape(batch, n)
    if mode == "left_padded" or (mode == "partial" and draw(st.booleans())):
        starts = draw(st.lists(st.integers(0, n), min_size=batch, max_size=batch))
        options["row_start"] = torch.tensor(starts)
    shapes = (batch, queries, kv_heads * group, width), (batch, keys, kv_heads, width)
    if mode == "packed":
        inner = draw(st.lists(st.integers(0, n), max_size=3))
        options["cu_seqlens"] = torch.tensor(sorted([0, n, *inner]), dtype=torch.int32)
        shapes = (n, kv_heads * group, width), (n, kv_heads, width)
    return Case(*shapes, options, draw(st.integers(0, 2**31)), draw(st.booleans()))
