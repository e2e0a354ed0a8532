"""Saving and loading: round trips, strictness, and files that are never half written."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated_attention_pytorch.models import (
    LongNet,
    LongNetConfig,
    LongNetEncoder,
    LongNetLM,
    load_pretrained,
    save_pretrained,
)

safetensors = pytest.importorskip("safetensors.torch")

SMALL: dict[str, Any] = {
    "d_model": 32,
    "nhead": 4,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "dim_feedforward": 48,
    "segment_lengths": (6, 16),
    "dilation_rates": (1, 2),
}


def tiny_lm(**options: Any) -> LongNetLM:
    return LongNetLM(vocab_size=11, **SMALL, **options).eval()


@pytest.mark.parametrize("tie", [False, True])
def test_language_model_comes_back(tmp_path: Path, tie: bool) -> None:
    model = tiny_lm(tie_weights=tie, num_kv_heads=2)
    save_pretrained(model, tmp_path / "new" / "folder")
    twin = load_pretrained(tmp_path / "new" / "folder")
    assert type(twin) is LongNetLM and twin.config == model.config and not twin.training
    tokens = torch.randint(11, (1, 30))
    assert torch.equal(twin(tokens), model(tokens))
    assert all(p.requires_grad and p.device.type == "cpu" for p in twin.parameters())
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["config.json", "model.safetensors"]
    (tmp_path / "plain").touch()  # as readable as any other file
    assert {path.stat().st_mode for path in (tmp_path / "new" / "folder").iterdir()} == {
        (tmp_path / "plain").stat().st_mode
    }
    saved = safetensors.load_file(tmp_path / "new" / "folder" / "model.safetensors")
    assert ("output_projection.weight" in saved) is not tie


@pytest.mark.parametrize("kind", [LongNet, LongNetEncoder])
def test_other_models_come_back(tmp_path: Path, kind: Any) -> None:
    model = kind(**SMALL, dtype=torch.float64).eval()
    save_pretrained(model, tmp_path)
    twin = load_pretrained(tmp_path)
    x = torch.randn(1, 30, 32, dtype=torch.float64)
    assert type(twin) is kind and torch.equal(twin(x), model(x))


def test_dtype_and_overwriting(tmp_path: Path) -> None:
    save_pretrained(tiny_lm(), tmp_path)
    save_pretrained(tiny_lm(positions=None), tmp_path)
    twin = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert twin.config.positions is None
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}


def test_a_model_of_another_class_or_library_is_not_replaced(tmp_path: Path) -> None:
    save_pretrained(LongNetEncoder(**SMALL), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="without a model or with a LongNetLM, got a LongNetEncoder in "):
        save_pretrained(tiny_lm(), tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ValueError, match=r"got a config\.json of another library in "):
        save_pretrained(tiny_lm(), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before["model.safetensors"]
    (tmp_path / "config.json").write_text("{")  # half a file is replaced
    save_pretrained(tiny_lm(), tmp_path)
    assert type(load_pretrained(tmp_path)) is LongNetLM


def test_every_wrong_key_is_named(tmp_path: Path) -> None:
    model = tiny_lm()
    save_pretrained(model, tmp_path)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    del state["embed_tokens.weight"], state["decoder.layers.1.ffn.fc1.bias"]
    state["decoder.layers.2.ffn.fc1.bias"] = torch.zeros(48)
    state["decoder.layer_norm.weight"] = torch.zeros(31)
    safetensors.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="expected the weights of a LongNetLM, got") as raised:
        load_pretrained(tmp_path)
    for part in (
        "missing embed_tokens.weight",
        "missing decoder.layers.1.ffn.fc1.bias",
        "unexpected decoder.layers.2.ffn.fc1.bias",
        "decoder.layer_norm.weight of shape (31,), expected (32,)",
        f", in {tmp_path / 'model.safetensors'}",
    ):
        assert part in str(raised.value)


def test_a_failed_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_lm()
    save_pretrained(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def torn(state: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors, "save_file", torn)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(tiny_lm(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"expected model to be one of .* got Linear; pass the bare model"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"expected config.json in .*, found none"):
        load_pretrained(tmp_path)
    save_pretrained(tiny_lm(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "depth": 3, "heads": 1}))
    with pytest.raises(
        ValueError, match=r"got unknown keys \['depth', 'heads'\]; known are \['activation'.*, in .*config\.json"
    ):
        load_pretrained(tmp_path)
    for value, kind in (("32", TypeError), (2**62, ValueError)):
        (tmp_path / "config.json").write_text(json.dumps({**config, "d_model": value}))
        with pytest.raises(kind, match=r"expected d_model to be .*, in .*config\.json"):
            load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "architecture": "GPT"}))
    with pytest.raises(ValueError, match=r"expected architecture in config.json to be one of .* got 'GPT'"):
        load_pretrained(tmp_path)
    deep = '{"a":' * 100_000
    for text, got in (
        ("{", "JSON, got JSONDecodeError"),
        ("[1]", "a JSON object, got list"),
        (deep, "JSON, got ValueError"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"config\.json to hold {got}"):
            load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"model\.safetensors to hold tensors as safetensors writes them, got "):
        load_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"expected safetensors, .* pip install 'dilated-attention-pytorch\[cli\]'"):
        save_pretrained(tiny_lm(), tmp_path)


class TestConfig:
    def test_json_round_trip(self) -> None:
        config = LongNetConfig(d_model=64, nhead=4, segment_lengths=[5, 9], dilation_rates=[1, 2], vocab_size=7)  # type: ignore[arg-type]
        again = LongNetConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config and hash(again) == hash(config)
        assert again.segment_lengths == (5, 9)

    def test_paper_defaults(self) -> None:
        config = LongNetConfig()
        assert (config.d_model, config.nhead, config.dim_feedforward) == (768, 12, 3072)
        assert (config.num_encoder_layers, config.num_decoder_layers, config.dropout) == (12, 12, 0.0)
        assert config.pattern.branches == ((2048, 1), (4096, 2), (8192, 4), (16384, 6), (32768, 12))

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"d_model": 30}, ValueError, "expected d_model to be a multiple of nhead, got 30 and 12"),
            ({"num_kv_heads": 5}, ValueError, "expected nhead to be a multiple of num_kv_heads, got 12 and 5"),
            ({"nhead": "12"}, TypeError, "expected nhead to be an int, got str '12'"),
            ({"dropout": 1}, ValueError, r"expected dropout in \[0, 1\), got 1"),
            ({"activation": "swish"}, ValueError, r"expected activation to be one of \['relu', 'gelu'\], got 'swish'"),
            ({"positions": "none"}, ValueError, r"expected positions to be one of \['rotary', 'xpos'\], got 'none'"),
            ({"layer_norm_eps": 0.0}, ValueError, "expected layer_norm_eps above 0, got 0.0"),
            ({"scale_base": "512"}, TypeError, "expected scale_base to be a float, got str"),
            ({"tie_weights": 1}, TypeError, "expected tie_weights to be a bool, got int 1"),
            ({"dilation_rates": [1, 2]}, ValueError, "of equal length, got 5 lengths"),
            ({"vocab_size": 0}, ValueError, "expected vocab_size to be at least 1, got 0"),
        ],
    )
    def test_bad_input(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            LongNetConfig(**options)
