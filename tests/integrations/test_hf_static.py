"""Caches of fixed and of bounded size in transformers against the one that grows, and against none; fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5")

from transformers import (
    CompileConfig,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from dilated_attention_pytorch.integrations.transformers import (
    LongNetForCausalLM,
    LongNetHFConfig,
    bounded_cache,
    register,
    use_dilated_attention,
)

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
PATTERN: dict[str, Any] = {"dilated_segment_lengths": [6, 16], "dilated_dilation_rates": [1, 3]}
SHIFTED: dict[str, Any] = PATTERN | {"dilated_segment_shift": "alternate", "dilated_offsets": "blocked"}
MIXED: dict[str, Any] = {"dilated_segment_lengths": [[6, 16], None], "dilated_dilation_rates": [[1, 3], None]}
PADS = (0, 9)


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(1)
    model = LlamaForCausalLM._from_config(LlamaConfig(**{**SIZES, **PATTERN, **changes}), attn_implementation="dilated")
    return model.double().eval()


def gemma(**changes: Any) -> Gemma3ForCausalLM:
    """One layer with a window, one without."""
    torch.manual_seed(1)
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5, "head_dim": 8}
    config = Gemma3TextConfig(**{**SIZES, **PATTERN, **kinds, **changes})
    return Gemma3ForCausalLM._from_config(config, attn_implementation="dilated").double().eval()


def longnet(**changes: Any) -> LongNetForCausalLM:
    torch.manual_seed(1)
    sizes = {"vocab_size": 61, "d_model": 32, "nhead": 4, "num_kv_heads": 2, "num_decoder_layers": 2}
    sizes |= {"dim_feedforward": 48, "segment_lengths": [6, 16], "dilation_rates": [1, 3], "pad_token_id": 0}
    return LongNetForCausalLM(LongNetHFConfig(**{**sizes, **changes})).double().eval()


MODELS = {
    "llama": llama,
    "llama, shifted, blocked": lambda: llama(**SHIFTED),
    "llama, a dense layer": lambda: llama(**MIXED),
    "gemma, a window": gemma,
    "longnet": longnet,
    "longnet, xpos, shifted": lambda: longnet(positions="xpos", segment_shift="alternate"),
}


def prompt(length: int = 13) -> tuple[Tensor, Tensor]:
    """Rows padded on the left."""
    real = (torch.arange(length) >= torch.tensor(PADS)[:, None]).long()
    return torch.randint(1, 61, (2, length), generator=torch.Generator().manual_seed(3)) * real, real


def continued(model: Any, count: int = 24, length: int = 13, **how: Any) -> Tensor:
    tokens, real = (x.to(model.device) for x in prompt(length))
    found: Tensor = model.generate(
        tokens, attention_mask=real, max_new_tokens=count, do_sample=False, eos_token_id=None, **how
    )
    return found


@pytest.mark.parametrize("name", MODELS)
def test_static_and_bounded_caches_give_the_tokens_of_the_one_that_grows(name: str) -> None:
    """Over several borders of both branches, with left padding."""
    model = MODELS[name]()
    want = continued(model)
    assert torch.equal(want, continued(model, use_cache=False))
    assert torch.equal(want, continued(model, cache_implementation="static"))
    assert torch.equal(want, continued(model, cache_implementation="static", prefill_chunk_size=5))
    assert torch.equal(want, continued(model, past_key_values=bounded_cache(model)))


@pytest.mark.parametrize("name", ["llama, a dense layer", "longnet"])
def test_beams(name: str) -> None:
    """Their rows change places."""
    model = MODELS[name]()
    want = continued(model, 12, num_beams=3)
    assert torch.equal(want, continued(model, 12, num_beams=3, cache_implementation="static"))
    assert torch.equal(want, continued(model, 12, num_beams=3, past_key_values=bounded_cache(model)))


@pytest.mark.gpu
@pytest.mark.filterwarnings(  # inductor's
    "ignore:TensorFloat32 tensor cores", "ignore:The CUDA Graph is empty", "ignore:\\s*Online softmax is disabled"
)
@pytest.mark.parametrize("name", MODELS)
def test_transformers_compiles_by_itself_on_a_gpu(name: str) -> None:
    """Replays of reduce-overhead; two calls share what was compiled."""
    model = MODELS[name]().cuda()
    want = continued(model)
    for _ in range(2):
        assert torch.equal(want, continued(model, cache_implementation="static"))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_of_each_step(name: str) -> None:
    """Prompts that end at, before and behind borders; without a mask too."""
    model, (tokens, real) = MODELS[name](), prompt(40)
    for start in (1, 6, 16, 17, 31):
        for mask in (real, None):
            positions = None if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
            whole = model(tokens, attention_mask=mask, position_ids=positions).logits
            for cache in (StaticCache(config=model.config, max_cache_len=47), bounded_cache(model)):
                parts = [(0, start), *((n, n + 1) for n in range(start, start + 4))]
                for a, b in parts:
                    given = None if mask is None else mask[:, :b]
                    at = None if positions is None else positions[:, a:b]
                    got = model(tokens[:, a:b], attention_mask=given, past_key_values=cache, position_ids=at)
                    seen = torch.ones(2, b - a) if mask is None else mask[:, a:b]
                    away = (got.logits - whole[:, a:b]).abs().amax(-1) * seen
                    assert away.max() <= 1e-10, (start, b, type(cache).__name__)


@pytest.mark.parametrize("name", ["llama", "longnet"])
def test_compiled_decoding_is_one_graph(name: str) -> None:
    """transformers' own: the step over a static cache is traced once, and nothing breaks it."""
    model, graphs = MODELS[name](), []

    def counting(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    config = CompileConfig(backend=counting, fullgraph=True, mode=None)
    config._compile_all_devices = True
    want = continued(model)
    assert torch.equal(want, continued(model, cache_implementation="static", compile_config=config))
    assert len(graphs) == 1


def test_memory_does_not_grow_past_what_the_pattern_can_see() -> None:
    model = llama(**MIXED)
    cache = bounded_cache(model)
    continued(model, 60, past_key_values=cache)
    held = [layer.keys.shape[2] for layer in cache.layers]
    assert held == [15, 13 + 59] and cache.get_seq_length() == 13 + 59


def test_assisted_decoding_with_a_bounded_cache() -> None:
    """The assistant is wrong now and then, so tokens are undone over borders."""
    model, assistant = llama(), llama(initializer_range=0.29)
    tokens = prompt()[0][:1]
    want = model.generate(tokens, max_new_tokens=40, do_sample=False)
    for cache in (None, bounded_cache(model), DynamicCache(config=model.config)):
        got = model.generate(
            tokens, max_new_tokens=40, do_sample=False, assistant_model=assistant, past_key_values=cache
        )
        assert torch.equal(want, got)


def test_what_these_caches_cannot_hold_is_refused() -> None:
    model, (tokens, _) = llama(), prompt()
    right = torch.ones_like(tokens)
    right[0, -2:] = 0
    with pytest.raises(ValueError, match="padding on the left alone with a static cache"):
        model(tokens, attention_mask=right, past_key_values=StaticCache(config=model.config, max_cache_len=32))
    packed = torch.tensor([[*range(7), *range(6)]] * 2)
    with pytest.raises(ValueError, match="one sequence per row with a static cache"):
        model(tokens, position_ids=packed, past_key_values=StaticCache(config=model.config, max_cache_len=32))
    dense = LlamaForCausalLM(LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="expected a model with attn_implementation='dilated'"):
        bounded_cache(dense)
    use_dilated_attention(dense, [8], [1])
    assert bounded_cache(dense).layers[0].sliding_window == 8
