"""Arguments that torch refuses without a name, or takes and computes NaN with: modules and models name them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dilated_attention_pytorch import (
    MultiheadDilatedAttention,
    RingAttentionConfig,
    RingDistributedDilatedAttention,
)
from dilated_attention_pytorch.models import (
    KeyValueCache,
    LongNet,
    LongNetConfig,
    LongNetEncoder,
    LongNetLM,
    LongViT,
    LongViTConfig,
    SlideEncoder,
    SlideEncoderConfig,
    convert,
    left_pad,
    load_pretrained,
    save_pretrained,
    slide_segment_lengths,
)
from dilated_attention_pytorch.models.slide.embed import EmbedOptions
from dilated_attention_pytorch.models.slide.files import SlideReader, find_slides, pad_slides
from dilated_attention_pytorch.models.slide.maps import slide_map
from dilated_attention_pytorch.models.slide.results import ResultFolder
from dilated_attention_pytorch.models.torchscale import settings
from dilated_attention_pytorch.ring_attention.forecast import balanced_bounds

PATTERN: dict[str, Any] = {"segment_lengths": [4, 8], "dilation_rates": [1, 2]}
TINY: dict[str, Any] = {
    **PATTERN, "d_model": 16, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 32,
}  # fmt: skip
VISION: dict[str, Any] = {**PATTERN, "embed_dim": 16, "depth": 1, "num_heads": 2, "ffn_dim": 32}
X = torch.linspace(-2, 2, 2 * 9 * 16).view(2, 9, 16).sin()


def multihead(**options: Any) -> MultiheadDilatedAttention:
    return MultiheadDilatedAttention(**{"embed_dim": 16, "num_heads": 4, **PATTERN, **options})


def fake(x: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gamma_init": -1}, ValueError, r"gamma_init in \[0, 1e9\], got -1"),
        ({"gamma_init": "1"}, TypeError, "gamma_init to be a float, got str '1'"),
        ({"layer_norm_eps": "x"}, TypeError, "layer_norm_eps to be a float, got str 'x'"),
        ({"layer_norm_eps": float("nan")}, ValueError, "layer_norm_eps to be finite, got nan"),
        ({"rotary_base": None}, TypeError, "rotary_base to be a float, got NoneType None"),
        ({"scale_base": "x", "positions": "xpos"}, TypeError, "scale_base to be a float, got str 'x'"),
        ({"bias": np.array([8, 16])}, TypeError, r"bias to be a bool, got ndarray array\(\[ 8, 16\]\)"),
        ({"layer_norm": 1}, TypeError, "layer_norm to be a bool, got int 1"),
        ({"embed_dim": 2**62}, ValueError, "embed_dim to be below 16777216, got 4611686018427387904"),
        ({"dtype": torch.int64}, TypeError, "dtype to be float16, .*, got dtype torch.int64"),
        ({"dtype": torch.complex64}, TypeError, "dtype to be float16, .*, got dtype torch.complex64"),
        ({"device": "nowhere"}, ValueError, "device to name a device, .*, got 'nowhere'"),
        ({"device": "cuda:99"}, ValueError, "device to be one that is there, got cuda:99"),
    ],
)
def test_a_module_that_torch_would_not_make(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^expected {message}"):
        multihead(**options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": None}, TypeError, "query to be a Tensor, got NoneType"),
        ({"value": [1.0]}, TypeError, "value to be a Tensor, got list"),
        ({"key": X.double()}, TypeError, "key of the parameters' dtype torch.float32, got torch.float64"),
        (
            {"query": X.to(torch.complex64)},
            TypeError,
            "query of the parameters' dtype torch.float32, got torch.complex64",
        ),
        ({"value": X.to_sparse()}, TypeError, "value to be a dense tensor, got torch.sparse_coo"),
        ({"key": X.to_mkldnn()}, TypeError, "key to be a dense tensor, got torch._mkldnn"),
        ({"value": X.to("meta")}, ValueError, "value on the model's device cpu, got meta"),
        ({"query": fake(X)}, TypeError, "query to be a fake tensor like all others or none, got FakeTensor"),
        ({"query": X[0]}, ValueError, r"query of shape \(B, N, 16\), got \(9, 16\)"),
        ({"rotation": 0}, TypeError, "rotation to be a Rotation, got int"),
        ({"cache": []}, TypeError, "cache to be a store of keys and values, got list"),
        ({"cache": "x"}, TypeError, "cache to be a store of keys and values, got str"),
        ({"need_weights": np.array([0, 1])}, TypeError, "need_weights to be a bool, got ndarray"),
        ({"row_start": 3}, TypeError, "row_start to be a Tensor, got int"),
        (
            {"row_start": torch.zeros(2, dtype=torch.int64, device="meta")},
            ValueError,
            "row_start on q's device cpu or on",
        ),
        ({"cu_seqlens": "ab"}, ValueError, r"query of shape \(total, 16\) with cu_seqlens, got \(2, 9, 16\)"),
    ],
)
def test_a_call_that_torch_would_refuse(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^expected {message}"):
        multihead(positions="rotary")(**{"query": X, "key": X, "value": X, **changes})


@pytest.mark.parametrize("positions", [None, "rotary", "xpos"])
@pytest.mark.parametrize("rows", ["whole", "row_start", "cu_seqlens"])
def test_fake_rows_with_fake_bounds(positions: Any, rows: str) -> None:
    """Refused beside real weights, by name, though their positions come first; taken by a fake model, in no mode."""
    mode = FakeTensorMode()
    x = mode.from_tensor(X[0] if rows == "cu_seqlens" else X)
    bounds = mode.from_tensor(torch.tensor([0, 4] if rows == "row_start" else [0, 4, 9]))
    options = {} if rows == "whole" else {rows: bounds}
    with pytest.raises(TypeError, match=r"^expected x to be a fake tensor like all others or none, got FakeTensor"):
        LongNet(**TINY, positions=positions)(x, **options)
    with mode:
        model = LongNet(**TINY, positions=positions)
    assert model(x, **options).shape == x.shape


def test_what_brings_its_input_along_is_left_alone() -> None:
    """A hook, a wrapped forward or another class may cast or move: adapters, FSDP, offloading."""
    module = multihead()
    want = module(X, X, X)[0]
    for projection in (module.q_proj, module.k_proj, module.v_proj):
        projection.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    assert torch.equal(module(*(X.float().double(),) * 3)[0], want)


def test_a_mask_of_inference_mode_cannot_be_kept_for_a_gradient() -> None:
    with torch.inference_mode():
        mask = torch.ones(2, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^expected key_padding_mask made outside inference mode where a gradient"):
        multihead()(X, X, X, key_padding_mask=mask)
    with torch.no_grad():
        assert multihead()(X, X, X, key_padding_mask=mask)[0].shape == X.shape


def test_autocast_takes_other_dtypes() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert multihead()(X.double().float(), X.bfloat16(), X.half())[0].shape == X.shape


@pytest.mark.parametrize(
    ("model", "given", "error", "message"),
    [
        (LongNet, None, TypeError, "x to be a Tensor, got NoneType"),
        (LongNetEncoder, X.double(), TypeError, "x of the parameters' dtype torch.float32, got torch.float64"),
        (LongNetEncoder, X[..., :8], ValueError, r"x of shape \(B, N, 16\), got \(2, 9, 8\)"),
        (LongNetEncoder, X.to("meta"), ValueError, "x on the model's device cpu, got meta"),
        (LongNet, X.to_sparse(), TypeError, "x to be a dense tensor, got torch.sparse_coo"),
        (
            LongNetLM,
            torch.zeros(2, 9, dtype=torch.int64, device="meta"),
            ValueError,
            "tokens on the model's device cpu",
        ),
        (LongNetLM, torch.zeros(2, 9, dtype=torch.int64).to_sparse(), TypeError, "tokens to be a dense tensor, got"),
    ],
)
def test_a_model_names_its_input(model: type[nn.Module], given: Any, error: type[Exception], message: str) -> None:
    made = model(**TINY, **({"vocab_size": 11} if model is LongNetLM else {}))
    with pytest.raises(error, match=f"^expected {message}"):
        made(given)


def test_the_vision_models_name_their_inputs() -> None:
    vit, slide = LongViT(**VISION, patch_size=4, position_grid=[2, 2]), SlideEncoder(**VISION, in_chans=6)
    images, tiles, coords = torch.zeros(1, 3, 8, 8), torch.zeros(1, 5, 6), torch.zeros(1, 5, 2)
    for call, message in (
        (lambda: vit(images.to("meta")), "images on the model's device cpu, got meta"),
        (lambda: vit(images.to_sparse()), "images to be a dense tensor, got torch.sparse_coo"),
        (lambda: slide(tiles.to_mkldnn(), coords), "tiles to be a dense tensor, got torch._mkldnn"),
        (lambda: slide(tiles, coords.to_sparse()), "coords to be a dense tensor, got torch.sparse_coo"),
        (lambda: slide(fake(tiles), coords), "tiles to be a fake tensor like all others or none"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^expected {message}"):
            call()


def test_what_inference_mode_made_gets_no_gradient_but_text() -> None:
    model = LongNetLM(**TINY, vocab_size=11)
    with torch.inference_mode():
        tokens, x = torch.arange(10).view(2, 5), X.clone()
    with pytest.raises(ValueError, match=r"^expected tokens made outside inference mode where a gradient is wanted"):
        model(tokens)
    with pytest.raises(ValueError, match=r"^expected x made outside inference mode"):
        LongNetEncoder(**TINY)(x)
    assert model.generate(tokens, 2, seed=0).shape == (2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 10**400}, "temperature to be finite, got an int of"),
        ({"temperature": 5e-324}, "temperature of at least 1e-30, got 5e-324"),
        ({"top_p": float("nan")}, "top_p to be finite, got nan"),
        ({"generator": "x"}, "generator to be a torch.Generator, got str 'x'"),
        ({"seed": 2**64}, r"seed to be below 2\*\*63, got 18446744073709551616"),
    ],
)
def test_sampling_names_its_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^expected {message}"):
        LongNetLM(**TINY, vocab_size=11).generate(torch.arange(10).view(2, 5), 2, **options)


@pytest.mark.parametrize(
    "config",
    [
        LongNetConfig(**{**TINY, "d_model": np.int64(16), "dropout": np.float64(0.1), "offsets": np.str_("blocked")}),
        SlideEncoderConfig(**{**VISION, "embed_dim": np.int32(16), "tile_size": np.int64(256), "drop_path": 0}),
        LongViTConfig(
            **{**VISION, "depth": np.uint8(1), "num_classes": np.int64(3), "position_grid": np.arange(2, 4).tolist()}
        ),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_config_keeps_what_json_has(config: Any) -> None:
    kept = json.loads(json.dumps(config.to_dict()))
    assert type(config).from_dict(kept) == config
    assert all(type(value) in (int, float, str, bool, tuple, type(None)) for value in vars(config).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": ["LongNet"]}, r"architecture in config.json to be one of .*, got \['LongNet'\]"),
        ({"d_model": 2**62}, "d_model to be below 16777216, got 4611686018427387904"),
        ({"num_decoder_layers": 10**30}, r"num_decoder_layers to be below 65536, got 10{30}"),
        ({"dropout": [0.1]}, r"dropout to be a float, got list \[0.1\]"),
    ],
)
def test_a_saved_config_names_its_field(change: dict[str, Any], message: str, tmp_path: Any) -> None:
    save_pretrained(LongNetLM(**TINY, vocab_size=11), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises((TypeError, ValueError), match=f"^expected {message}"):
        load_pretrained(tmp_path)


def test_saved_weights_are_floating_and_go_to_a_device_that_is_there(tmp_path: Any) -> None:
    save_pretrained(LongNetLM(**TINY, vocab_size=11), tmp_path)
    with pytest.raises(ValueError, match=r"^expected device to be one that is there, got cuda:99"):
        load_pretrained(tmp_path, device="cuda:99")
    with pytest.raises(TypeError, match=r"^expected dtype to be float16, .* got dtype torch.int64"):
        load_pretrained(tmp_path, dtype=torch.int64)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "embed_tokens.weight": weights["embed_tokens.weight"].long()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"embed_tokens.weight of torch.int64, expected a floating dtype"):
        load_pretrained(tmp_path)


ENCODER: Any = SlideEncoder(**VISION, in_chans=6).eval()
THEIRS = {k.removeprefix("encoder."): x for k, x in LongNetEncoder(**TINY).state_dict().items()}


class Three:
    """An int by `__index__`."""

    def __index__(self) -> int:
        return 3


TILES, PLACES = torch.zeros(1, 3, 6), 256 * torch.arange(6).view(1, 3, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: left_pad(5), TypeError, "sequences to be of list or tuple, got int 5"),
        (lambda: left_pad([]), ValueError, "sequences to be non-empty tensors"),
        (lambda: left_pad([torch.zeros(3)]), TypeError, r"sequences\[0\] of dtype int32 or int64, got torch.float32"),
        (lambda: left_pad([torch.ones(3, dtype=torch.int64, device="meta")]), TypeError, r"sequences\[0\] with values"),
        (lambda: left_pad([torch.ones(3, dtype=torch.int64)], "x"), TypeError, "pad_token to be an int, got str"),
        (lambda: KeyValueCache([], 1), ValueError, "segment_lengths to hold at least one"),
        (lambda: KeyValueCache([8], "one"), TypeError, "num_layers to be an int"),
        (lambda: KeyValueCache([8], 1, shifts=3), TypeError, "shifts to be of list or tuple, got int 3"),
        (lambda: KeyValueCache([8], 1, row_start=4), TypeError, "row_start to be a Tensor, got int"),
        (lambda: save_pretrained(LongNetLM(**TINY, vocab_size=11), 3), TypeError, "folder to be a path, got int 3"),
        (lambda: load_pretrained(None), TypeError, "folder to be a path, got NoneType"),
        (lambda: convert(4), TypeError, "weights, unless they are a mapping, to be a path, got int 4"),
        (lambda: convert({4: torch.zeros(2)}), ValueError, r"to hold tensors by name, got beside them: 4 \(Tensor\)"),
        (
            lambda: convert(THEIRS, num_heads=2, segment_lengths=[8], dilation_rates=np.float64(0.5)),
            TypeError,
            "dilation_rates to be a sequence of ints, got float64",
        ),
        (
            lambda: convert(THEIRS, num_heads=2, **PATTERN, scale_embedding=torch.ones(2)),
            TypeError,
            "scale_embedding to be a bool, got Tensor",
        ),
        (
            lambda: RingDistributedDilatedAttention(16, 4, config=()),
            TypeError,
            "config to be of RingAttentionConfig, got tuple",
        ),
        (lambda: SlideEncoder.from_pretrained(4), TypeError, "weights, unless they are a mapping, to be a path"),
        (lambda: settings(3, "encoder"), TypeError, "args to hold settings by name, got int 3"),
        (lambda: slide_segment_lengths(2**62), ValueError, r"max_wsi_size and tile_size to make fewer than 2\*\*63"),
        (lambda: slide_map(3, TILES, PLACES), TypeError, "encoder to be of SlideEncoder, got int 3"),
        (lambda: slide_map(ENCODER, TILES, PLACES, heads=9), ValueError, r"heads in \[0, 2\), got 9"),
        (lambda: slide_map(ENCODER, TILES, PLACES, heads=np.ones(2)), TypeError, "heads to be an int, got ndarray"),
        (
            lambda: ENCODER(TILES, PLACES, all_layer_embed=np.ones(2)),
            TypeError,
            "all_layer_embed to be a bool, got nda",
        ),
        (lambda: slide_map(ENCODER, TILES, PLACES, rollout=1), TypeError, "rollout to be a bool, got int 1"),
        (lambda: SlideReader(in_chans=0), ValueError, "in_chans to be at least 1, got 0"),
        (lambda: SlideReader(tile_size="256"), TypeError, "tile_size to be an int, got str"),
        (lambda: SlideReader(coords_folder=3), TypeError, "coords_folder to be a path, got int 3"),
        (lambda: find_slides(None), TypeError, "folder to be a path, got NoneType"),
        (lambda: pad_slides([3]), TypeError, r"slides\[0\] to be of Slide, got int 3"),
        (lambda: pad_slides([]), ValueError, "slides to hold at least one, got none"),
        (lambda: EmbedOptions(dtype=np.ones(2)), ValueError, "dtype to be one of"),
        (lambda: EmbedOptions(layers=3), TypeError, "layers to be of tuple or list, got int 3"),
        (lambda: ResultFolder("x", "gif", {}), ValueError, "format to be one of"),
        (lambda: balanced_bounds(3, 8, 2), TypeError, "pattern to be of DilatedPattern, got int 3"),
        (lambda: RingAttentionConfig(**PATTERN, segment_shift=1, padding=np.ones(2)), ValueError, "padding to be one"),
    ],
)
def test_what_stands_where_another_object_should(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^expected .*{message}"):
        call()


def test_integers_of_numpy_are_taken_as_those_of_python() -> None:
    """In 8 bits 2**15 is too much."""
    assert slide_segment_lengths(2**15, np.uint8(128)) == slide_segment_lengths(2**15, 128)
    batch, _ = left_pad([torch.ones(1, dtype=torch.int64), torch.ones(2, dtype=torch.int64)], np.uint8(7))
    assert batch.tolist() == [[7, 1], [1, 1]]
    model, prompt = LongNetLM(**TINY, vocab_size=11).eval(), torch.zeros(1, 250, dtype=torch.int64)
    assert model.generate(prompt, np.uint8(3)).shape == (1, 3) == model.generate(prompt, Three()).shape
    assert type(SlideReader(tile_size=np.uint8(128)).tile_size) is int
    assert type(EmbedOptions(batch_tokens=np.int64(9)).batch_tokens) is int


def test_causality_is_a_bool_before_it_is_looked_up() -> None:
    model, tokens = LongNetLM(**TINY, vocab_size=11), torch.zeros(1, 30, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"^expected is_causal to be a bool, got ndarray"):
        model(tokens, is_causal=np.ones(2))


def test_hidden_states_go_into_a_list() -> None:
    with pytest.raises(TypeError, match=r"^expected states to be of list or NoneType, got tuple"):
        LongNetLM(**TINY, vocab_size=11)(torch.zeros(1, 3, dtype=torch.int64), states=())
