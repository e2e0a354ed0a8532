"""What each layer of a switched model is: dilated, with its own pattern, or what it was before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import transformers
from hf_models import CLOSE, LENGTHS, NEAR, RATES, make, tokens

from dilated_attention_pytorch.integrations.transformers import (
    attention,
    register,
    use_dilated_attention,
)

register()


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


COVERING: dict[str, Any] = {"dilated_segment_lengths": [4096], "dilated_dilation_rates": [1]}


@pytest.mark.parametrize("name", ["mistral", "gemma3", "llama4", "qwen2_moe"])
def test_local_layers_stay_as_they_are(name: str) -> None:
    """Left-padded, and decoding past the window: with one covering branch, what sdpa gives."""
    dilated, dense = make(name, **COVERING), make(name, "sdpa")
    x, real = tokens(2, 50), torch.ones(2, 50, dtype=torch.int64)
    real[0, :21] = 0
    seen = real.bool()
    given = {"attention_mask": real, "position_ids": (real.cumsum(1) - 1).clamp(min=0)}
    torch.testing.assert_close(dilated(x, **given).logits[seen], dense(x, **given).logits[seen], **NEAR)
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": real}
    assert torch.equal(dilated.generate(x, **settings), dense.generate(x, **settings))


def test_only_full_layers_change() -> None:
    """All layers of this Mistral have a window, one of Gemma 3's two has."""
    x = tokens(1, 120)
    torch.testing.assert_close(make("mistral")(x).logits, make("mistral", "sdpa")(x).logits, **CLOSE)
    assert (make("gemma3")(x).logits - make("gemma3", "sdpa")(x).logits).abs().max() > 1e-2


def test_a_row_of_nothing_but_padding_with_a_cache() -> None:
    model, x = make("llama"), tokens(2, 30)
    real = torch.ones(2, 30, dtype=torch.int64)
    real[0] = 0
    out = model(x, attention_mask=real, use_cache=True)
    torch.testing.assert_close(out.logits[1], model(x[1:]).logits[0], **CLOSE)
    step = model(x[:, :1], attention_mask=torch.cat([real, real[:, :1]], 1), past_key_values=out.past_key_values).logits
    torch.testing.assert_close(step[1], model(torch.cat([x[1:], x[1:, :1]], 1)).logits[0, -1:], **CLOSE)
    assert bool(step.isfinite().all())


def inputs(name: str) -> dict[str, Tensor]:
    if name == "whisper":
        features = torch.randn(1, 4, 100, generator=torch.Generator().manual_seed(1)).double()
        return {"input_features": features, "decoder_input_ids": tokens(1, 50)}
    return {"input_ids": tokens(1, 50), "decoder_input_ids": tokens(1, 50).flip(1)}


@pytest.mark.parametrize("name", ["bart", "marian", "whisper"])
class TestEncodersAndDecoders:
    """Source and target are equally long, so the shapes do not tell cross-attention."""

    def test_cross_attention_stays_dense(self, name: str) -> None:
        given = inputs(name)
        covering, dense = make(name, **COVERING), make(name, "sdpa")
        torch.testing.assert_close(covering(**given)[0], dense(**given)[0], **CLOSE)
        switched = make(name)
        encoder_outputs = dense.encoder(next(iter(given.values())))
        hidden = encoder_outputs.last_hidden_state
        x = given["decoder_input_ids"]
        # The decoder's own attention is dilated, so it hides what is far; with one token there is nothing to hide.
        one = [m.decoder(x[:, :1], encoder_hidden_states=hidden)[0] for m in (switched, dense)]
        torch.testing.assert_close(*one, **CLOSE)
        all_ = [m.decoder(x, encoder_hidden_states=hidden)[0] for m in (switched, dense)]
        assert (all_[0] - all_[1]).abs().max() > 1e-3

    @pytest.mark.parametrize("half", ["encoder", "decoder"])
    def test_one_half_alone(self, name: str, half: str, tmp_path: Any) -> None:
        given, dense, switched = inputs(name), make(name, "sdpa"), make(name, "sdpa")
        use_dilated_attention(switched, LENGTHS, RATES, layers=half)  # type: ignore[arg-type]
        source, x = next(iter(given.values())), given["decoder_input_ids"]
        hidden = dense.encoder(source)[0]
        moved = (switched.encoder(source)[0] - hidden).abs().max() > 1e-3
        parts = [m.decoder(x, encoder_hidden_states=hidden)[0] for m in (switched, dense)]
        assert bool(moved) == (half == "encoder")
        if half == "encoder":
            torch.testing.assert_close(*parts, **CLOSE)
        else:
            assert (parts[0] - parts[1]).abs().max() > 1e-3
        switched.save_pretrained(tmp_path)
        again = type(switched).from_pretrained(tmp_path).double().eval()
        torch.testing.assert_close(again(**given)[0], switched(**given)[0], **CLOSE)

    def test_an_encoder_given_by_itself(self, name: str) -> None:
        given, dense, switched = inputs(name), make(name, "sdpa"), make(name, "sdpa")
        use_dilated_attention(switched.encoder, LENGTHS, RATES)
        source, x = next(iter(given.values())), given["decoder_input_ids"]
        hidden = dense.encoder(source)[0]
        assert (switched.encoder(source)[0] - hidden).abs().max() > 1e-3
        parts = [m.decoder(x, encoder_hidden_states=hidden)[0] for m in (switched, dense)]
        torch.testing.assert_close(*parts, **CLOSE)


class TestLayersByNumber:
    def test_the_others_stay_dense(self, tmp_path: Any) -> None:
        x, first, both = tokens(1, 120), make("llama", "sdpa"), make("llama", "sdpa")
        use_dilated_attention(first, LENGTHS, RATES, layers=[0])
        # The same in two steps: all of them, then a covering branch for the other layer.
        use_dilated_attention(both, LENGTHS, RATES)
        use_dilated_attention(both, [4096], [1], layers=[1])
        want = both(x).logits
        torch.testing.assert_close(first(x).logits, want, **CLOSE)
        for other in (make("llama"), make("llama", "sdpa")):
            assert (other(x).logits - want).abs().max() > 1e-2
        assert first.config.dilated_segment_lengths == [LENGTHS, None]
        for model in (first, both):
            model.save_pretrained(tmp_path)
            again = type(model).from_pretrained(tmp_path).double().eval()
            torch.testing.assert_close(again(x).logits, want, **CLOSE)

    def test_a_pattern_per_layer(self) -> None:
        x, model = tokens(1, 120), make("llama", "sdpa")
        use_dilated_attention(model, [16], [1], layers=[0])
        use_dilated_attention(model, [64, 128], [2, 8], layers=[1])
        written = make("llama", dilated_segment_lengths=[[16], [64, 128]], dilated_dilation_rates=[[1], [2, 8]])
        assert torch.equal(model(x).logits, written(x).logits)
        swapped = make("llama", dilated_segment_lengths=[[64, 128], [16]], dilated_dilation_rates=[[2, 8], [1]])
        assert (swapped(x).logits - written(x).logits).abs().max() > 1e-2

    def test_dense_layers_keep_documents_apart_and_padding_out(self) -> None:
        model, dense, x = make("llama", "sdpa"), make("llama", "sdpa"), tokens(1, 50)
        use_dilated_attention(model, [4096], [1], layers=[0])
        positions = torch.cat([torch.arange(20), torch.arange(30)])[None]
        want = dense(x, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(model(x, position_ids=positions).logits, want, **CLOSE)

    @pytest.mark.parametrize(
        ("layers", "error", "message"),
        [
            ([2], ValueError, r"expected layers\[0\] in \[0, 2\), got 2"),
            ([-1], ValueError, r"expected layers\[0\] to be at least 0"),
            ("encoder", ValueError, "expected an encoder and a decoder .* got a LlamaForCausalLM"),
            ("middle", ValueError, "expected layers to be one of"),
            (1, TypeError, "expected layers to be a sequence of ints"),
        ],
    )
    def test_layers_that_are_not_there(self, layers: Any, error: type[Exception], message: str) -> None:
        model = make("llama", "sdpa", dilated_segment_lengths=None)
        before = model.config.to_dict()
        with pytest.raises(error, match=message):
            use_dilated_attention(model, [16], [1], layers=layers)
        assert model.config.to_dict() == before and model.config._attn_implementation == "sdpa"

    def test_layers_without_a_number(self) -> None:
        splinter = transformers.SplinterModel(transformers.SplinterConfig(hidden_size=24, num_hidden_layers=1))
        with pytest.raises(ValueError, match="attention layers that know their number"):
            use_dilated_attention(splinter, [16], [1], layers=[0])
        with pytest.raises(ValueError, match=r"expected one entry per layer .* got 1 and 1 entries"):
            make("llama", dilated_segment_lengths=[[16]], dilated_dilation_rates=[[1]])(tokens(1, 10))
        with pytest.raises(ValueError, match="for the same layers"):
            make("llama", dilated_segment_lengths=[[16], None], dilated_dilation_rates=[[1], [1]])(tokens(1, 10))


@pytest.mark.parametrize("value_dim", [5, 24])
def test_values_of_another_width(value_dim: int) -> None:
    """As in DeepSeek's latent attention; against torch's own, and a pattern against equal widths."""
    module = make("llama").model.layers[0].self_attn
    q, k = torch.randn(2, 4, 30, 16).double(), torch.randn(2, 2, 30, 16).double()
    v = torch.randn(2, 2, 30, value_dim).double()
    out, _ = attention(module, q, k, v, None)
    assert out.shape == (2, 30, 4, value_dim)
    square = torch.cat([v, v, v, v], -1)[..., :16]
    same, _ = attention(module, q, k, square, None)
    torch.testing.assert_close(out[..., :5], same[..., :5], **CLOSE)
    module.config.dilated_segment_lengths, module.config.dilated_dilation_rates = [64], [1]
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attention(module, q, k, v, None)[0], want.transpose(1, 2), **CLOSE)


def test_attention_outside_the_interface_that_adds_the_mask() -> None:
    config = transformers.BigBirdPegasusConfig(
        vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, attention_type="original_full",
    )  # fmt: skip
    model = transformers.BigBirdPegasusModel(config)
    with pytest.raises(ValueError, match="got BigBirdPegasusSelfAttention, which adds the mask to its scores itself"):
        use_dilated_attention(model, LENGTHS, RATES)
    assert model.config._attn_implementation != "dilated" and not hasattr(model.config, "dilated_segment_lengths")
    with pytest.raises(ValueError, match="which adds the mask"):
        transformers.BigBirdPegasusModel._from_config(config, attn_implementation="dilated")


def test_what_is_refused_says_what_it_is() -> None:
    """No advice about windows where none is the matter."""
    module, q = make("llama").model.layers[0].self_attn, torch.randn(1, 4, 10, 8)
    with pytest.raises(ValueError, match="s_aux=a tensor of shape") as caught:
        attention(module, q, q[:, :2], q[:, :2], None, s_aux=torch.zeros(4), sliding_window=None)
    assert "window" not in str(caught.value)
