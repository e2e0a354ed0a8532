"""`slide embed` on a folder of synthetic slides: slides a minute, peak memory, and a run that is killed and goes on.

    python benchmarks/slide_folder.py [--slides 200] [--most 60000] [--size small|full] [--kills 3] [--out FOLDER]

Slides have 500 to `--most` tiles, evenly in the logarithm, and are written with h5py as TRIDENT does, in half
precision. `small` is 64 -> 64, 1 layer, 2 heads; `full` is Prov-GigaPath's 1,536 -> 768, 12 layers, 16 heads; weights
are random, the pattern is the published one with its keys of zeros. The whole command is timed, its start included, and
its memory is the process's peak. Then the same command is killed after each of `--kills` shares of the slides and goes
on; what it leaves has to be the same bytes, or no number is printed.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from common import ROOT, announce, refuse, write

from dilated_attention_pytorch.models import SlideEncoder, save_pretrained

SIZES: dict[str, dict[str, Any]] = {
    "small": {"in_chans": 64, "embed_dim": 64, "depth": 1, "num_heads": 2, "ffn_dim": 256},
    "full": {},
}
LEAST = 500
CHECK = "the files of a run killed {} times are those of a run left alone, byte for byte"


def make(folder: Path, slides: int, most: int, width: int) -> int:
    """Writes the slides, and says how many tiles they have."""
    counts = np.geomspace(LEAST, most, slides).astype(int)
    noise = np.random.default_rng(0).standard_normal((most, width), dtype=np.float32).astype(np.float16)
    for i, count in enumerate(counts):
        side = int((1.6 * count) ** 0.5) + 2
        at = np.stack(np.divmod(np.sort(np.random.default_rng(i).permutation(side * side)[:count]), side), 1)
        with h5py.File(folder / f"slide{i:04}.h5", "w") as file:
            file["features"] = np.roll(noise, 7 * i, 0)[:count]
            coords = file.create_dataset("coords", data=512 * at)
            coords.attrs.update({
                "patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20,
                "overlap": 0,
            })  # fmt: skip
    return int(counts.sum())


def command(slides: Path, checkpoint: Path, out: Path, device: str, dtype: str) -> list[str]:
    return [
        sys.executable, "-m", "dilated_attention_pytorch.cli", "slide", "embed", str(slides),
        "--checkpoint", str(checkpoint), "--out", str(out), "--device", device, "--dtype", dtype,
    ]  # fmt: skip


def results(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.h5")} if out.is_dir() else {}


def killed(words: list[str], out: Path, slides: int, kills: int) -> None:
    """Runs a command that is killed `kills` times, each time after as many slides more, and then to its end."""
    for i in range(kills):
        goal = slides * (i + 1) // (kills + 1)
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, cwd=ROOT)
        while process.poll() is None and len(list(out.glob("*.h5")) if out.is_dir() else ()) < goal:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


class Watch(threading.Thread):
    """Looks at the GPU twice a second: how busy, and how much memory it holds at most."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.use: list[float] = []
        self.memory = 0.0
        self.over = threading.Event()

    def run(self) -> None:
        fields = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
        # Its own name: numbers count all GPUs of the machine, whichever of them this process sees.
        query = [*fields, "-i", f"GPU-{torch.cuda.get_device_properties(0).uuid}"]
        while not self.over.wait(0.5):
            use, memory = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split(",")
            self.use.append(float(use))
            self.memory = max(self.memory, float(memory) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=200)
    parser.add_argument("--most", type=int, default=60_000)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bf16" if torch.cuda.is_available() else "fp32")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    announce()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "slides").mkdir()
        torch.manual_seed(0)
        save_pretrained(SlideEncoder(padding="zero_keys", **SIZES[options.size]), folder / "encoder")
        tiles = make(folder / "slides", options.slides, options.most, SIZES[options.size].get("in_chans", 1536))
        print(f"{options.slides} slides, {tiles:,} tiles", flush=True)
        arguments = (options.device, options.dtype)
        watch = Watch() if options.device == "cuda" else None
        if watch is not None:
            watch.start()
        start = time.perf_counter()
        words = command(folder / "slides", folder / "encoder", folder / "whole", *arguments)
        subprocess.run(words, check=True, cwd=ROOT)
        seconds = time.perf_counter() - start
        if watch is not None:
            watch.over.set()
            watch.join()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        if options.kills:
            words = command(folder / "slides", folder / "encoder", folder / "killed", *arguments)
            killed(words, folder / "killed", options.slides, options.kills)
            want, got = results(folder / "whole"), results(folder / "killed")
            refuse(f"{key} differs after kills" for key in want if got.get(key) != want[key])
            refuse([] if len(want) == options.slides else [f"{len(want)} files of {options.slides} slides"])
        row: dict[str, Any] = {
            "case": f"{options.slides} slides of {LEAST} to {options.most} tiles, {options.size}, {options.dtype}",
            "tiles": tiles, "seconds": seconds, "slides_per_minute": 60 * options.slides / seconds,
            "tiles_per_second": tiles / seconds, "cpu_seconds": used.ru_utime + used.ru_stime,
            "peak_gib": used.ru_maxrss / 2**20,
        }  # fmt: skip
        if watch is not None and watch.use:
            row |= {"gpu_use_percent": sum(watch.use) / len(watch.use), "gpu_peak_gib": watch.memory}
        shown = {key: f"{value:,.1f}" if isinstance(value, float) else f"{value}" for key, value in row.items()}
        print(", ".join(f"{key} {value}" for key, value in shown.items()))
        write(options.out, "slide_folder", [row], check=CHECK.format(options.kills))


if __name__ == "__main__":
    main()
