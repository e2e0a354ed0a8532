"""`DilatedAttention` and `MultiheadDilatedAttention`: properties of the modules around the op."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dilated_attention_pytorch import dilated_attention
from dilated_attention_pytorch.modules import DilatedAttention, MultiheadDilatedAttention

PATTERN: dict[str, Any] = {"segment_lengths": [6, 16, 40], "dilation_rates": [1, 2, 3]}


def multihead(**options: Any) -> MultiheadDilatedAttention:
    return MultiheadDilatedAttention(32, 4, **{"dtype": torch.float64, **PATTERN, **options})


class TestDilatedAttention:
    def test_is_the_function(self) -> None:
        q, k, v = torch.randn(2, 50, 4, 8), torch.randn(2, 50, 2, 8), torch.randn(2, 50, 2, 8)
        options: dict[str, Any] = {"scale": 0.3, "offsets": "blocked", "mixing_gradient": "detached"}
        mask = torch.rand(2, 50) > 0.3
        got = DilatedAttention(**PATTERN, **options)(q, k, v, True, key_padding_mask=mask)
        expected = dilated_attention(q, k, v, **PATTERN, **options, is_causal=True, key_padding_mask=mask)
        assert torch.equal(got, expected)

    def test_takes_a_segment_shift(self) -> None:
        q = torch.randn(2, 50, 4, 8)
        for shift in (0, 5, 16, 80):
            expected = dilated_attention(q, q, q, **PATTERN, segment_shift=shift, is_causal=True)
            module = DilatedAttention(**PATTERN, segment_shift=shift)
            assert torch.equal(module(q, q, q, True), expected)
            assert ("segment_shift" in repr(module)) == bool(shift)
        x = torch.randn(1, 50, 32, dtype=torch.float64)
        torch.manual_seed(0)
        plain = multihead()
        shifted = multihead(segment_shift=7)
        shifted.load_state_dict(plain.state_dict())
        assert not torch.allclose(plain(x, x, x)[0], shifted(x, x, x)[0])
        plain.attention.segment_shift = 7
        assert torch.equal(plain(x, x, x)[0], shifted(x, x, x)[0])

    def test_dropout_in_training_only(self) -> None:
        module = DilatedAttention([50], [1], attention_dropout=0.5)
        q = torch.randn(1, 50, 4, 8)
        expected = dilated_attention(q, q, q, segment_lengths=[50], dilation_rates=[1])
        assert not torch.equal(module(q, q, q), expected)
        assert torch.equal(module(q, q, q, seed=3), module(q, q, q, seed=3))
        assert torch.equal(module.eval()(q, q, q), expected)

    def test_repr_names_what_is_not_usual(self) -> None:
        assert repr(DilatedAttention([4, 8], [1, 2])) == (
            "DilatedAttention(segment_lengths=[4, 8], dilation_rates=[1, 2])"
        )
        assert "offsets='blocked', attention_dropout=0.1" in repr(
            DilatedAttention([4], [1], offsets="blocked", attention_dropout=0.1)
        )

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"segment_lengths": []}, ValueError, "expected segment_lengths to hold at least one branch"),
            ({"dilation_rates": [1]}, ValueError, "of equal length, got 3 lengths .* and 1 rates"),
            ({"segment_lengths": [6, 16, 4.5]}, TypeError, r"expected segment_lengths\[2\] to be an int, got float"),
            ({"dilation_rates": [1, 0, 3]}, ValueError, r"expected dilation_rates\[1\] to be at least 1, got 0"),
            ({"offsets": "random"}, ValueError, "expected offsets to be one of .*got 'random'"),
            ({"attention_dropout": 1.0}, ValueError, r"expected attention_dropout in \[0, 1\), got 1.0"),
            ({"mixing_gradient": "none"}, ValueError, "expected mixing_gradient to be one of"),
            ({"segment_shift": -1}, ValueError, "expected segment_shift to be at least 0, got -1"),
            ({"segment_shift": "alternate"}, TypeError, "expected segment_shift to be an int"),
            ({"segment_shift": 3, "padding": "zero_keys"}, ValueError, "expected segment_shift=0 with padding='zero_k"),
            ({"segment_shift": 3, "head_groups": True}, ValueError, "and segment_shift=0 with head_groups=True"),
            ({"padding": "zeros"}, ValueError, "expected padding to be one of"),
            ({"scale": "a"}, TypeError, "expected scale to be a float, got str 'a'"),
            ({"backend": "cuda"}, ValueError, "expected backend to be one of"),
        ],
    )
    def test_bad_input_at_construction(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            DilatedAttention(**{**PATTERN, **options})


class TestMultihead:
    def test_is_what_its_parts_say(self) -> None:
        """Written out from the state dict, with none of the module's code."""
        module = multihead(num_kv_heads=2)
        for name, p in module.named_parameters():
            if "ln" in name or "bias" in name:
                nn.init.normal_(p)
        p = dict(module.named_parameters())
        assert set(p) == {
            f"{part}.{kind}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj", "inner_attn_ln")
            for kind in ("weight", "bias")
        }
        x = torch.randn(2, 45, 32, dtype=torch.float64)

        def project(name: str, heads: int) -> Tensor:
            return (x @ p[f"{name}.weight"].T + p[f"{name}.bias"]).reshape(2, 45, heads, 8)

        out = dilated_attention(
            project("q_proj", 4), project("k_proj", 2), project("v_proj", 2), **PATTERN, is_causal=True
        ).reshape(2, 45, 32)
        out = (out - out.mean(-1, keepdim=True)) / (out.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        out = out * p["inner_attn_ln.weight"] + p["inner_attn_ln.bias"]
        expected = out @ p["out_proj.weight"].T + p["out_proj.bias"]
        got, weights = module(x, x, x, is_causal=True)
        assert weights is None
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)

    def test_magneto_initialisation(self) -> None:
        module = MultiheadDilatedAttention(256, 4, num_kv_heads=2, **PATTERN, gamma_init=3.0)
        for name, gain in (("q_proj", 1.0), ("k_proj", 1.0), ("v_proj", 3.0), ("out_proj", 3.0)):
            linear = getattr(module, name)
            expected = gain * math.sqrt(2 / (linear.in_features + linear.out_features))
            assert linear.weight.std().item() == pytest.approx(expected, rel=0.03)
            assert not linear.bias.any()

    def test_dense_attention_equals_torch(self) -> None:
        """One branch over the whole sequence, no sub-LN: torch's own module, whose mask has the other meaning."""
        ours = MultiheadDilatedAttention(32, 4, segment_lengths=[20], dilation_rates=[1], layer_norm=False)
        theirs = nn.MultiheadAttention(32, 4, batch_first=True)
        with torch.no_grad():
            theirs.in_proj_weight.copy_(torch.cat([getattr(ours, f"{n}_proj").weight for n in "qkv"]))
            theirs.out_proj.weight.copy_(ours.out_proj.weight)
        query, memory = torch.randn(2, 20, 32), torch.randn(2, 20, 32)
        real = torch.arange(20) < torch.tensor([[20], [13]])
        got, _ = ours(query, memory, memory, key_padding_mask=real)
        expected, _ = theirs(query, memory, memory, key_padding_mask=~real, need_weights=False)
        torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("positions", [None, "rotary", "xpos"])
    def test_no_future(self, positions: str | None) -> None:
        module = multihead(positions=positions)
        x = torch.randn(1, 60, 32, dtype=torch.float64)
        before, _ = module(x, x, x, is_causal=True)
        for n in (1, 6, 17, 59):
            changed = x.clone()
            changed[:, n:] = torch.randn_like(changed[:, n:])
            after, _ = module(changed, changed, changed, is_causal=True)
            assert torch.equal(before[:, :n], after[:, :n])
            assert not torch.equal(before[:, n:], after[:, n:])

    @pytest.mark.parametrize("positions", [None, "rotary", "xpos"])
    def test_padding_and_packing_equal_each_sequence_alone(self, positions: str | None) -> None:
        module = multihead(positions=positions, num_kv_heads=2)
        lengths = [50, 23, 7]
        alone = [torch.randn(n, 32, dtype=torch.float64) for n in lengths]

        def run(x: Tensor, **where: Any) -> Tensor:
            return module(x, x, x, is_causal=True, **where)[0]

        expected = [run(x[None])[0] for x in alone]
        right, left = torch.randn(3, 50, 32, dtype=torch.float64), torch.randn(3, 50, 32, dtype=torch.float64)
        for b, x in enumerate(alone):
            right[b, : len(x)], left[b, 50 - len(x) :] = x, x
        real = torch.arange(50) < torch.tensor(lengths)[:, None]
        starts = 50 - torch.tensor(lengths)
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        right_out, left_out = run(right, key_padding_mask=real), run(left, row_start=starts)
        packed_out = run(torch.cat(alone), cu_seqlens=bounds)
        for b, x in enumerate(expected):
            for got in (right_out[b, : len(x)], left_out[b, 50 - len(x) :], packed_out[bounds[b] : bounds[b + 1]]):
                torch.testing.assert_close(got, x, rtol=0, atol=1e-12)

    def test_uncovered_rows_and_padding_give_finite_gradients(self) -> None:
        module = MultiheadDilatedAttention(32, 4, segment_lengths=[16], dilation_rates=[3])
        x = torch.randn(2, 20, 32, requires_grad=True)
        mask = torch.ones(2, 20, dtype=torch.bool)
        mask[1] = False
        module(x, x, x, key_padding_mask=mask)[0].square().sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())

    def test_copies_and_pickles(self) -> None:
        module = multihead(positions="xpos", dropout=0.1).eval()
        x = torch.randn(1, 30, 32, dtype=torch.float64)
        expected = module(x, x, x, is_causal=True)[0]
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin(x, x, x, is_causal=True)[0], expected)
        assert "positions='xpos'" in repr(module) and "attention_dropout=0.1" in repr(module)

    @pytest.mark.parametrize("positions", [None, "rotary", "xpos"])
    def test_compiles_as_one_graph(self, positions: str | None) -> None:
        module = multihead(positions=positions)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        x = torch.randn(2, 50, 32, dtype=torch.float64, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        got, expected = compiled(x, x, x, is_causal=True)[0], module(y, y, y, is_causal=True)[0]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        got.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("how", ["bfloat16", "autocast"])
    def test_bfloat16(self, how: str) -> None:
        module = multihead(positions="rotary", dtype=torch.float32)
        x = torch.randn(1, 50, 32)
        exact = module.double()(x.double(), x.double(), x.double(), is_causal=True)[0]
        if how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                got = module.float()(x, x, x, is_causal=True)[0]
        else:
            half = x.bfloat16()
            got = module.bfloat16()(half, half, half, is_causal=True)[0]
        assert got.dtype == torch.bfloat16
        # Four products in a row (projections, attention, projection), each with bf16's rounding of inputs and outputs.
        bound = 8 * torch.finfo(torch.bfloat16).eps
        assert torch.linalg.vector_norm(got - exact) <= bound * torch.linalg.vector_norm(exact)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"batch_first": False}, ValueError, "expected batch_first=True, got False"),
            ({"num_kv_heads": 3}, ValueError, "expected num_heads to be a multiple of num_kv_heads, got 4 and 3"),
            ({"embed_dim": 33}, ValueError, "expected embed_dim to be a multiple of num_heads, got 33 and 4"),
            ({"num_heads": 0}, ValueError, "expected num_heads to be at least 1, got 0"),
            ({"num_heads": 2.0}, TypeError, "expected num_heads to be an int, got float"),
            ({"dropout": -0.1}, ValueError, r"expected dropout in \[0, 1\), got -0.1"),
            ({"positions": "sine"}, ValueError, "expected positions to be one of .*got 'sine'"),
            ({"positions": "rotary", "embed_dim": 12}, ValueError, "expected an even head_dim .*got 3"),
            (
                {"positions": "xpos", "segment_lengths": [1 << 20], "dilation_rates": [1]},
                ValueError,
                "expected scale_base of at least 16020",
            ),
        ],
    )
    def test_bad_input_at_construction(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            MultiheadDilatedAttention(**{"embed_dim": 32, "num_heads": 4, **PATTERN, **options})

    def test_bad_input(self) -> None:
        module = multihead()
        x = torch.randn(1, 20, 32, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"expected need_weights=False, got True: .* never formed"):
            module(x, x, x, need_weights=True)
        with pytest.raises(
            ValueError, match=r"expected key and value of query's shape.*\(1, 20, 32\), key \(1, 19, 32\)"
        ):
            module(x, x[:, 1:], x[:, 1:])
        with pytest.raises(ValueError, match=r"expected query of shape \(B, N, 32\), got \(1, 20, 31\)"):
            module(x[..., 1:], x, x)
        with pytest.raises(TypeError, match=r"expected key_padding_mask of dtype torch.bool \(True = real\)"):
            module(x, x, x, key_padding_mask=torch.ones(1, 20))
        with pytest.raises(ValueError, match="expected is_causal=True with positions='xpos', got False"):
            multihead(positions="xpos")(x, x, x)
