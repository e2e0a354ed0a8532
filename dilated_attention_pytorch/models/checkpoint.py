"""Saving and loading: `model.safetensors` beside `config.json`, never pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dilated_attention_pytorch.core.files import check_path, replace_file
from dilated_attention_pytorch.core.validation import check_factory, quoted
from dilated_attention_pytorch.models import weights
from dilated_attention_pytorch.models.config import Model
from dilated_attention_pytorch.models.layers import has_head_groups
from dilated_attention_pytorch.models.longnet import LongNet, LongNetEncoder, LongNetLM
from dilated_attention_pytorch.models.longvit import LongViT
from dilated_attention_pytorch.models.slide.encoder import SlideEncoder

_ARCHITECTURES: dict[str, type[Model[Any]]] = {
    kind.__name__: kind for kind in (LongNet, LongNetEncoder, LongNetLM, SlideEncoder, LongViT)
}


def save_pretrained(model: Model[Any], folder: str | os.PathLike[str]) -> None:
    """Writes a model's weights and config into a folder, which is made if need be.

    Each file is written in a folder beside its place and then moved there, so a reader, or a crash, finds the old file
    or the new one, whole. An earlier save of the same class is replaced, as in training.

    Args:
        model: the bare model (of a DistributedDataParallel, its `module`; of a compiled one, its `_orig_mod`).
        folder: where to.

    Raises:
        TypeError: something else than a model of this package, or than a path.
        ValueError: a model made in legacy mode; a folder that holds a model of another class or library.
        ImportError: safetensors is not installed.
    """
    target, name = check_path("folder", folder), type(model).__name__
    if _ARCHITECTURES.get(name) is not type(model):
        raise TypeError(f"expected model to be one of {list(_ARCHITECTURES)}, got {name}; pass the bare model")
    check_head_groups(model)
    save_file = weights.safetensors().save_file
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    config = json.dumps({"architecture": name, **model.config.to_dict()}, indent=2) + "\n"
    _check_place(target, name)
    target.mkdir(parents=True, exist_ok=True)
    replace_file(target / weights.WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
    replace_file(target / weights.CONFIG, lambda path: path.write_text(config, encoding="utf-8"))


def _check_place(folder: Path, name: str) -> None:
    """Raises a ValueError for a folder with a model of another class, or another library's."""
    try:
        other, _ = weights.read_config(folder)
    except (OSError, ValueError):  # none there, or a damaged one
        return
    if other != name:
        got = f"a {other}" if isinstance(other, str) else f"a {weights.CONFIG} of another library"
        raise ValueError(f"expected a folder without a model or with a {name}, got {got} in {folder}")


def check_head_groups(model: nn.Module) -> None:
    """Raises a ValueError for a model made in legacy mode, which `config.json` would not bring back."""
    if has_head_groups(model):
        raise ValueError(
            "expected a model with head_groups=False, got one made in legacy mode: config.json does not hold the "
            "layout; save its state_dict() instead"
        )


def load_pretrained(
    folder: str | os.PathLike[str],
    *,
    backend: Any = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Model[Any]:
    """Reads a model that `save_pretrained` wrote; it is in evaluation mode.

    Args:
        folder: where from.
        backend: of the attention.
        device: where the parameters go.
        dtype: of the parameters; the file's by default.

    Returns:
        A model of the class that was saved.

    Raises:
        FileNotFoundError: a file is not there.
        TypeError: something else than a path.
        ValueError: weights that cannot be read, or keys or shapes that are not the model's, with the first of them.
        ImportError: safetensors is not installed.
    """
    folder = check_path("folder", folder)
    architecture, values = weights.read_config(folder)
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        known, got = list(_ARCHITECTURES), quoted(architecture)
        raise ValueError(f"expected architecture in {weights.CONFIG} to be one of {known}, got {got}")
    check_factory(device, dtype)
    # Built without memory: the file's tensors become the parameters.
    kind, file = _ARCHITECTURES[architecture], folder / weights.WEIGHTS
    with weights.naming(folder / weights.CONFIG):
        config = kind.config_class.from_dict(values)
    model = kind(config, backend=backend, device="meta")
    state = weights.read_safetensors(file, device)
    with weights.naming(file):
        weights.load_into(model, state, copy=False, device=device, dtype=dtype)
    return model.eval()
