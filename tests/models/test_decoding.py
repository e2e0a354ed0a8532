"""Steps over buffers of fixed size, replayed as CUDA graphs on a GPU, against the growing cache."""

from __future__ import annotations

import gc
import os
import weakref
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # read when Triton is imported
pytest.importorskip("triton")

from dilated_attention_pytorch.models import LongNetLM, generation, longnet
from dilated_attention_pytorch.models.cache import KeyValueCache
from dilated_attention_pytorch.models.decode_step import DecodeStep, suits
from dilated_attention_pytorch.models.decoding import DecodingCache, EagerSteps, why_not, why_not_unasked
from dilated_attention_pytorch.models.generation import Sampler

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL: dict[str, Any] = {
    "vocab_size": 17, "d_model": 32, "nhead": 4, "num_kv_heads": 2, "num_decoder_layers": 2, "dim_feedforward": 48,
    "segment_lengths": (8, 16), "dilation_rates": (1, 2), "device": DEVICE,
}  # fmt: skip


def lm(**changes: Any) -> LongNetLM:
    return LongNetLM(**{**SMALL, **changes}).eval()


def prompt(rows: int = 2, length: int = 13) -> torch.Tensor:
    return torch.randint(17, (rows, length), device=DEVICE)


def fixed_buffers(model: LongNetLM, growing: KeyValueCache, longest: int) -> DecodingCache:
    starts = 0 if growing.row_start is None else growing.row_start
    batch = growing.held_rows()[0][0].shape[0]
    fixed = DecodingCache(model, torch.full((batch,), growing.length, device=DEVICE) - starts, longest)
    fixed.take(growing)
    return fixed


@pytest.mark.parametrize("positions", ["rotary", "xpos", None])
def test_logits_equal_the_growing_cache(positions: str | None) -> None:
    """Over several borders, rows padded on the left; fp32 to 1e-5."""
    model, tokens, row_start = (
        lm(positions=positions, segment_shift="alternate"),
        prompt(length=26),
        torch.tensor([0, 9], device=DEVICE),
    )
    with torch.inference_mode():
        growing = model.make_cache(row_start=row_start)
        model(tokens[:, :13], cache=growing)
        fixed = fixed_buffers(model, growing, 26)
        for n in range(13, 26):
            want, got = (model(tokens[:, n : n + 1], cache=cache) for cache in (growing, fixed))
            assert (want - got).abs().max() <= 1e-5, n
    assert fixed.positions.tolist() == [26, 17]


PLAIN: tuple[dict[str, Any], ...] = (
    {"positions": "xpos", "segment_shift": "alternate", "tie_weights": True},
    {"positions": None, "activation": "relu", "num_kv_heads": 4},
)


@pytest.mark.parametrize("changes", PLAIN, ids=["xpos, shifted, tied", "relu"])
def test_logits_of_few_launches_equal_those_of_modules(changes: dict[str, Any]) -> None:
    model, tokens, row_start = lm(**changes), prompt(1, 19), torch.tensor([9], device=DEVICE)
    with torch.inference_mode():
        for each in model.parameters():  # biases start at 0 and norms at 1
            each.add_(torch.randn_like(each), alpha=0.1)
        growing = model.make_cache(row_start=row_start)
        model(tokens[:, :13], cache=growing)
        fixed = fixed_buffers(model, growing, 19)
        step = DecodeStep(model, fixed)
        for n in range(13, 19):
            want, got = model(tokens[:, n : n + 1], cache=growing)[:, 0], step(tokens[:, n : n + 1])
            assert (want - got).abs().max() <= 1e-5, n


def test_only_plain_models_are_read_in_place_of_being_called() -> None:
    class Mine(LongNetLM):
        pass

    model, adapted, patched = lm(), lm(), lm()
    adapted.decoder.layers[0].ffn.fc1 = Adapted(adapted.decoder.layers[0].ffn.fc1)
    patched.decoder.layers[1].self_attn.q_proj.forward = patched.decoder.layers[1].self_attn.q_proj.forward
    mixed = lm()
    mixed.output_projection = mixed.output_projection.double()
    assert suits(model, 1) and not suits(model, 2)
    assert not any(suits(each, 1) for each in (adapted, patched, mixed, Mine(**SMALL)))


@pytest.mark.parametrize(
    "options", [{"greedy": True}, {"seed": 3, "top_k": 5, "top_p": 0.9, "temperature": 0.7}], ids=["greedy", "sampled"]
)
def test_generate_gives_the_same_tokens(options: dict[str, Any]) -> None:
    model, tokens, row_start = lm(num_decoder_layers=1), prompt(), torch.tensor([0, 9], device=DEVICE)
    want = model.generate(tokens, 14, row_start=row_start, **options)
    got = model.generate(tokens, 14, row_start=row_start, graphed=True, prefill_chunk=5, **options)
    assert torch.equal(want, got)


@pytest.mark.parametrize("length", [16, 32, 1])
def test_a_prompt_that_ends_with_all_segments(length: int) -> None:
    """Nothing of it is in sight any more: the buffers start empty."""
    model, tokens = lm(num_decoder_layers=1), prompt(length=length)
    assert torch.equal(model.generate(tokens, 3, greedy=True), model.generate(tokens, 3, greedy=True, graphed=True))


def test_rows_are_taken_apart_in_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time, left padding included; one growing cache at a time."""
    made: list[weakref.ref[KeyValueCache]] = []

    def counted(self: LongNetLM, **given: Any) -> KeyValueCache:
        gc.disable()  # nothing may wait for it
        assert sum(cache() is not None for cache in made) <= 1
        cache = KeyValueCache((8, 16), 1, **given)
        made.append(weakref.ref(cache))
        return cache

    model, tokens, row_start = lm(num_decoder_layers=1), prompt(5, 13), torch.tensor([0, 9, 3, 12, 1], device=DEVICE)
    want = model.generate(tokens, 5, greedy=True, row_start=row_start)
    monkeypatch.setattr(generation, "_AT_ONCE", 26)
    monkeypatch.setattr(LongNetLM, "make_cache", counted)
    try:
        assert torch.equal(want, model.generate(tokens, 5, greedy=True, row_start=row_start, graphed=True))
    finally:
        gc.enable()
    assert len(made) == 3


def test_generation_ends_at_the_same_token() -> None:
    model, tokens = lm(num_decoder_layers=1, vocab_size=5), prompt() % 5
    new = (model.generate(tokens, 12, seed=seed, eos_token=4) for seed in range(20))
    seed, want = next((seed, found) for seed, found in enumerate(new) if 2 < found.shape[1] < 12)
    assert torch.equal(want, model.generate(tokens, 12, seed=seed, eos_token=4, graphed=True))


@pytest.mark.parametrize("chunk", [1, 5, 12, 13, 100])
def test_a_prompt_in_pieces_gives_the_same_tokens(chunk: int) -> None:
    """Rows may begin in any piece."""
    model, row_start = lm(segment_lengths=(6, 16), dilation_rates=(1, 3), dtype=torch.float64), torch.tensor([0, 9])
    tokens, row_start = prompt(length=37), row_start.to(DEVICE)
    want = model.generate(tokens, 8, greedy=True, row_start=row_start)
    assert torch.equal(want, model.generate(tokens, 8, greedy=True, row_start=row_start, prefill_chunk=chunk))


def test_what_cannot_be_replayed_is_refused_by_name() -> None:
    tokens = prompt()
    with pytest.raises(ValueError, match=r"graphed=True.*float64"):
        lm(dtype=torch.float64).generate(tokens, 2, graphed=True)
    hooked = lm()
    hooked.decoder.layers[0].ffn.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        hooked.stream(tokens, 2, graphed=True)
    with pytest.raises(TypeError, match="graphed"):
        lm().generate(tokens, 2, graphed=1)
    with pytest.raises(ValueError, match="prefill_chunk"):
        lm().generate(tokens, 2, prefill_chunk=0)
    assert why_not(lm(), tokens) == []


def test_graphs_are_the_default_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []
    monkeypatch.setattr(longnet, "sample", lambda model, prompt, count, sampling: taken.append(sampling["graphed"]))
    model, hooked, adapted = lm(), lm(), lm()
    hooked.register_forward_hook(lambda *_: None)
    adapted.decoder.layers[0].ffn.fc1 = Adapted(adapted.decoder.layers[0].ffn.fc1)
    for each, given in (
        (model, {}),
        (model, {"graphed": None}),
        (hooked, {}),
        (adapted, {}),
        (model, {"graphed": False}),
    ):
        each.stream(prompt(), 2, **given)
    assert taken == [DEVICE == "cuda", DEVICE == "cuda", False, False, False]
    assert why_not(adapted, prompt()) == [] and "Adapted" in why_not_unasked(adapted, prompt())[-1]


class Adapted(torch.nn.Sequential):
    """A module of somebody else's."""


def test_one_token_at_a_time() -> None:
    model, tokens = lm(), prompt()
    with torch.inference_mode():
        cache = model.make_cache()
        with pytest.raises(ValueError, match="seen tokens"):
            fixed_buffers(model, cache, 20)
        model(tokens, cache=cache)
        fixed = fixed_buffers(model, cache, 20)
        with pytest.raises(ValueError, match="one token at a time"):
            model(tokens, cache=fixed)
        with pytest.raises(ValueError, match="2 rows"):
            model(tokens[:1, :1], cache=fixed)


def test_steps_stop_where_every_row_has_ended() -> None:
    """Also within a block of steps that were taken ahead."""
    sampler = Sampler(2, torch.device("cpu"), {"eos_token": 4})
    assert sampler.end([torch.tensor([4, 1]), torch.tensor([4, 4]), torch.tensor([4, 4])]) == 2
    assert sampler.end([torch.tensor([4, 1])]) is None


@pytest.mark.parametrize("graphed", [False, True])
@pytest.mark.parametrize(("when", "error"), [(0, KeyboardInterrupt), (1, RuntimeError), (3, KeyboardInterrupt)])
def test_an_error_in_the_middle_leaves_the_model_usable(
    error: type[BaseException], when: int, graphed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the prompt, in the first step or later; training mode comes back, and the next call gives what it gave."""
    model, tokens = lm(num_decoder_layers=1), prompt(1)
    want = model.generate(tokens, 5, greedy=True)
    model.train()
    model.decoder.layer_norm.eval()  # a part that the caller froze
    draws, draw = iter(range(100)), Sampler.draw

    def broken(self: Sampler, logits: torch.Tensor) -> torch.Tensor:
        if next(draws) == when:
            raise error("stopped")
        return draw(self, logits)

    with monkeypatch.context() as patched:
        patched.setattr(Sampler, "draw", broken)
        with pytest.raises(error, match="stopped"):
            model.generate(tokens, 5, greedy=True, graphed=graphed)
    assert model.training and model.decoder.layers[0].training and not model.decoder.layer_norm.training
    assert not torch.is_inference_mode_enabled()
    assert torch.equal(want, model.generate(tokens, 5, greedy=True, graphed=graphed))


def test_two_generators_do_not_mix() -> None:
    model, a, b = lm(num_decoder_layers=1), prompt(1), prompt(1)
    want = [model.generate(x, 6, greedy=True) for x in (a, b)]
    streams = [model.stream(x, 6, greedy=True, graphed=True) for x in (a, b)]
    got = list(zip(*streams, strict=True))
    for i in range(2):
        assert torch.equal(torch.stack([pair[i] for pair in got], 1), want[i])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_equal_the_steps_they_were_captured_from(dtype: torch.dtype) -> None:
    """Bit for bit, over many borders; and the generator stands where it would."""
    model = lm(d_model=128, segment_lengths=(64, 256), dilation_rates=(1, 4), dtype=dtype)
    tokens = prompt(3, 100)
    for options in ({"greedy": True}, {"top_k": 5}, {"eos_token": 4}):
        results, states = [], []
        for steps in (EagerSteps, None):
            generator = torch.Generator(DEVICE).manual_seed(5)
            given = options if options.get("greedy") else {**options, "generator": generator}
            if steps is None:
                results.append(model.generate(tokens, 300, graphed=True, **given))
            else:
                results.append(eager_over_fixed_buffers(model, tokens, 300, given))
            states.append(generator.get_state())
        assert torch.equal(*results), options
        assert torch.equal(*states), options


def eager_over_fixed_buffers(model: LongNetLM, tokens: torch.Tensor, count: int, options: Any) -> torch.Tensor:
    """What `graphed=True` does, without graphs."""
    sampler = Sampler(tokens.shape[0], tokens.device, options)
    with torch.inference_mode():
        growing = model.make_cache()
        new = [sampler.draw(model(tokens, cache=growing)[:, -1])]
        steps = EagerSteps(model, fixed_buffers(model, growing, 1000), sampler.draw, new[0])
        while len(new) < count and sampler.end(new[-1:]) is None:
            new += steps.take(1)
    return torch.stack(new, 1)


@pytest.mark.gpu
def test_a_stream_cut_short_leaves_the_model_and_the_generator_usable() -> None:
    model, tokens = lm(), prompt()
    generator = torch.Generator(DEVICE).manual_seed(5)
    stream = model.stream(tokens, 200, graphed=True, generator=generator, eos_token=4)
    first = [next(stream) for _ in range(2)]
    stream.close()
    other = torch.Generator(DEVICE).manual_seed(5)
    again = model.stream(tokens, 2, graphed=True, generator=other)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert torch.equal(generator.get_state(), other.get_state())
