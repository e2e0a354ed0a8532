"""Switched Hugging Face models: the warning of a context longer than what can reach it, and segment shift."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import, which reads it
pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from dilated_attention_pytorch.integrations.transformers import (
    LongNetForCausalLM,
    LongNetHFConfig,
    use_dilated_attention,
)
from dilated_attention_pytorch.models import reach as models_reach


@pytest.fixture(autouse=True)
def _unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_reach, "_warned", set())


def llama(context: int, **pattern: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.3, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    use_dilated_attention(model, [64, 256], [1, 4], **pattern)
    return model


def prompts() -> list[Tensor]:
    """Token 256 is the same, what comes before differs everywhere."""
    first = torch.randint(1, 64, (1, 257), generator=torch.Generator().manual_seed(0))
    second = first % 63 + 1
    second[:, 256] = first[:, 256]
    return [first, second]


def difference(model: LlamaForCausalLM) -> float:
    with torch.no_grad():
        a, b = (model(tokens, use_cache=False).logits[0, 256] for tokens in prompts())
    return float((a - b).abs().max())


def test_a_switched_model_says_what_its_config_cannot_keep() -> None:
    with pytest.warns(UserWarning, match="the context of 512 positions is longer than what can reach it") as caught:
        model = llama(512)
        assert difference(model) == 0.0
    assert len(caught) == 1 and caught[0].filename == __file__


def test_a_model_says_so_where_the_context_is_longer_than_its_config_has() -> None:
    model = llama(256)
    with pytest.warns(UserWarning, match="the context of 257 positions") as caught:
        assert difference(model) == 0.0
    assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shift", ["alternate", [0, 128, 0, 64]])
def test_a_shift_carries_information_across_the_border(shift: object) -> None:
    assert difference(llama(300, segment_shift=shift)) > 1e-3


@pytest.mark.parametrize("shift", [5, "alternate", [0, 7, 30, 128]])
def test_shifted_layers_decode_with_a_cache(shift: object, tmp_path: Path) -> None:
    model = llama(300, segment_shift=shift)
    model.save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="dilated").double().eval()
    tokens = prompts()[0].repeat(2, 1)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    with torch.no_grad():
        want = model(tokens, attention_mask=mask).logits
        past, found = None, []
        for start, stop in [(0, 100), *((i, i + 1) for i in range(100, 257))]:
            out = model(tokens[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(out.logits)
    real = mask.bool()
    assert float((torch.cat(found, 1) - want)[real].abs().max()) <= 1e-10


def test_longnet_of_transformers_takes_a_shift(tmp_path: Path) -> None:
    config = LongNetHFConfig(
        vocab_size=64, d_model=32, nhead=4, num_decoder_layers=3, dim_feedforward=64, segment_lengths=[8, 32],
        dilation_rates=[1, 2], segment_shift="alternate",
    )  # fmt: skip
    model = LongNetForCausalLM(config).double().eval()
    model.save_pretrained(tmp_path)
    again = LongNetForCausalLM.from_pretrained(tmp_path).double().eval()
    assert [layer.self_attn.attention.segment_shift for layer in again.model.decoder.layers] == [0, 16, 0]
    tokens = prompts()[0][:, :100]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    first = again.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(first[:, 100:], again.model.generate(tokens, 5, greedy=True))


def test_wrong_shifts_leave_the_model_as_it_was() -> None:
    model = llama(256)
    for shift, error in ((-1, ValueError), ("half", ValueError), ([1, 2], ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="segment_shift"):
            use_dilated_attention(model, [8], [1], segment_shift=shift)
    assert model.config.dilated_segment_lengths == [64, 256]
    model.config.dilated_segment_shift = [1, 2]
    with pytest.raises(ValueError, match="expected segment_shift of one int per layer, 4, got 2"):
        model(prompts()[0])
