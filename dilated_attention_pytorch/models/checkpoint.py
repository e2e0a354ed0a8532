"""Saving and loading: `model.safetensors` beside `config.json`, never pickle."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.models.config import LongNetConfig
from dilated_attention_pytorch.models.longnet import LongNet, LongNetEncoder, LongNetLM

WEIGHTS, CONFIG = "model.safetensors", "config.json"

_ARCHITECTURES: dict[str, type[LongNet] | type[LongNetEncoder] | type[LongNetLM]] = {
    "LongNet": LongNet,
    "LongNetEncoder": LongNetEncoder,
    "LongNetLM": LongNetLM,
}


def save_pretrained(model: LongNet | LongNetEncoder | LongNetLM, folder: str | os.PathLike[str]) -> None:
    """Writes a model's weights and config into a folder, which is made if need be.

    Each file is written beside its place and then moved there, so a reader, or a crash, finds the old file or the new
    one, whole.

    Args:
        model: the bare model (of a DistributedDataParallel, its `module`; of a compiled one, its `_orig_mod`).
        folder: where to.

    Raises:
        TypeError: something else than a model of this package.
        ImportError: safetensors is not installed.
    """
    name = type(model).__name__
    if _ARCHITECTURES.get(name) is not type(model):
        raise TypeError(f"expected model to be one of {list(_ARCHITECTURES)}, got {name}; pass the bare model")
    if any(getattr(module, "head_groups", False) for module in model.modules()):
        raise ValueError(
            "expected a model with head_groups=False, got one made in legacy mode: config.json does not hold the "
            "layout; save its state_dict() instead"
        )
    save_file = _safetensors().save_file
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    config = json.dumps({"architecture": name, **model.config.to_dict()}, indent=2) + "\n"
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    _write(target / WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
    _write(target / CONFIG, lambda path: path.write_text(config, encoding="utf-8"))


def load_pretrained(
    folder: str | os.PathLike[str],
    *,
    backend: Any = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> LongNet | LongNetEncoder | LongNetLM:
    """Reads what `save_pretrained` wrote; the model is in evaluation mode.

    Args:
        folder: where from.
        backend: of the attention.
        device: where the parameters go.
        dtype: of the parameters; the file's by default.

    Returns:
        A model of the class that was saved.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: the file's keys or shapes are not the model's; the message names every one of them.
        ImportError: safetensors is not installed.
    """
    source = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (source / name).is_file():
            raise FileNotFoundError(f"expected {name} in {source}, found none")
    load_file = _safetensors().load_file
    values = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    architecture = values.pop("architecture", None)
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"expected architecture in {CONFIG} to be one of {list(_ARCHITECTURES)}, got {architecture!r}")
    # Built without memory: the file's tensors become the parameters.
    model = _ARCHITECTURES[architecture](LongNetConfig.from_dict(values), backend=backend, device="meta")
    state = load_file(source / WEIGHTS, device=str(device))
    check_state(model, state)
    model.load_state_dict({key: value.to(dtype or value.dtype) for key, value in state.items()}, assign=True)
    return model.eval()


def check_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Raises a ValueError that names every key which is missing, unexpected or of another shape."""
    wanted = model.state_dict()
    problems = [f"missing {key}" for key in wanted if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in wanted]
    problems += [
        f"{key} of shape {tuple(state[key].shape)}, expected {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    if problems:
        raise ValueError(f"expected the weights of a {type(model).__name__}, got: " + "; ".join(problems))


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(
            "expected safetensors, which checkpoints need, found none: pip install 'dilated-attention-pytorch[cli]'"
        ) from error


def _write(path: Path, write: Callable[[Path], object]) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are private; a checkpoint is a file like any other
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
