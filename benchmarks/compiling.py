"""Compiles for Hopper in processes that see no GPU, so that a GPU waits for few of them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import driver, jit


class NoGPU:
    """Stands in for the driver while workers compile."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def without_gpu(visit: Callable[[Any, Any], object] = lambda function, kernel: None) -> None:
    """From here on this process compiles what it would launch, for Hopper; `visit` sees each function and kernel."""
    torch.set_num_threads(1)
    driver.set_active(NoGPU())
    original = jit.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **flags: Any) -> Any:
        kernel = original(self, *args, grid=grid, warmup=True, **flags)
        with contextlib.suppress(Exception):  # the host's half of a launch is C code that is compiled and kept too
            CudaLauncher(kernel.src, kernel.metadata)
        visit(self, kernel)
        return kernel

    jit.JITFunction.run = run


def side_by_side(count: int, *options: str) -> None:
    """Runs this benchmark with `--compile 0`, `--compile 1`, .. in processes that see no GPU, one for each core."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, sys.argv[0], *options, "--compile"]
    waiting, running = list(range(count)), list[subprocess.Popen[bytes]]()
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            running.append(subprocess.Popen([*command, str(waiting.pop(0))], env=environment))
        if running.pop(0).wait():
            sys.exit("a case does not compile")
