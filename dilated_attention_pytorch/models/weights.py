"""Reading state dicts from files and holding them to a model: strict, and never by running code from a file."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.core.files import check_path, parse_json
from dilated_attention_pytorch.core.validation import listed

WeightsSource = str | os.PathLike[str] | Mapping[str, Any]
Device = torch.device | str
Dtype = torch.dtype | None
WEIGHTS, CONFIG = "model.safetensors", "config.json"  # what `save_pretrained` writes into a folder


def read_state(source: WeightsSource) -> dict[str, Tensor]:
    """The state dict of `read_checkpoint`."""
    return read_checkpoint(source)[0]


def read_checkpoint(source: WeightsSource) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state dict, from a file or a mapping, and the training script's arguments where they are beside it.

    Args:
        source: a `.safetensors` file; any other file as `torch.save` writes it; or a mapping. A mapping with a single
            `"model"` or `"state_dict"` mapping of tensors inside is taken for that one; arguments are a mapping or an
            `argparse.Namespace` under `"args"`.

    Returns:
        Names to tensors, on the CPU when they come from a file; the arguments by name.

    Raises:
        FileNotFoundError: no such file.
        TypeError: neither a path nor a mapping.
        ValueError: a file that cannot be read; a file or mapping that holds anything but tensors by name.
        ImportError: a `.safetensors` file without the package.
    """
    if isinstance(source, Mapping):
        return _tensors(source, "the mapping"), arguments_of(source)
    path = check_path("weights, unless they are a mapping,", source)
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of weights at {path}, found none")
    if path.suffix == ".safetensors":
        return read_safetensors(path), {}
    # Of any type, where the file is not a pickle, or half of one.
    # Tensors and plain containers alone: a pickle can hold any code. A Namespace is attributes and nothing else.
    plain = torch.serialization.safe_globals([argparse.Namespace])
    with reading(path, "tensors as torch.save writes them", Exception), plain:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    return _tensors(loaded, str(path)), arguments_of(loaded)


def arguments_of(loaded: Any) -> dict[str, Any]:
    """The arguments under `"args"`, by name; none where there are none."""
    args = loaded.get("args") if isinstance(loaded, Mapping) else None
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    return dict(args) if isinstance(args, Mapping) else {}


def read_safetensors(path: Path, device: Device = "cpu") -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file; a ValueError where it cannot be read as one."""
    load_file = safetensors().load_file
    with reading(path, "tensors as safetensors writes them", importlib.import_module("safetensors").SafetensorError):
        return load_file(path, device=str(device))  # type: ignore[no-any-return]


def read_config(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The architecture that a folder's `config.json` names, and its other values."""
    path = folder / CONFIG
    with reading(path, "JSON", ValueError):  # no text, or no JSON
        values = parse_json(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"expected {path} to hold a JSON object, got {type(values).__name__}")
    return values.pop("architecture", None), values


@contextlib.contextmanager
def reading(path: Path, what: str, errors: type[Exception]) -> Iterator[None]:
    """Turns a reader's errors into a ValueError that names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"expected {path.name} in {path.parent}, found none")
    try:
        yield
    except errors as error:
        reason = f"{type(error).__name__}: " + (str(error).splitlines() or ["no reason given"])[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's own text is advice to run what the file holds
            reason = "a file that is not a torch checkpoint, or that contains pickled objects other than tensors"
        raise ValueError(f"expected {path} to hold {what}, got {reason}") from error


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file to the errors about what it holds."""
    try:
        yield
    except (ValueError, TypeError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{error}, in {path}") from error


def _tensors(loaded: Any, where: str) -> dict[str, Tensor]:
    for key in ("model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"expected {where} to hold tensors by name, got {type(loaded).__name__}")
    others = [
        f"{key} ({type(value).__name__})"
        for key, value in loaded.items()
        if not isinstance(value, Tensor) or not isinstance(key, str)
    ]
    if others:
        raise ValueError(f"expected {where} to hold tensors by name, got beside them: {listed(others)}")
    return dict(loaded)


def load_into(
    model: nn.Module, state: Mapping[str, Tensor], *, copy: bool = True, device: Device = "cpu", dtype: Dtype = None
) -> None:
    """Makes a state dict's tensors a model's parameters, in place of those it has (built on `meta`, it has none).

    A ValueError names tensors that are missing, unexpected or of another shape. Without `copy`, tensors that are in
    place stay where they are: for those that nobody else holds. `dtype` is of floating tensors; their own by default.
    """
    check_state(model, state)
    moved = {
        key: value.detach().to(device, (dtype or value.dtype) if value.is_floating_point() else value.dtype, copy=copy)
        for key, value in state.items()
    }
    model.load_state_dict(moved, assign=True)
    model.requires_grad_(True)  # an assigned tensor keeps the file's flag


def check_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise a ValueError that names keys which are missing, unexpected or of another shape: of each kind the first."""
    wanted = model.state_dict()
    both = wanted.keys() & state.keys()
    kinds = (
        [f"missing {key}" for key in wanted if key not in both],
        [f"unexpected {key}" for key in state if key not in both],
        [
            f"{key} of shape {tuple(state[key].shape)}, expected {tuple(value.shape)}"
            for key, value in wanted.items()
            if key in both and state[key].shape != value.shape
        ],
        [
            f"{key} of {value.dtype}, expected a floating dtype"
            for key, value in state.items()
            if key in both and not value.is_floating_point()
        ],
        [f"{key} {value.layout}, expected strided" for key, value in state.items() if value.layout != torch.strided],
    )
    if any(kinds):
        problems = "; ".join(listed(kind, "; ") for kind in kinds if kind)
        raise ValueError(f"expected the weights of a {type(model).__name__}, got: {problems}")


def count_layers(names: Iterable[str], stack: str) -> int:
    """The number of layers whose names begin with `{stack}.layers.`; 0 for none."""
    found = (re.match(rf"{stack}\.layers\.(\d+)\.", name) for name in names)
    return max((int(match[1]) for match in found if match), default=-1) + 1


def safetensors() -> Any:
    """The module `safetensors.torch`, or an ImportError that names the extra."""
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(
            "expected safetensors, which checkpoints need, found none: pip install 'dilated-attention-pytorch[cli]'"
        ) from error
