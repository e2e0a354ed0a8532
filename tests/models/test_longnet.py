"""LongNet's three models: causality, padding, packing, checkpointing, initialisation."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dilated_attention_pytorch.models import LongNet, LongNetConfig, LongNetEncoder, LongNetLM

SMALL: dict[str, Any] = {
    "d_model": 32,
    "nhead": 4,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "dim_feedforward": 48,
    "segment_lengths": (6, 16, 40),
    "dilation_rates": (1, 2, 3),
}
POSITIONS = [None, "rotary", "xpos"]


def lm(**options: Any) -> LongNetLM:
    return LongNetLM(**{"vocab_size": 17, "dtype": torch.float64, **SMALL, **options}).eval()


def gradients(model: torch.nn.Module) -> list[Tensor]:
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None for g in grads)
    return [g.clone() for g in grads if g is not None]


class TestLanguageModel:
    @pytest.mark.parametrize("positions", POSITIONS)
    def test_a_later_token_changes_no_earlier_logit_or_gradient(self, positions: str | None) -> None:
        model = lm(positions=positions, num_kv_heads=2)
        tokens = torch.randint(17, (1, 90))
        embedded: list[Tensor] = []
        model.embed_tokens.register_forward_hook(lambda _m, _i, out: embedded.append(out) or out.retain_grad())
        for n in (1, 6, 40, 47, 89):
            changed = tokens.clone()
            changed[:, n:] = (tokens[:, n:] + 1) % 17
            embedded.clear()
            results = []
            for sequence in (tokens, changed):
                logits = model(sequence)
                (grad,) = torch.autograd.grad(logits[:, :n].square().sum(), embedded[-1])
                results.append((logits[:, :n], grad))
            (before, grad_before), (after, grad_after) = results
            assert torch.equal(before, after)
            assert torch.equal(grad_before, grad_after)
            assert not grad_before[:, n:].any()

    @pytest.mark.parametrize("positions", POSITIONS)
    def test_every_visible_token_matters(self, positions: str | None) -> None:
        """The other half of causality: through two layers, the first token of a segment reaches its last."""
        model = lm(positions=positions)
        tokens = torch.randint(17, (1, 40))
        changed = tokens.clone()
        changed[:, 0] = (tokens[:, 0] + 1) % 17
        assert not torch.equal(model(tokens)[:, -1], model(changed)[:, -1])

    @pytest.mark.parametrize("positions", POSITIONS)
    def test_padding_and_packing_equal_each_sequence_alone(self, positions: str | None) -> None:
        model = lm(positions=positions)
        lengths = [70, 33, 1]
        alone = [torch.randint(17, (n,)) for n in lengths]
        right, left = torch.randint(17, (3, 70)), torch.randint(17, (3, 70))
        for b, x in enumerate(alone):
            right[b, : len(x)], left[b, 70 - len(x) :] = x, x
        real = torch.arange(70) < torch.tensor(lengths)[:, None]
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        right_out = model(right, key_padding_mask=real)
        left_out = model(left, row_start=70 - torch.tensor(lengths))
        packed_out = model(torch.cat(alone), cu_seqlens=bounds)
        for b, x in enumerate(alone):
            expected = model(x[None])[0]
            for got in (right_out[b, : len(x)], left_out[b, 70 - len(x) :], packed_out[bounds[b] : bounds[b + 1]]):
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)

    @pytest.mark.parametrize("dropout", [0.0, 0.2])
    def test_gradient_checkpointing_changes_no_gradient(self, dropout: float) -> None:
        model = lm(dropout=dropout, attention_dropout=dropout).train()
        tokens = torch.randint(17, (2, 60))
        results = []
        for again in (False, True):
            model.gradient_checkpointing = again
            model.zero_grad()
            torch.manual_seed(5)
            loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            loss.backward()
            results.append((loss, gradients(model)))
        (loss, grads), (loss_again, grads_again) = results
        assert torch.equal(loss, loss_again)
        assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))

    def test_gradient_checkpointing_keeps_fewer_activations(self) -> None:
        tokens = torch.randint(17, (1, 60))
        kept = []
        for again in (False, True):
            model = lm(gradient_checkpointing=again, num_decoder_layers=4)
            total = 0

            def pack(x: Tensor) -> Tensor:
                nonlocal total
                total += x.numel()
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                model(tokens)
            kept.append(total)
        assert kept[1] < kept[0] / 4

    def test_tied_weights_are_one_parameter(self) -> None:
        tied, untied = lm(tie_weights=True), lm()
        assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 17 * 32
        hidden = torch.randn(1, 2, 32, dtype=torch.float64)
        torch.testing.assert_close(tied.logits(hidden), hidden @ tied.embed_tokens.weight.T)

    def test_starts_near_the_uniform_distribution(self) -> None:
        model = LongNetLM(vocab_size=256, **{**SMALL, "d_model": 128})
        tokens = torch.randint(256, (4, 200))
        loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert math.log(256) - 0.1 < loss.item() < math.log(256) + 1.0

    def test_learns_to_copy(self) -> None:
        """A sequence repeated: only attention to the first half can give the second."""
        torch.manual_seed(0)
        model = LongNetLM(
            vocab_size=12, d_model=32, nhead=4, num_decoder_layers=2, dim_feedforward=64, segment_lengths=[16],
            dilation_rates=[1], tie_weights=True,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(250):
            half = torch.randint(12, (64, 8))
            tokens = torch.cat((half, half), 1)
            loss = F.cross_entropy(model(tokens)[:, 7:-1].flatten(0, 1), tokens[:, 8:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.5 * math.log(12)

    def test_copies_and_pickles(self) -> None:
        model = lm(tie_weights=True, positions="xpos")
        tokens = torch.randint(17, (1, 30))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(tokens), model(tokens)) and twin.config == model.config

    def test_bfloat16(self) -> None:
        model = lm()
        tokens = torch.randint(17, (1, 60))
        exact = model(tokens)
        got = model.bfloat16()(tokens)
        assert got.dtype == torch.bfloat16
        # Two layers of eight roundings each (the softmax stays in fp32, docs/spec.md section 3); bf16 has 8 bits.
        assert torch.linalg.vector_norm(got - exact) <= 16 * 2.0**-8 * torch.linalg.vector_norm(exact)

    def test_compiles_as_one_graph(self) -> None:
        model = lm()
        tokens = torch.randint(17, (1, 50))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens), model(tokens), rtol=0, atol=1e-12)

    def test_runs_on_meta_tensors(self) -> None:
        model = lm(device="meta", positions="rotary")
        tokens = torch.zeros(2, 30, dtype=torch.int64, device="meta")
        assert model(tokens).shape == (2, 30, 17)
        with torch.no_grad():  # where calls may be repeated without the op
            assert model(tokens, row_start=tokens[:, 0]).shape == model(tokens).shape == (2, 30, 17)

    def test_no_buffer_and_no_table_grows_with_the_length(self) -> None:
        model = lm(positions="xpos")
        before = sum(x.numel() for x in model.state_dict().values())
        model(torch.randint(17, (1, 500)))
        assert not list(model.buffers()) and sum(x.numel() for x in model.state_dict().values()) == before

    def test_bad_input(self) -> None:
        with pytest.raises(TypeError, match="expected gradient_checkpointing to be a bool, got str 'yes'"):
            lm(gradient_checkpointing="yes")
        with pytest.raises(ValueError, match=r"expected tokens in \[0, 17\), got -1 to 16"):
            lm()(torch.tensor([[16, -1]]))
        with pytest.raises(ValueError, match="expected vocab_size, the number of tokens, got None"):
            LongNetLM(**SMALL)
        with pytest.raises(TypeError, match="expected config to be a LongNetConfig, got int 256"):
            LongNetLM(256)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="depth"):
            LongNetLM(vocab_size=17, depth=3)
        model = lm()
        with pytest.raises(TypeError, match=r"expected tokens of dtype int32 or int64, got torch\.float32"):
            model(torch.zeros(1, 4))
        with pytest.raises(ValueError, match=r"expected tokens of shape \(B, N\), got \(4,\)"):
            model(torch.zeros(4, dtype=torch.long))
        with pytest.raises(ValueError, match=r"expected tokens of shape \(total,\) with cu_seqlens, got \(1, 4\)"):
            model(torch.zeros(1, 4, dtype=torch.long), cu_seqlens=torch.tensor([0, 4]))

    def test_empty(self) -> None:
        assert lm()(torch.zeros(1, 0, dtype=torch.long)).shape == (1, 0, 17)
        assert lm()(torch.zeros(0, 5, dtype=torch.long)).shape == (0, 5, 17)


class TestEncoderDecoder:
    @pytest.mark.parametrize("positions", POSITIONS)
    def test_no_future(self, positions: str | None) -> None:
        model = LongNet(**SMALL, positions=positions, dtype=torch.float64)
        x = torch.randn(1, 60, 32, dtype=torch.float64)
        before = model(x)
        assert before.shape == x.shape
        for n in (1, 16, 41):
            changed = x.clone()
            changed[:, n:] = torch.randn_like(changed[:, n:])
            after = model(changed)
            assert torch.equal(before[:, :n], after[:, :n]) and not torch.equal(before[:, n:], after[:, n:])

    def test_bidirectional_sees_the_future(self) -> None:
        model = LongNet(**SMALL, dtype=torch.float64)
        x = torch.randn(1, 40, 32, dtype=torch.float64)
        changed = x.clone()
        changed[:, -1] += 1
        assert not torch.equal(model(x, is_causal=False)[:, 0], model(changed, is_causal=False)[:, 0])

    def test_padding_equals_each_sequence_alone(self) -> None:
        model = LongNet(**SMALL, dtype=torch.float64)
        x = torch.randn(2, 50, 32, dtype=torch.float64)
        real = torch.arange(50) < torch.tensor([[50], [21]])
        got = model(x, is_causal=False, key_padding_mask=real)
        for b, n in enumerate((50, 21)):
            expected = model(x[b : b + 1, :n], is_causal=False)
            torch.testing.assert_close(got[b : b + 1, :n], expected, rtol=0, atol=1e-11)

    def test_gradient_checkpointing_changes_no_gradient(self) -> None:
        model = LongNet(**SMALL, dtype=torch.float64)
        x = torch.randn(1, 40, 32, dtype=torch.float64)
        results = []
        for again in (False, True):
            model.gradient_checkpointing = again
            model.zero_grad()
            model(x).square().sum().backward()
            results.append(gradients(model))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_magneto_gains(self) -> None:
        """sqrt(log 3M log 2N / 3) in the encoder, sqrt(log 3M) in the decoder, 1 in cross-attention."""
        model = LongNet(**{**SMALL, "d_model": 256, "dim_feedforward": 512, "num_encoder_layers": 3})
        encoder, decoder = math.sqrt(math.log(6) * math.log(6) / 3), math.sqrt(math.log(6))
        for layer, name, gain in (
            (model.encoder.layers[0], "self_attn.v_proj", encoder),
            (model.encoder.layers[2], "ffn.fc2", encoder),
            (model.encoder.layers[0], "self_attn.q_proj", 1.0),
            (model.decoder.layers[0], "self_attn.out_proj", decoder),
            (model.decoder.layers[1], "ffn.fc1", decoder),
            (model.decoder.layers[0], "encoder_attn.v_proj", 1.0),
        ):
            linear = layer.get_submodule(name)
            std = gain * math.sqrt(2 / (linear.in_features + linear.out_features))
            assert linear.weight.std().item() == pytest.approx(std, rel=0.03)
            assert not linear.bias.any()

    def test_encoder_and_lm_gains(self) -> None:
        wide = {**SMALL, "d_model": 256, "num_encoder_layers": 3}
        for layer, layers in (
            (LongNetEncoder(**wide).encoder.layers[0], 3),
            (LongNetLM(**wide, vocab_size=5).decoder.layers[0], 2),
        ):
            weight = layer.get_submodule("self_attn.v_proj").weight
            assert weight.std().item() == pytest.approx(math.sqrt(math.log(2 * layers) / 256), rel=0.03)

    def test_paper_defaults_by_name(self) -> None:
        model = LongNet(device="meta")
        assert model.config == LongNetConfig()
        assert len(model.encoder.layers) == len(model.decoder.layers) == 12


class TestEncoder:
    def test_names_are_the_official_ones(self) -> None:
        keys = set(LongNetEncoder(**{**SMALL, "num_encoder_layers": 1}).state_dict())
        layer = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"]
        layer += ["self_attn.inner_attn_ln", "self_attn_layer_norm", "ffn.fc1", "ffn.fc2", "ffn.ffn_layernorm"]
        layer += ["final_layer_norm"]
        names = [*(f"encoder.layers.0.{name}" for name in layer), "encoder.layer_norm"]
        assert keys == {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}

    @pytest.mark.parametrize("padding", ["right", "left", "packed"])
    def test_padding_equals_each_sequence_alone(self, padding: str) -> None:
        model = LongNetEncoder(**SMALL, dtype=torch.float64)
        lengths = torch.tensor([50, 21])
        alone = [torch.randn(1, n, 32, dtype=torch.float64) for n in lengths.tolist()]
        filled = torch.randn(2, 50, 32, dtype=torch.float64)
        starts = 50 - lengths if padding == "left" else torch.zeros(2, dtype=torch.long)
        for b, x in enumerate(alone):
            filled[b, starts[b] : starts[b] + x.shape[1]] = x[0]
        if padding == "packed":
            got = model(torch.cat(alone, 1)[0], cu_seqlens=torch.tensor([0, 50, 71]))
            parts = [got[:50], got[50:]]
        else:
            where = (
                {"row_start": starts}
                if padding == "left"
                else {"key_padding_mask": torch.arange(50) < lengths[:, None]}
            )
            got = model(filled, **where)
            parts = [got[b, starts[b] : starts[b] + x.shape[1]] for b, x in enumerate(alone)]
        for part, x in zip(parts, alone, strict=True):
            torch.testing.assert_close(part, model(x)[0], rtol=0, atol=1e-11)

    def test_official_mode_runs(self) -> None:
        model = LongNetEncoder(
            **SMALL,
            positions=None,
            offsets="blocked",
            mixing_gradient="detached",
            padding="zero_keys",
            activation="gelu",
        )
        assert model(torch.randn(1, 45, 32)).isfinite().all()
        with pytest.raises(ValueError, match="expected is_causal=False with padding='zero_keys'"):
            model(torch.randn(1, 45, 32), is_causal=True)
