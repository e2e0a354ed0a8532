"""`nn.Module`s over the op, with the argument names of `torch.nn.MultiheadAttention` where they exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dilated_attention_pytorch._deprecated import takes_old_call  # 0.4.0: goes with _old
from dilated_attention_pytorch.core import torch_private
from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.positions import Positions, RotaryPositions, Rotation, row_positions
from dilated_attention_pytorch.core.projections import Projections
from dilated_attention_pytorch.core.shift import check_shift
from dilated_attention_pytorch.functional import dilated_attention
from dilated_attention_pytorch.head_groups import grouped_attention, head_groups_by_default
from dilated_attention_pytorch.types import QKV, BackendName, Masks, MixingGradient, Offsets, Padding


class KeyValueStore(Protocol):
    """What `MultiheadDilatedAttention` needs of one layer's cache; `models.cache` has ours."""

    @property
    def length(self) -> int:
        """Positions seen before this call: where the new ones start."""

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
        """Takes in `(B, n, H_kv, D)`; gives back all keys and values still in sight and the first one's position."""


@runtime_checkable
class DecodingStore(Protocol):
    """One layer's cache that attends itself, a position at a time; `models.decoding` has ours."""

    def attend(self, x: QKV, rotation: Rotation | None, scale: float) -> Tensor:
        """Attention `(B, 1, H, D)` of a new position; takes queries and keys before they are rotated."""


@takes_old_call("_old.calls:DILATED")  # 0.4.0: goes with _old
class DilatedAttention(nn.Module):
    """Dilated attention (LongNet, arXiv 2307.02486, sections 2.2 and 2.3) as a module without parameters.

    Args:
        segment_lengths: w_i, in positions, one per branch.
        dilation_rates: r_i, one per branch.
        scale: factor on q . k; `D ** -0.5` by default.
        offsets: `"modulo"` (the paper) or `"blocked"` (the official code and every published checkpoint).
        attention_dropout: probability of dropping an attention weight, in training mode only.
        mixing_gradient: `"exact"`, or `"detached"` as in the official code.
        padding: `"none"`, or `"zero_keys"` for the numbers of published checkpoints.
        segment_shift: c, in positions: moves the borders of all segments, as in `dilated_attention`.
        backend: `"auto"`, `"reference"`, `"sdpa"` or `"triton"`.
        head_groups: each head takes one branch instead of all, the layout of 0.1: the key/value heads are cut into as
            many consecutive runs as there are branches, the first runs one head longer where they do not divide, and
            run i keeps the residue `i mod r_i`. False, unless `legacy_mode` is on.

    Raises:
        ValueError: lists that do not fit together, an unknown option, a probability outside [0, 1), `head_groups` with
            what it does not go with: `offsets="blocked"`, `padding="zero_keys"` or a shift.
        TypeError: an argument of the wrong type.

    Example:
        >>> attention = DilatedAttention([128, 512], [1, 4])
        >>> q = k = v = torch.randn(1, 1000, 4, 32)
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([1, 1000, 4, 32])
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        *,
        scale: float | None = None,
        offsets: Offsets = "modulo",
        attention_dropout: float = 0.0,
        mixing_gradient: MixingGradient = "exact",
        padding: Padding = "none",
        segment_shift: int = 0,
        backend: BackendName = "auto",
        head_groups: bool | None = None,
    ) -> None:
        super().__init__()
        pattern = DilatedPattern(segment_lengths, dilation_rates, 1, offsets)  # type: ignore[arg-type]
        check.check_scale(scale, 1)
        self.segment_lengths = pattern.segment_lengths
        self.dilation_rates = pattern.dilation_rates
        self.scale = scale
        self.offsets: Offsets = offsets
        self.attention_dropout = check.check_probability("attention_dropout", attention_dropout)
        self.mixing_gradient: MixingGradient = check.check_choice("mixing_gradient", mixing_gradient, MixingGradient)
        self.padding: Padding = check.check_choice("padding", padding, Padding)
        self.segment_shift = check_shift(segment_shift, self.segment_lengths)
        if self.segment_shift and self.padding == "zero_keys":
            raise ValueError(f"expected segment_shift=0 with padding='zero_keys', got {self.segment_shift}")
        self.backend: BackendName = check.check_choice("backend", backend, BackendName)
        if head_groups is not None and not isinstance(head_groups, bool):
            raise TypeError(f"expected head_groups to be a bool or None, got {type(head_groups).__name__}")
        usual = offsets == "modulo" and padding == "none" and self.segment_shift == 0
        if head_groups and not usual:
            raise ValueError(
                "expected offsets='modulo', padding='none' and segment_shift=0 with head_groups=True, whose offsets "
                f"are its own, got {check.quoted(offsets)}, {check.quoted(padding)} and {segment_shift}"
            )
        # Legacy mode does not apply to modules for published checkpoints.
        self.head_groups = (usual and head_groups_by_default()) if head_groups is None else head_groups

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        *,
        key_padding_mask: Tensor | None = None,
        row_start: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        q_start: int = 0,
        k_start: int = 0,
        seq_len: int | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """Attention of query over key and value; every argument as in `dilated_attention`.

        Args:
            query: `(B, N, H, D)`, or `(total, H, D)` with `cu_seqlens`.
            key: `(B, N, H_kv, D)`.
            value: like key.
            is_causal: hide later keys.
            key_padding_mask: bool `(B, N)`, **True = real** (`nn.MultiheadAttention` has it the other way round).
            row_start, cu_seqlens, q_start, k_start, seq_len, seed: as in `dilated_attention`.

        Returns:
            `(B, N, H, D)`.
        """
        dropout_p = self.attention_dropout if self.training else 0.0
        call: dict[str, Any] = {"is_causal": is_causal, "dropout_p": dropout_p, "seed": seed}
        call |= {"scale": self.scale, "backend": self.backend}
        if self.head_groups:
            branches = list(zip(self.segment_lengths, self.dilation_rates, strict=True))
            masks = Masks(key_padding_mask, row_start, cu_seqlens)
            return grouped_attention(QKV(query, key, value), branches, masks, (q_start, k_start, seq_len), **call)
        call |= {"key_padding_mask": key_padding_mask, "row_start": row_start, "cu_seqlens": cu_seqlens}
        call |= {"q_start": q_start, "k_start": k_start, "seq_len": seq_len}
        call |= {"segment_lengths": self.segment_lengths, "dilation_rates": self.dilation_rates}
        call |= {"offsets": self.offsets, "mixing_gradient": self.mixing_gradient, "padding": self.padding}
        call |= {"segment_shift": self.segment_shift}
        return dilated_attention(query, key, value, **call)

    def extra_repr(self) -> str:
        """What `print` shows."""
        parts = [f"segment_lengths={list(self.segment_lengths)}", f"dilation_rates={list(self.dilation_rates)}"]
        usual = {"scale": None, "offsets": "modulo", "attention_dropout": 0.0, "mixing_gradient": "exact"}
        for name, default in {
            **usual,
            "padding": "none",
            "segment_shift": 0,
            "backend": "auto",
            "head_groups": False,
        }.items():
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(parts)


@takes_old_call("_old.calls:MULTIHEAD")  # 0.4.0: goes with _old
class MultiheadDilatedAttention(Projections):
    """Projections around dilated attention, with MAGNETO's sub-LN (arXiv 2210.06423, section 2 and figure 2).

    A LayerNorm over the whole width stands between the attention and `out_proj`. Weights start as xavier-normal, with
    gain `gamma_init` for `v_proj` and `out_proj` and 1 for `q_proj` and `k_proj`; biases start at 0. Parameters are
    named as in the official checkpoints: `q_proj`, `k_proj`, `v_proj`, `inner_attn_ln`, `out_proj`.

    Args:
        embed_dim: width of inputs and outputs.
        num_heads: H, a divisor of embed_dim.
        dropout: probability of dropping an attention weight, in training mode only.
        bias: whether the projections have one.
        segment_lengths: w_i, in positions, one per branch.
        dilation_rates: r_i, one per branch.
        num_kv_heads: H_kv, a divisor of num_heads; num_heads by default.
        layer_norm: whether `inner_attn_ln` exists.
        layer_norm_eps: its epsilon.
        gamma_init: MAGNETO's gain.
        positions: None, `"rotary"` (RoFormer) or `"xpos"` (causal attention only), of queries and keys.
        rotary_base: longest wavelength over 2 pi.
        scale_base: xPos's decay length, in positions.
        scale: factor on q . k; `head_dim ** -0.5` by default.
        offsets, mixing_gradient, padding, segment_shift, backend, head_groups: as in `DilatedAttention`.
        batch_first: only True; the argument is here so that code for `nn.MultiheadAttention` says what it means.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: sizes that do not divide, `batch_first=False`, an unknown option.
        TypeError: an argument of the wrong type.

    Example:
        >>> attention = MultiheadDilatedAttention(64, 4, segment_lengths=[128, 512],
        ...                                       dilation_rates=[1, 4])
        >>> x = torch.randn(2, 1000, 64)
        >>> attention(x, x, x, is_causal=True)[0].shape
        torch.Size([2, 1000, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        num_kv_heads: int | None = None,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        positions: Positions | None = None,
        rotary_base: float = 10_000.0,
        scale_base: float = 512.0,
        scale: float | None = None,
        offsets: Offsets = "modulo",
        mixing_gradient: MixingGradient = "exact",
        padding: Padding = "none",
        segment_shift: int = 0,
        backend: BackendName = "auto",
        head_groups: bool | None = None,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set_sizes(embed_dim, num_heads, num_kv_heads, gamma_init)
        rotary_base = check.check_above_zero("rotary_base", rotary_base)
        scale_base = check.check_above_zero("scale_base", scale_base)
        if not check.check_bool("batch_first", batch_first):
            raise ValueError(
                f"expected batch_first=True, got {batch_first}: inputs are (B, N, embed_dim); transpose them first"
            )
        if positions is not None:
            check.check_choice("positions", positions, Positions)
        self.attention = DilatedAttention(
            segment_lengths,
            dilation_rates,
            scale=scale,
            offsets=offsets,
            attention_dropout=check.check_probability("dropout", dropout),
            mixing_gradient=mixing_gradient,
            padding=padding,
            segment_shift=segment_shift,
            backend=backend,
            head_groups=head_groups,
        )
        self.positions: Positions | None = positions
        self.rotary = RotaryPositions.named(
            positions, self.head_dim, self.attention.segment_lengths, rotary_base, scale_base
        )
        self._make_parameters(bias, layer_norm, layer_norm_eps, device=device, dtype=dtype)

    def rotation(
        self, x: Tensor, *, start: int = 0, row_start: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Rotation | None:
        """The rotation of rows x `(..., N, embed_dim)` from position `start` on; layers alike can share one."""
        if self.rotary is None:
            return None
        if cu_seqlens is not None:
            check.check_cu_seqlens(cu_seqlens)
            check.check_readable("cu_seqlens", cu_seqlens, x.device)
        elif row_start is not None:
            check.check_row_start(row_start, x.shape[0])
            check.check_readable("row_start", row_start, x.device)
        check.check_all_or_none_fake(x, {"cu_seqlens": cu_seqlens, "row_start": row_start})
        rotary, where = self.rotary, {"row_start": row_start, "cu_seqlens": cu_seqlens}
        return torch_private.called_beside(
            x, lambda: rotary.rotation(row_positions(x.shape[-2], start=start, device=x.device, **where), x.dtype)
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        need_weights: bool = False,
        row_start: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        rotation: Rotation | None = None,
        cache: KeyValueStore | DecodingStore | None = None,
    ) -> tuple[Tensor, None]:
        """Attention of query over key and value, which are positions of one sequence.

        **`key_padding_mask` is True where a token is real**, the opposite of `nn.MultiheadAttention`: a mask written
        for it is passed as `~mask`.

        Args:
            query: `(B, N, embed_dim)`, or `(total, embed_dim)` with `cu_seqlens`.
            key: like query. Position n of key stands beside position n of query, so cross attention takes a memory of
                the query's length.
            value: like key.
            key_padding_mask: bool `(B, N)`, True = real.
            is_causal: hide later keys.
            need_weights: only False: weights are never formed.
            row_start: int `(B,)`, first real position of each left-padded row.
            cu_seqlens: int `(sequences + 1,)`, bounds of packed sequences.
            rotation: what `self.rotation` gives for these rows, where a caller has it already.
            cache: this layer's store of earlier keys and values; query, key and value are then the positions that
                follow them.

        Returns:
            The output, shaped like query, and None, where `nn.MultiheadAttention` has the weights.

        Raises:
            ValueError: shapes or options that do not fit, `need_weights=True`.
        """
        if check.check_bool("need_weights", need_weights):
            raise ValueError("expected need_weights=False, got True: attention weights are never formed here")
        check.check_bool("is_causal", is_causal)
        for name, x, linear in (
            ("query", query, self.q_proj),
            ("key", key, self.k_proj),
            ("value", value, self.v_proj),
        ):
            check.check_multiplicand(name, x, linear)
        rank, width = 3 if cu_seqlens is None else 2, self.embed_dim
        if query.dim() != rank or query.shape[-1] != width:
            layout = f"(B, N, {width})" if rank == 3 else f"(total, {width}) with cu_seqlens"
            raise ValueError(f"expected query of shape {layout}, got {tuple(query.shape)}")
        if key.shape != query.shape or value.shape != query.shape:
            raise ValueError(
                "expected key and value of query's shape, since all three are positions of one sequence, got query "
                f"{tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}; for ranges of one "
                "sequence see dilated_attention's q_start and k_start"
            )
        if self.positions == "xpos" and not is_causal:
            raise ValueError(
                "expected is_causal=True with positions='xpos', got False: xPos makes the weight of later keys grow "
                "exponentially; take positions='rotary'"
            )
        if cache is not None and not isinstance(cache, DecodingStore) and not hasattr(cache, "length"):
            raise TypeError(f"expected cache to be a store of keys and values, got {type(cache).__name__}")
        if rotation is not None and not isinstance(rotation, Rotation):
            raise TypeError(f"expected rotation to be a Rotation, got {type(rotation).__name__}")
        if isinstance(cache, DecodingStore):
            scale = self.head_dim**-0.5 if self.attention.scale is None else self.attention.scale
            return self._leave(cache.attend(self._project(query, key, value), rotation, scale)), None
        where = {"row_start": row_start, "cu_seqlens": cu_seqlens}
        q_start = 0 if cache is None else cache.length
        if rotation is None:
            rotation = self.rotation(query, start=q_start, **where)
        q, k, v = self._project(query, key, value, rotation)
        k_start = 0
        if cache is not None:
            k, v, k_start = cache.append(k, v)
        out = self.attention(
            q, k, v, is_causal, key_padding_mask=key_padding_mask, q_start=q_start, k_start=k_start, **where
        )
        return self._leave(out), None

    def extra_repr(self) -> str:
        """What `print` shows."""
        kv = "" if self.num_kv_heads == self.num_heads else f", num_kv_heads={self.num_kv_heads}"
        positions = "" if self.positions is None else f", positions={self.positions!r}"
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}{kv}{positions}"
