"""Generation: the cache against the uncached forward, its bounds, and the sampling filters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dilated_attention_pytorch.models import KeyValueCache, LongNetLM, left_pad
from dilated_attention_pytorch.models.cache import first_visible
from dilated_attention_pytorch.models.generation import token_probabilities

SMALL: dict[str, Any] = {
    "vocab_size": 17,
    "d_model": 32,
    "nhead": 4,
    "num_decoder_layers": 2,
    "dim_feedforward": 48,
    "segment_lengths": (6, 16, 40),
    "dilation_rates": (1, 2, 3),
    "dtype": torch.float64,
}


def lm(**options: Any) -> LongNetLM:
    return LongNetLM(**{**SMALL, **options}).eval()


def cached_logits(model: LongNetLM, tokens: Tensor, steps: list[int], cache: KeyValueCache) -> Tensor:
    parts, at = [], 0
    with torch.inference_mode():
        for n in steps:
            parts.append(model(tokens[:, at : at + n], cache=cache))
            at += n
    return torch.cat(parts, 1)


def uncached_greedy(model: LongNetLM, prompt: Tensor, count: int, **where: Any) -> Tensor:
    tokens = prompt
    for _ in range(count):
        tokens = torch.cat((tokens, model(tokens, **where)[:, -1].argmax(-1, keepdim=True)), 1)
    return tokens[:, prompt.shape[1] :]


class TestCache:
    @pytest.mark.parametrize("positions", [None, "rotary", "xpos"])
    @pytest.mark.parametrize("num_kv_heads", [4, 2])
    def test_equals_the_uncached_forward(self, positions: str | None, num_kv_heads: int) -> None:
        """Over many segment boundaries, token by token after prompts shorter and longer than every segment."""
        model = lm(positions=positions, num_kv_heads=num_kv_heads)
        tokens = torch.randint(17, (2, 130))
        with torch.no_grad():
            expected = model(tokens)
        for prompt in (1, 5, 40, 97):
            got = cached_logits(model, tokens, [prompt] + [1] * (130 - prompt), model.make_cache())
            assert (got - expected).abs().max() <= 1e-10

    @settings(max_examples=30)
    @given(st.data())
    def test_any_segments_in_any_steps(self, data: st.DataObject) -> None:
        """Drawn patterns, steps and left padding: equal, and nothing is held that nobody can see."""
        lengths = data.draw(st.lists(st.integers(1, 24), min_size=1, max_size=3), "w")
        rates = data.draw(st.lists(st.integers(1, 5), min_size=len(lengths), max_size=len(lengths)), "r")
        steps = data.draw(st.lists(st.one_of(st.just(1), st.integers(1, 30)), min_size=1, max_size=25), "steps")
        total = sum(steps)
        # A row starts within the first step, as a prompt's does.
        starts = data.draw(st.none() | st.lists(st.integers(0, steps[0] - 1), min_size=2, max_size=2), "row_start")
        row_start = None if starts is None else torch.tensor(starts)
        torch.manual_seed(0)
        model = lm(segment_lengths=lengths, dilation_rates=rates, num_decoder_layers=1, d_model=8, nhead=2)
        tokens = torch.randint(17, (2, total))
        cache = model.make_cache(row_start=row_start)
        got = cached_logits(model, tokens, steps, cache)
        with torch.no_grad():
            expected = model(tokens, row_start=row_start)
        for b, first in enumerate(starts or [0, 0]):
            assert (got[b, first:] - expected[b, first:]).abs().max() <= 1e-10
        needed = max(total - s - first_visible(total - s, lengths) for s in starts or [0])
        assert cache.rows_held == needed < max(lengths)

    @pytest.mark.parametrize("lengths", [(4, 16, 64), (6, 16, 40), (39, 40), (64,)])
    def test_memory_is_bounded_by_the_largest_segment(self, lengths: tuple[int, ...]) -> None:
        model = lm(segment_lengths=lengths, dilation_rates=(1,) * len(lengths), num_decoder_layers=1)
        cache = model.make_cache()
        row = 2 * 32 * 8  # keys and values, fp64
        buffers, most = set(), 0
        with torch.inference_mode():
            for n in range(12 * max(lengths)):
                model(torch.randint(17, (1, 1)), cache=cache)
                assert cache.start == min((n + 1) // w * w for w in lengths)
                assert cache.rows_held < max(lengths)
                most = max(most, cache.nbytes)
                assert cache.layers[0].keys is not None
                buffers.add(cache.layers[0].keys.data_ptr())
        nested = all(max(lengths) % w == 0 for w in lengths)
        assert most <= row * (max(lengths) if nested else max(lengths) * 5 / 4)
        if nested:
            assert len(buffers) == 1, "a nested pattern fills one buffer again and again"

    def test_a_token_does_not_copy_the_cache(self) -> None:
        """New buffers are few: each is followed by at least as many tokens as a quarter of the rows it took over."""
        cache = KeyValueCache((39, 1000, 997), 1)
        row = torch.zeros(1, 1, 1, 1)
        moved, address = 0, 0
        for _ in range(20_000):
            cache.begin(1)
            keys, _, _ = cache.layers[0].append(row, row)
            buffer = cache.layers[0].keys
            assert buffer is not None
            if buffer.data_ptr() != address:
                moved += keys.shape[1]
                address = buffer.data_ptr()
            cache.commit()
        assert moved <= 4 * 20_000

    def test_long_prompt_keeps_only_what_is_visible_later(self) -> None:
        model = lm()
        cache = model.make_cache()
        with torch.inference_mode():
            model(torch.randint(17, (1, 470)), cache=cache)
        assert (cache.length, cache.start) == (470, 440)  # 440 = 470 // 40 * 40
        assert cache.rows_held == 30

    def test_bad_use(self) -> None:
        model = lm()
        tokens = torch.randint(17, (1, 5))
        with pytest.raises(ValueError, match=r"expected torch.no_grad\(\) or torch.inference_mode\(\) around"):
            model(tokens, cache=model.make_cache())
        with torch.no_grad():
            with pytest.raises(ValueError, match="expected no key_padding_mask, row_start or cu_seqlens with a cache"):
                model(tokens, cache=model.make_cache(), row_start=torch.tensor([1]))
            with pytest.raises(ValueError, match="expected at least one token with a cache, got none"):
                model(tokens[:, :0], cache=model.make_cache())
            with pytest.raises(ValueError, match="expected a cache of the model's 2 layers, got one of 1"):
                model(tokens, cache=KeyValueCache((40,), 1))
            cache = model.make_cache()
            model(tokens, cache=cache)
            for num_new in (1, 3):
                with pytest.raises(ValueError, match="expected 1 rows of tokens, as the cache has, got 2"):
                    model(tokens[:, :num_new].expand(2, -1), cache=cache)
            assert model(tokens, cache=cache).shape == (1, 5, 17)  # a refused call leaves it as it was
            cache = model.make_cache()
            with pytest.raises(RuntimeError, match=r"expected KeyValueCache.begin before a layer appends"):
                cache.layers[0].append(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8))
            cache.begin(1)
            with pytest.raises(RuntimeError, match="expected a cache whose last forward ended"):
                model(tokens[:, :1], cache=cache)


class TestGenerate:
    @pytest.mark.parametrize("prompt", [1, 15, 40, 100])
    def test_greedy_equals_the_uncached_forward(self, prompt: int) -> None:
        model = lm()
        tokens = torch.randint(17, (3, prompt))
        assert torch.equal(model.generate(tokens, 45, greedy=True), uncached_greedy(model, tokens, 45))

    def test_left_padded_prompts_equal_each_alone(self) -> None:
        model = lm(positions="xpos")
        prompts = [torch.randint(17, (n,)) for n in (50, 21, 1)]
        batch, row_start = left_pad(prompts, pad_token=3)
        assert row_start.tolist() == [0, 29, 49] and batch.shape == (3, 50)
        got = model.generate(batch, 60, greedy=True, row_start=row_start)
        for b, prompt in enumerate(prompts):
            assert torch.equal(got[b : b + 1], model.generate(prompt[None], 60, greedy=True))

    def test_seeds(self) -> None:
        model = lm()
        prompt = torch.randint(17, (2, 9))
        first = model.generate(prompt, 30, seed=1, temperature=2.0)
        assert torch.equal(first, model.generate(prompt, 30, seed=1, temperature=2.0))
        assert torch.equal(
            first, model.generate(prompt, 30, generator=torch.Generator().manual_seed(1), temperature=2.0)
        )
        assert not torch.equal(first, model.generate(prompt, 30, seed=2, temperature=2.0))
        torch.manual_seed(7)
        drawn = model.generate(prompt, 30)
        torch.manual_seed(7)
        assert torch.equal(drawn, model.generate(prompt, 30))

    def test_stream_is_generate_token_by_token(self) -> None:
        model = lm()
        prompt = torch.randint(17, (2, 9))
        stream = model.stream(prompt, 20, seed=1)
        head = [next(stream) for _ in range(3)]
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert not head[0].is_inference()
        assert torch.equal(torch.stack([*head, *stream], 1), model.generate(prompt, 20, seed=1))

    def test_training_mode_comes_back_as_it_was(self) -> None:
        model = lm(dropout=0.5, attention_dropout=0.5)
        prompt = torch.randint(17, (1, 9))
        expected = model.generate(prompt, 10, greedy=True)
        model.train()
        model.decoder.layers[0].eval()
        assert torch.equal(model.generate(prompt, 10, greedy=True), expected)
        assert model.training and model.decoder.layers[1].training and not model.decoder.layers[0].training
        stream = model.stream(prompt, 10, greedy=True)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert model.training

    def test_eos_ends_a_row_and_then_the_batch(self) -> None:
        model = lm()
        prompt = torch.randint(17, (2, 9))
        free = model.generate(prompt, 60, seed=0, temperature=3.0)
        eos = int(free[0, 4])
        got = model.generate(prompt, 60, seed=0, temperature=3.0, eos_token=eos)
        for b in range(2):
            hits = (free[b] == eos).nonzero()
            first = int(hits[0]) if len(hits) else 60
            assert torch.equal(got[b, : first + 1], free[b, : min(first + 1, got.shape[1])])
            assert (got[b, first:] == eos).all()
        last = max(int((row == eos).nonzero()[0]) if (row == eos).any() else 59 for row in free)
        assert got.shape[1] == last + 1

    def test_nothing_to_generate(self) -> None:
        assert lm().generate(torch.zeros(2, 3, dtype=torch.long), 0).shape == (2, 0)

    def test_bfloat16(self) -> None:
        model = lm(dtype=torch.bfloat16)
        tokens = model.generate(torch.randint(17, (1, 9)), 50, seed=0)
        assert tokens.shape == (1, 50) and bool((tokens < 17).all())

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"temperature": 0.0}, ValueError, "expected temperature above 0, got 0.0; greedy=True takes"),
            ({"temperature": "1"}, TypeError, "expected temperature to be a float, got str '1'"),
            ({"top_k": 0}, ValueError, "expected top_k to be at least 1, got 0"),
            ({"top_p": 0.0}, ValueError, r"expected top_p in \(0, 1\], got 0.0"),
            ({"top_p": 1.5}, ValueError, r"expected top_p in \(0, 1\], got 1.5"),
            ({"greedy": True, "top_k": 3}, ValueError, "expected no temperature, top_k or top_p with greedy=True"),
            ({"seed": 1, "generator": torch.Generator()}, ValueError, "expected seed or generator, got both"),
            ({"seed": 1.0}, TypeError, "expected seed to be an int, got float 1.0"),
            ({"greedy": "yes"}, TypeError, "expected greedy to be a bool, got str 'yes'"),
            ({"eos_token": 1.5}, TypeError, "expected eos_token to be an int, got float 1.5"),
            ({"eos_token": 17}, ValueError, r"expected eos_token in \[0, 17\), got 17"),
            ({"beams": 4}, TypeError, r"got \['beams'\]"),
            ({"row_start": torch.tensor([9])}, ValueError, r"expected row_start in \[0, 9\), got \[9\]"),
            ({"row_start": [0]}, TypeError, "expected row_start to be a Tensor, got list"),
            ({"max_new_tokens": -1}, ValueError, "expected max_new_tokens to be at least 0, got -1"),
            ({"prompt": torch.zeros(1, 0, dtype=torch.long)}, ValueError, "expected a prompt of at least one token"),
            ({"prompt": torch.tensor([[3, 17]])}, ValueError, r"expected tokens in \[0, 17\), got 3 to 17"),
            ({"prompt": torch.tensor([3])}, ValueError, r"expected tokens of shape \(B, N\), got \(1,\)"),
        ],
    )
    def test_bad_input(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        options = {"prompt": torch.randint(17, (1, 9)), "max_new_tokens": 5, **options}
        # At the call, not at the first token.
        with pytest.raises(error, match=message):
            lm().stream(options.pop("prompt"), options.pop("max_new_tokens"), **options)

    def test_left_pad_refuses_empty_prompts(self) -> None:
        with pytest.raises(TypeError, match=r"expected sequences\[0\] to be a Tensor, got list"):
            left_pad([[1, 2]])  # type: ignore[list-item]
        with pytest.raises(
            ValueError, match=r"expected sequences to be non-empty tensors of shape \(N,\), got shapes \[\(0,\)\]"
        ):
            left_pad([torch.zeros(0, dtype=torch.long)])


class TestFilters:
    LOGITS = torch.tensor([[0.5, 0.05, 0.3, 0.15], [0.1, 0.2, 0.3, 0.4]]).log()

    def test_temperature(self) -> None:
        cold = token_probabilities(self.LOGITS, 0.5)
        squared = self.LOGITS.exp().square()
        torch.testing.assert_close(cold, squared / squared.sum(-1, keepdim=True))

    def test_top_k(self) -> None:
        got = token_probabilities(self.LOGITS, top_k=2)
        torch.testing.assert_close(got[0], torch.tensor([0.625, 0.0, 0.375, 0.0]))
        torch.testing.assert_close(got[1], torch.tensor([0.0, 0.0, 3 / 7, 4 / 7]))
        torch.testing.assert_close(token_probabilities(self.LOGITS, top_k=99), self.LOGITS.exp())
        # Of likeliest tokens that are equal, still k.
        assert (token_probabilities(torch.zeros(1, 10), top_k=3) > 0).sum() == 3

    def test_top_p(self) -> None:
        got = token_probabilities(self.LOGITS, top_p=0.75)
        torch.testing.assert_close(got[0], torch.tensor([0.625, 0.0, 0.375, 0.0]))
        torch.testing.assert_close(got[1], torch.tensor([0.0, 2 / 9, 3 / 9, 4 / 9]))
        torch.testing.assert_close(token_probabilities(self.LOGITS, top_p=1.0), self.LOGITS.exp())
        # However small, the likeliest token stays.
        assert token_probabilities(self.LOGITS, top_p=1e-9).tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]

    def test_top_p_after_top_k_after_temperature(self) -> None:
        got = token_probabilities(self.LOGITS[:1], 0.5, top_k=3, top_p=0.7)
        # Squares 0.25, 0.09, 0.0225: the first is 0.69 of the three, below 0.7, so the second stays too.
        torch.testing.assert_close(got[0], torch.tensor([0.25 / 0.34, 0.0, 0.09 / 0.34, 0.0]))

    def test_samples_follow_the_distribution(self) -> None:
        """The first token of many equal rows, drawn with every filter on, against the distribution itself."""
        model = lm(d_model=8, nhead=2)
        prompt = torch.randint(17, (1, 9)).expand(20_000, -1)
        options: dict[str, Any] = {"temperature": 1.5, "top_k": 8, "top_p": 0.8}
        drawn = model.generate(prompt, 1, seed=0, **options)[:, 0]
        with torch.no_grad():
            expected = token_probabilities(model(prompt[:1])[:, -1], **options)[0]
        counts = drawn.bincount(minlength=17) / len(drawn)
        assert not counts[expected == 0].any()
        # Five standard deviations of a frequency.
        assert ((counts - expected).abs() <= 5 * (expected * (1 - expected) / len(drawn)).sqrt()).all()
