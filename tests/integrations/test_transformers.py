"""Hugging Face models on dilated attention: against sdpa, against each sequence alone, cached against uncached.

All models are tiny and randomly initialised; nothing is downloaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import, which reads it
transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaModel,
    ModernBertConfig,
    ModernBertModel,
)
from transformers.masking_utils import AttentionMaskInterface  # noqa: E402
from transformers.modeling_utils import AttentionInterface  # noqa: E402

from dilated_attention_pytorch import (  # noqa: E402
    DilatedPattern,
    LongNetConfig,
    LongNetLM,
    legacy_mode,
)
from dilated_attention_pytorch.integrations.transformers import (  # noqa: E402
    LongNetForCausalLM,
    LongNetHFConfig,
    attention,
    mask,
    register,
    use_dilated_attention,
)

VOCAB, HEADS, KV_HEADS = 99, 4, 2
LENGTHS, RATES = [16, 40, 96], [1, 2, 4]
PATTERN = {"dilated_segment_lengths": LENGTHS, "dilated_dilation_rates": RATES}
# The models compute in fp64, where another order of the same sums leaves logits of order 1 alike to 1e-10.
CLOSE = {"rtol": 0.0, "atol": 1e-10}
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def llama(attn_implementation: str = "dilated", **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(**{**SIZES, "num_key_value_heads": KV_HEADS, **PATTERN, **changes})
    return LlamaForCausalLM._from_config(config, attn_implementation=attn_implementation).double().eval()


def bert(**changes: Any) -> BertModel:
    torch.manual_seed(1)
    model = BertModel._from_config(BertConfig(**SIZES, **PATTERN, **changes), attn_implementation="dilated")
    return model.double().eval()


def modernbert(**changes: Any) -> ModernBertModel:
    torch.manual_seed(1)
    settings = {"layer_types": ["full_attention"] * 2, "cls_token_id": 1, "sep_token_id": 2, **changes}
    config = ModernBertConfig(**SIZES, **PATTERN, **settings)
    return ModernBertModel._from_config(config, attn_implementation="dilated").double().eval()


def longnet(**changes: Any) -> LongNetForCausalLM:
    torch.manual_seed(1)
    sizes = {"vocab_size": VOCAB, "d_model": 32, "nhead": 4, "num_decoder_layers": 2, "dim_feedforward": 64}
    config = LongNetHFConfig(**sizes, segment_lengths=LENGTHS, dilation_rates=RATES, pad_token_id=0, **changes)
    return LongNetForCausalLM(config).double().eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(7))


def padded(lengths: list[int], side: str) -> tuple[Tensor, Tensor, list[slice]]:
    """A padded batch, its mask, and where each row's tokens lie."""
    longest = max(lengths)
    rows = [slice(longest - n, longest) if side == "left" else slice(0, n) for n in lengths]
    batch, real = torch.zeros(2, len(lengths), longest, dtype=torch.int64)
    for b, here in enumerate(rows):
        batch[b, here], real[b, here] = tokens(longest)[: here.stop - here.start], 1
    return batch, real, rows


@torch.no_grad()
def test_one_full_branch_is_dense_attention() -> None:
    """A Llama with one branch (w >= N, r = 1) gives sdpa's logits; in fp32 to 1e-5, as promised."""
    x = tokens(2, 150)
    one, dense = llama(dilated_segment_lengths=[256], dilated_dilation_rates=[1]), llama("sdpa")
    torch.testing.assert_close(one(x).logits, dense(x).logits, **CLOSE)
    torch.testing.assert_close(one.float()(x).logits, dense.float()(x).logits, rtol=0.0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("offsets", ["modulo", "blocked"])
def test_a_pattern_is_the_softmax_over_its_multiset(offsets: str) -> None:
    """The same model under sdpa with log(how often a key is seen) as its mask: offsets count over key/value heads."""
    n = 130
    x = tokens(2, n)
    pattern = DilatedPattern(tuple(LENGTHS), tuple(RATES), KV_HEADS, offsets)  # type: ignore[arg-type]
    count = torch.zeros(HEADS, n, n, dtype=torch.float64)
    for h in range(HEADS):
        for i in range(n):
            for keys in pattern.keys_of(i, h // (HEADS // KV_HEADS), n, is_causal=True):
                count[h, i, list(keys)] += 1
    want = llama("sdpa")(x, attention_mask=count.log()[None].expand(2, -1, -1, -1)).logits
    got = llama(dilated_offsets=offsets)(x).logits
    torch.testing.assert_close(got, want, **CLOSE)
    dense = llama("sdpa")(x).logits
    assert (got - dense).abs().max() > 1e-2, "the pattern must matter, or nothing was compared"


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [llama, bert, modernbert, longnet])
def test_padded_rows_equal_each_sequence_alone(make: Any, side: str) -> None:
    model, lengths = make(), [37, 120, 1]
    batch, attention_mask, rows = padded(lengths, side)
    # As `generate` has it: positions count from the first real token.
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    together = model(batch, attention_mask=attention_mask, position_ids=position_ids)[0]
    for b, here in enumerate(rows):
        alone = model(batch[b : b + 1, here])[0]
        torch.testing.assert_close(together[b : b + 1, here], alone, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, longnet])
def test_causality(make: Any) -> None:
    model, x = make(), tokens(1, 100)
    changed = x.clone()
    changed[:, 60:] = (changed[:, 60:] + 5) % VOCAB
    before, after = model(x).logits, model(changed).logits
    assert torch.equal(before[:, :60], after[:, :60])
    assert not torch.equal(before[:, 60:], after[:, 60:])


@torch.no_grad()
@pytest.mark.parametrize("make", [bert, modernbert])
def test_encoders_see_both_ways(make: Any) -> None:
    model, x = make(), tokens(1, 100)
    changed = x.clone()
    changed[:, -1] = (changed[:, -1] + 5) % VOCAB
    assert not torch.equal(model(x)[0][:, :90], model(changed)[0][:, :90])


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, longnet])
@pytest.mark.parametrize("side", [None, "left"])
def test_generate_with_cache_equals_without(make: Any, side: str | None) -> None:
    """Greedy, over several segments, with the scores beside the tokens."""
    model = make()
    batch, attention_mask, _ = padded([23, 30] if side else [30, 30], side or "right")
    settings = {"max_new_tokens": 60, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, uncached = (
        model.generate(batch, attention_mask=attention_mask, use_cache=use_cache, **settings)
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), **CLOSE)
    assert cached.past_key_values.get_seq_length() == 89, "the cache must have been used"


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, longnet])
def test_a_cache_filled_in_parts(make: Any) -> None:
    """Several tokens at a time, as in speculative decoding: the queries start where the cache ends."""
    model, x = make(), tokens(2, 100)
    cache, parts = DynamicCache(), []
    for part in x.split([41, 1, 30, 28], 1):
        parts.append(model(part, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), model(x).logits, **CLOSE)


def test_beams_reorder_the_cache() -> None:
    model = longnet()
    settings = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False}
    x = tokens(2, 30)
    assert torch.equal(model.generate(x, use_cache=True, **settings), model.generate(x, use_cache=False, **settings))


def test_training_reaches_every_parameter() -> None:
    for model in (llama(attention_dropout=0.1).train(), longnet().train()):
        x = tokens(2, 80)
        model(x, labels=x).loss.backward()
        still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        # A key's bias moves all of a query's scores alike, so its gradient is rounding alone.
        assert [name for name in still if "k_proj.bias" not in name] == []


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("around", [lambda: torch.device("meta"), FakeTensorMode], ids=["meta", "fake"])
def test_a_model_without_memory_has_shapes(around: Any, masked: bool) -> None:
    with around():
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
        use_dilated_attention(model, [6, 12], [1, 2])
        ids = torch.ones(2, 30, dtype=torch.int64)
        assert model(ids, attention_mask=ids if masked else None).logits.shape == (2, 30, VOCAB)


def test_dropout_acts_in_training_alone() -> None:
    model, x = llama(attention_dropout=0.5), tokens(1, 50)
    assert torch.equal(model(x).logits, model(x).logits)
    model.train()
    assert not torch.equal(model(x).logits, model(x).logits)


@torch.no_grad()
def test_a_loaded_model_is_switched(tmp_path: Path) -> None:
    dense, x = llama("sdpa"), tokens(1, 100)
    for name in PATTERN:
        delattr(dense.config, name)
    use_dilated_attention(dense, LENGTHS, RATES)
    want = llama()(x).logits
    assert torch.equal(dense(x).logits, want)
    dense.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="dilated").eval()
    assert torch.equal(again(x).logits, want)


def test_register_is_idempotent_and_takes_nobodys_place() -> None:
    register()
    assert AttentionInterface()["dilated"] is attention
    assert AttentionMaskInterface()["dilated"] is mask
    AttentionInterface.register("dilated", print)
    try:
        with pytest.raises(ValueError, match="'dilated' to be free"):
            register()
    finally:
        AttentionInterface.register("dilated", attention)


class TestWhatIsRefused:
    def test_no_pattern(self) -> None:
        model = llama(dilated_segment_lengths=None)
        with pytest.raises(ValueError, match="expected dilated_segment_lengths in the LlamaConfig of LlamaAttention"):
            model(tokens(1, 10))

    def test_a_pattern_that_does_not_fit(self) -> None:
        with pytest.raises(ValueError, match="dilation_rates"):
            llama(dilated_dilation_rates=[1])(tokens(1, 10))
        with pytest.raises(ValueError, match="dilation_rates"):
            use_dilated_attention(llama("sdpa"), [16, 32], [1])

    @pytest.mark.parametrize(
        ("make", "options", "message"),
        [
            (lambda: llama("sdpa"), {"backend": "foo"}, "expected backend to be one of .* got 'foo'"),
            (lambda: llama("sdpa"), {"mixing_gradient": "foo"}, "expected mixing_gradient to be one of .* got 'foo'"),
            (lambda: longnet(), {}, "got a LongNetForCausalLM, which has none"),
            (lambda: longnet().model, {}, "got a LongNetLM, which has none"),
            (
                lambda: MambaModel(MambaConfig(vocab_size=9, hidden_size=8, state_size=2, num_hidden_layers=1)), {},
                "got a MambaModel, which has none",
            ),
        ],
    )  # fmt: skip
    def test_a_switch_that_cannot_be(self, make: Any, options: dict[str, str], message: str) -> None:
        model = make()
        before = model.config.to_dict(), getattr(model.config, "_attn_implementation", None)
        with pytest.raises(ValueError, match=message):
            use_dilated_attention(model, [8], [1], **options)
        assert (model.config.to_dict(), getattr(model.config, "_attn_implementation", None)) == before

    def test_soft_caps(self) -> None:
        config = Gemma2Config(
            **SIZES, num_key_value_heads=KV_HEADS, head_dim=8, layer_types=["full_attention"] * 2, **PATTERN
        )
        with pytest.raises(ValueError, match=r"softcap=50\.0"):
            Gemma2ForCausalLM._from_config(config, attn_implementation="dilated")(tokens(1, 10))

    def test_sinks_and_weights(self) -> None:
        module, q = llama().model.layers[0].self_attn, torch.randn(1, HEADS, 10, 8)
        k = torch.randn(1, KV_HEADS, 10, 8)
        for wrong in ({"s_aux": torch.zeros(HEADS)}, {"output_attentions": True}, {"position_bias": k}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                attention(module, q, k, k, None, **wrong)

    def test_prefix_caches(self) -> None:
        model = llama()
        with pytest.raises(ValueError, match="prefix caches are not supported"):
            model(tokens(1, 10), attention_mask=torch.ones(1, 16, dtype=torch.int64), use_cache=False)

    def test_other_masks(self) -> None:
        model, x = llama(), tokens(1, 10)
        with pytest.raises(ValueError, match=r"attention_mask of shape \(batch, keys\)"):
            model(x, attention_mask=torch.zeros(1, 1, 10, 10))

    def test_right_padding_with_a_cache(self) -> None:
        batch, attention_mask, _ = padded([5, 9], "right")
        with pytest.raises(ValueError, match="padding on the left alone"), torch.no_grad():
            longnet()(batch, attention_mask=attention_mask, use_cache=True)

    def test_unknown_arguments_of_longnet(self) -> None:
        with pytest.raises(ValueError, match="token_type_ids"):
            longnet()(tokens(1, 10), token_type_ids=torch.zeros(1, 10))
        with pytest.raises(ValueError, match="multiple of nhead"):
            LongNetHFConfig(d_model=30, nhead=4)


class TestLongNet:
    @torch.no_grad()
    @pytest.mark.parametrize("tie_weights", [False, True])
    def test_auto_classes_round_trip(self, tmp_path: Path, tie_weights: bool) -> None:
        model, x = longnet(tie_weights=tie_weights), tokens(1, 100)
        model.save_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors").is_file()
        config = AutoConfig.from_pretrained(tmp_path)
        assert isinstance(config, LongNetHFConfig) and config.core() == model.config.core()
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert isinstance(again, LongNetForCausalLM)
        assert torch.equal(again(x).logits, model(x).logits)

    def test_legacy_mode_is_not_saved(self, tmp_path: Path) -> None:
        with pytest.warns(FutureWarning, match="legacy_mode is on"), legacy_mode():
            model = longnet()
        with pytest.raises(ValueError, match="expected a model with head_groups=False"):
            model.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())

    @torch.no_grad()
    def test_it_is_the_librarys_model(self) -> None:
        """Same parameters, same logits, same greedy continuation; the start has MAGNETO's scale, not transformers'."""
        model, x = longnet(), tokens(2, 100)
        plain = LongNetLM(LongNetConfig(**model.config.core().to_dict())).double().eval()
        deviations = {name: p.std() for name, p in plain.named_parameters() if p.dim() == 2}
        for name, p in model.model.named_parameters():
            if p.dim() == 2:
                # Both are estimates from at least 1,024 normal draws: five standard errors of their quotient.
                torch.testing.assert_close(p.std() / deviations[name], torch.tensor(1.0).double(), rtol=0.0, atol=0.16)
        plain.load_state_dict(model.model.state_dict())
        assert torch.equal(model(x).logits, plain(x))
        got = model.generate(x[:, :40], max_new_tokens=30, do_sample=False, attention_mask=torch.ones(2, 40))
        assert torch.equal(got[:, 40:], plain.generate(x[:, :40], 30, greedy=True))

    @pytest.mark.parametrize(
        "lost", ["decoder.layers.0.ffn.fc1.weight", "decoder.layers.0.self_attn.q_proj.weight", "embed_tokens.weight"]
    )
    def test_missing_weights_start_as_the_model_does(self, tmp_path: Path, lost: str) -> None:
        from safetensors.torch import load_file, save_file

        fresh = longnet()
        fresh.save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        del state[f"model.{lost}"]
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        for _ in range(3):  # memory that nobody wrote may look right once
            again = LongNetForCausalLM.from_pretrained(tmp_path)
            # Both are estimates from at least 1,024 draws: five standard errors of their quotient.
            quotient = again.get_parameter(f"model.{lost}").std() / fresh.get_parameter(f"model.{lost}").std()
            torch.testing.assert_close(quotient, torch.tensor(1.0).double(), rtol=0.0, atol=0.16)
            assert all(torch.equal(again.get_parameter(name), kept) for name, kept in state.items())

    def test_loss_is_the_shifted_cross_entropy(self) -> None:
        model, x = longnet(), tokens(2, 30)
        labels = x.clone()
        labels[0, :10] = -100
        out = model(x, labels=labels)
        want = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        # transformers takes the loss in fp32.
        torch.testing.assert_close(out.loss.double(), want, rtol=1e-6, atol=0.0)
        assert model(x, logits_to_keep=3).logits.shape == (2, 3, VOCAB)
        assert len(model(x, labels=labels, return_dict=False)) == 2

    def test_gradient_checkpointing_changes_no_gradient(self) -> None:
        model, x = longnet().train(), tokens(1, 60)
        model(x, labels=x).loss.backward()
        want = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        # Renamed in transformers 5.20 or so; older ones know the old name alone.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        assert model.model.gradient_checkpointing
        model(x, labels=x).loss.backward()
        assert all(torch.equal(p.grad, want[name]) for name, p in model.named_parameters())

    def test_resized_embeddings(self) -> None:
        model = longnet()
        model.resize_token_embeddings(120)
        assert model(tokens(1, 10)).logits.shape[-1] == 120


def test_without_transformers_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "try:\n    import dilated_attention_pytorch.integrations.transformers\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "dilated-attention-pytorch[hf]" in done.stdout
