"""What is saved, loaded and converted, and what a decoder keeps."""

from __future__ import annotations

import operator
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dilated_attention_pytorch import LongNetEncoder, LongNetLM
from dilated_attention_pytorch.models import (
    Conversion,
    KeyValueCache,
    convert,
    left_pad,
    load_pretrained,
    save_pretrained,
)
from dilated_attention_pytorch.models.weights import read_state
from fuzz.judge import Call
from fuzz.table import target
from fuzz.targets import slides
from fuzz.targets.modules import fuzzed_model, spoil
from fuzz.values import anything, pick, sequences, spoiled

_SHAPE: dict[str, Any] = {"num_heads": 4, "segment_lengths": [16], "dilation_rates": [1]}


@cache
def _theirs() -> dict[str, Tensor]:
    """A state dict as torchscale's encoder has it."""
    torch.manual_seed(0)
    state = LongNetEncoder(d_model=32, nhead=4, dim_feedforward=64, num_encoder_layers=1).state_dict()
    return {name.removeprefix("encoder."): x for name, x in state.items()}


@target("save_pretrained and load_pretrained", 16, "save_pretrained", "load_pretrained")
def _saved(draw: st.DrawFn) -> Call:
    model = fuzzed_model(LongNetLM)
    place = tempfile.mkdtemp(dir=slides.folder())
    if draw(st.booleans()):
        given: dict[str, Any] = {"model": model, "folder": place}
        names = pick(draw, ["model"])  # any word is a folder
        spoil(draw, given, names)
        return Call(save_pretrained, (), given, right=not names)
    save_pretrained(model, place)
    given = {"folder": place, "backend": "auto", "device": "cpu", "dtype": None}
    names = pick(draw, list(given))
    spoil(draw, given, names)

    def check(loaded: Any) -> None:
        for a, b in zip(loaded.parameters(), model.parameters(), strict=True):
            assert a.is_meta or torch.equal(a, b.to(a.dtype))

    return Call(load_pretrained, (), given, check=check, right=not names, also=(OSError,))


@target("read_state", 10)
def _read(draw: st.DrawFn) -> Call:
    state: Any = dict(_theirs())
    what = draw(st.sampled_from(["whole", "nested", "value", "name", "anything", "file"]))
    if what == "nested":
        state = {"model": state}
    elif what == "value":
        state["layer_norm.weight"] = draw(anything)
    elif what == "name":
        state[draw(st.sampled_from([0, None, ("a",), 1.5]))] = torch.zeros(2)
    elif what == "anything":
        state = draw(anything)
    place = tempfile.mkdtemp(dir=slides.folder())
    if what == "file":
        state = Path(place, draw(st.sampled_from(["x.pth", "x.safetensors"])))
        state.write_bytes(draw(st.binary(max_size=40)))

    def check(found: dict[str, Tensor]) -> None:
        assert all(isinstance(name, str) and isinstance(x, Tensor) for name, x in found.items())

    words = ("mapping", "source", "tensors", "tensor", "weights", "safetensors", "file")
    return Call(read_state, (state,), {}, words, check, what in ("whole", "nested"), also=(OSError,))


@target("convert", 16)
def _convert(draw: st.DrawFn) -> Call:
    options = {"activation": "gelu", "layer_norm_eps": 1e-5, "scale_embedding": False}
    given: dict[str, Any] = {"weights": dict(_theirs()), "source": None, "args": None, **_SHAPE}
    given |= {name: options[name] for name in draw(st.lists(st.sampled_from(sorted(options)), unique=True))}
    names = pick(draw, [*given, "max_wsi_size", "tile_size", "global_pool", "as_initialisation", "xpos_scale_base"])
    spoil(draw, given, names)

    def check(found: Conversion) -> None:
        x = torch.linspace(-2, 2, 9 * 32).view(1, 9, 32)
        assert found.source == "torchscale-encoder" and bool(found.model(x).isfinite().all())

    also = ("nhead", "d_model", "keys", "tensors", "file")
    return Call(convert, (), given, (*given, *options, *also), check, not names, also=(OSError,))


@target("left_pad", 10)
def _left_pad(draw: st.DrawFn) -> Call:
    rows = [torch.arange(1, n + 1) for n in draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))]
    given: dict[str, Any] = {"sequences": rows, "pad_token": draw(st.integers(-3, 300))}
    names = pick(draw, [*given, "one"])
    if "one" in names:
        given["sequences"] = [*rows, draw(spoiled(rows[0]))]
    spoil(draw, given, [name for name in names if name != "one"])

    def check(result: tuple[Tensor, Tensor]) -> None:
        batch, row_start = result
        pad_token = operator.index(given["pad_token"])
        for x, row, start in zip(given["sequences"], batch, row_start, strict=True):
            assert torch.equal(row[start:], x) and bool((row[:start] == pad_token).all())

    return Call(left_pad, (), given, check=check, right=not names)


@target("KeyValueCache", 12)
def _cache(draw: st.DrawFn) -> Call:
    model = fuzzed_model(LongNetLM)
    given: dict[str, Any] = {
        "segment_lengths": [4, 8], "num_layers": 1, "shifts": (0,), "row_start": draw(st.sampled_from([None, "left"])),
    }  # fmt: skip
    given["row_start"] = None if given["row_start"] is None else torch.tensor([0, 2])
    names = pick(draw, list(given))
    for name in names:
        given[name] = draw(sequences()) if name == "shifts" else given[name]
    spoil(draw, given, [name for name in names if name != "shifts"])
    tokens = torch.arange(18).view(2, 9) % 11

    def check(found: KeyValueCache) -> None:
        if names:
            return
        with torch.no_grad():
            want = model(tokens, row_start=given["row_start"])
            rows = [model(tokens[:, :5], cache=found)]
            rows += [model(tokens[:, i : i + 1], cache=found) for i in range(5, 9)]
        assert float((torch.cat(rows, 1) - want)[:, 2:].abs().max()) < 1e-4

    return Call(KeyValueCache, (), given, check=check, right=not names)
