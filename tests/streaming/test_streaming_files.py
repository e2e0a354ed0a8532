"""Out-of-core streaming on the CPU: memory-mapped files, bounded resident memory, pages dropped where that is safe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import dilated_attention, dilated_attention_streamed
from dilated_attention_pytorch.streaming import pages, streamed_backward, streamed_forward
from dilated_attention_pytorch.testing import peak_bytes, relative_norm

OPTIONS = {"segment_lengths": [64, 512, 1 << 16], "dilation_rates": [1, 8, 1024], "device": "cpu"}
WHOLE = {key: value for key, value in OPTIONS.items() if key != "device"}


def mapped(path: Path, shape: tuple[int, ...], *, shared: bool = True) -> Tensor:
    """A tensor over a file; the file is made if it is not there."""
    size = torch.Size(shape).numel()
    return torch.from_file(str(path), shared=shared, size=size, dtype=torch.float32).view(shape)


def fill(x: Tensor) -> Tensor:
    """Random rows, written with bounded memory."""
    for rows in x.split(1 << 14, dim=1):
        rows.copy_(torch.randn(rows.shape))
        pages.drop(rows)
    return x


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of resident memory")
def test_resident_memory_is_bounded(tmp_path: Path) -> None:
    """Four files of 128 MiB each, within 96 MiB, forward; eight of them, backward. Numbers checked on a slice."""
    shape, limit = (1, 1 << 19, 1, 64), 96 << 20
    q, k, v, grad = (fill(mapped(tmp_path / name, shape)) for name in ("q", "k", "v", "grad"))
    out, dq, dk, dv = (mapped(tmp_path / name, shape) for name in ("out", "dq", "dk", "dv"))
    # The kernel's threads and allocator keep some memory of their own, which a first small call brings in.
    dilated_attention_streamed(*(x[:, :65536].clone() for x in (q, k, v)), **OPTIONS, device_limit=limit)
    found = []

    def forward() -> None:
        found.append(streamed_forward(q, k, v, **OPTIONS, out=out, device_limit=limit).lse)

    def backward() -> None:
        streamed_backward(grad, q, k, v, out, *found, **OPTIONS, dq=dq, dk=dk, dv=dv, device_limit=limit)

    lse_bytes = shape[1] * 4
    assert peak_bytes(forward) <= limit + lse_bytes
    assert peak_bytes(backward) <= limit
    # The largest segment ends at 65536, so its part of the sequence is a sequence of its own.
    want = dilated_attention(*(x[:, -65536:].clone() for x in (q, k, v)), **WHOLE)
    assert relative_norm(out[:, -65536:], want) <= 1e-6


def test_kinds_of_mapping(tmp_path: Path) -> None:
    shape = (1, 300, 2, 8)
    shared = fill(mapped(tmp_path / "a", shape))
    private = mapped(tmp_path / "a", shape, shared=False)
    assert pages.in_shared_file(shared) and not pages.in_shared_file(private)
    assert not pages.in_shared_file(torch.randn(shape)) and not pages.in_shared_file(torch.empty(0))
    assert pages.in_shared_file(torch.from_numpy(np.memmap(tmp_path / "a", np.float32, "r+", shape=shape)))
    assert not pages.in_shared_file(torch.from_numpy(np.memmap(tmp_path / "a", np.float32, "c", shape=shape)))


def test_no_data_is_lost(tmp_path: Path) -> None:
    """What was changed in a private copy of a file, or lies in plain memory, is still there after it was streamed."""
    shape = (2, 5000, 2, 8)
    fill(mapped(tmp_path / "a", shape))
    private = mapped(tmp_path / "a", shape, shared=False)
    private += 1
    shared = mapped(tmp_path / "b", shape)
    shared.copy_(private)
    plain = private.clone()
    results = [
        dilated_attention_streamed(x, x, x, **OPTIONS, range_length=1000, out=mapped(tmp_path / f"out{i}", shape))
        for i, x in enumerate((plain, private, shared))
    ]
    assert torch.equal(private, plain) and torch.equal(shared, plain)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert relative_norm(results[0], dilated_attention(plain, plain, plain, **WHOLE)) <= 1e-6
    on_disk = torch.from_numpy(np.fromfile(tmp_path / "out2", np.float32)).view(shape)
    assert torch.equal(on_disk, results[0])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of resident memory")
def test_the_benchmark_runs_small(tmp_path: Path) -> None:
    """Every section on a short sequence; it refuses to print where a check of its own fails."""
    script = Path(__file__).parents[2] / "benchmarks" / "streaming.py"
    options = {"device": "cpu", "tokens": 65536, "shrink": 64, "limit": 20_000_000, "repeats": 1, "dir": tmp_path}
    options |= {"only": "64m,host,billion,file", "out": tmp_path / "out"}
    given = [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run([sys.executable, script, *given], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "out").iterdir()
    rows = json.loads(written.read_text())["rows"]
    assert [row["section"] for row in rows] == ["64m", "64m", "host", "billion", "file"]
    assert rows[-1]["rss_met"] and not list(tmp_path.glob("streaming-*"))
