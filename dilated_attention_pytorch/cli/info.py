"""`info`: versions, devices and backends of this installation."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import Any

import torch

from dilated_attention_pytorch import __version__
from dilated_attention_pytorch.cli import options
from dilated_attention_pytorch.cli.options import console, human_bytes, print_table
from dilated_attention_pytorch.core.problem import one_segment
from dilated_attention_pytorch.kernels.choice import choose_backend
from dilated_attention_pytorch.kernels.sdpa.torch_calls import compute_dtype
from dilated_attention_pytorch.types import QKV

_PACKAGES = ("torch", "triton", "numpy", "safetensors", "matplotlib", "tensorboard", "transformers")


def info(as_json: options.AsJson = False) -> None:
    """Versions, devices, and the backend that `auto` takes on each, with the reason."""
    found = _look()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    versions = ((name, version or "not installed") for name, version in found["versions"].items())
    print_table(f"dilated-attention-pytorch {__version__}", ("", ""), versions, left=2)
    keys = ("device", "dtype", "computes_in", "backend", "reason")
    columns = ("device", "dtype", "computes in", "backend", "why")
    print_table("devices", columns, ([row[key] for key in keys] for row in found["devices"]), left=5)
    for note in found["notes"]:
        console.print(note)


def _look() -> dict[str, Any]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "system": platform.platform()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    rows, notes = [], []
    names = {torch.device("cpu"): f"cpu ({torch.get_num_threads()} threads)"}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        names[torch.device("cuda", i)] = f"cuda:{i} {properties.name}, {human_bytes(properties.total_memory)}"
    for device, shown in names.items():
        for dtype in (torch.float32, torch.bfloat16):
            choice, wide = (
                choose_backend(QKV(*torch.empty(3, 1, 1, 1, width, dtype=dtype, device=device)), problem)
                for width, problem in ((64, one_segment(1, 1, 1, 1.0)), (256, one_segment(1 << 20, 1 << 20, 1, 1.0)))
            )
            if wide.backend != choice.backend:
                notes.append(f"{_name(dtype)} on {shown}, a million positions of width 256: {wide.reason}")
            inner = compute_dtype(device, dtype)
            rows.append({"device": shown, "dtype": _name(dtype), "computes_in": _name(inner)} | choice._asdict())
            if inner != dtype:
                notes.append(
                    f"{_name(dtype)} on {device.type} is computed in {_name(inner)}: this CPU has no AMX, where "
                    f"{_name(inner)} is faster; results are rounded to {_name(dtype)}"
                )
    return {"version": __version__, "versions": versions, "devices": rows, "notes": notes}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
