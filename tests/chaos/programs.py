"""What is killed and starved: the commands, and two programs as a user would write them on the library's files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch import cli, streaming
from dilated_attention_pytorch.core.files import remove_leftovers, replace_file
from dilated_attention_pytorch.models import SlideEncoder, load_pretrained, save_pretrained

SMALL = {
    "d_model": 32, "nhead": 2, "num_layers": 1, "dim_feedforward": 32, "segment_lengths": "16,64",
    "dilation_rates": "1,2", "context": 64, "batch_size": 4, "micro_batch_size": 2, "steps": 16, "warmup_steps": 2,
    "eval_every": 4, "eval_excerpts": 4, "log_every": 1, "checkpoint_every": 3, "cpu_threads": 1,
}  # fmt: skip
ROWS, HEADS, WIDTH = 20_000, 2, 16  # of the streamed sequence
SLIDES = 12


def train(folder: Path, *more: str) -> None:
    """`dilated-attention train` in `folder/run`, on `folder`'s neighbour `text`."""
    settings = [f"--set={name}={value}" for name, value in SMALL.items()]
    where = ["--data", str(folder.parent / "text"), "--out", str(folder / "run"), "--device", "cpu"]
    command("train", *where, "--val-fraction", "0.3", "--sample-bytes", "20", *settings, *more)


def sharded(folder: Path) -> None:
    """The same with parameters over all ranks (FSDP2), and with two ranks per sequence where their number is even."""
    shards = "1" if int(os.environ.get("WORLD_SIZE", "1")) % 2 else "2"
    train(folder, "--set=shard_parameters=true", "--context-parallel", shards)


def generate(folder: Path) -> None:
    """`dilated-attention generate` from `folder/run`."""
    command("generate", str(folder / "run"), "--bytes", "400", "--seed", "1")


def command(*arguments: str) -> None:
    """The command line, as its entry point runs it."""
    sys.argv = ["dilated-attention", *arguments]
    cli.main()


class FileSink:
    """Rows of lse `(1, H, N)`, in a file that has its name once all are there."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, list[Tensor]()

    def write(self, start: int, rows: Tensor) -> None:
        self.rows.append(rows.clone())

    def commit(self) -> None:
        whole = torch.cat(self.rows, 2).numpy()
        replace_file(self.path, lambda path: whole.tofile(path))


def stream(folder: Path) -> None:
    """Attention of files into files: the mapped `out` is whole if its first row is no NaN, lse if it is there."""
    remove_leftovers(folder)
    out, lse = folder / "out", folder / "lse"
    if out.exists() and lse.exists() and not mapped(out)[0, 0].isnan().any():
        return
    q, k, v = (mapped(folder.parent / "rows" / name) for name in "qkv")
    with out.open("ab") as file:  # room first: a full disk under a map is a signal, not an error
        if (missing := q.nbytes - out.stat().st_size) > 0:
            file.write(b"\xff" * missing)  # NaN
    pattern = {"segment_lengths": [64, 4096], "dilation_rates": [1, 8], "range_length": 500, "device": "cpu"}
    streaming.streamed_forward(q, k, v, out=mapped(out), lse=FileSink(lse), **pattern)


def mapped(path: Path) -> Tensor:
    """The rows `(1, N, H, D)` of a file."""
    x = torch.from_file(str(path), shared=True, size=ROWS * HEADS * WIDTH, dtype=torch.float32)
    return x.view(1, ROWS, HEADS, WIDTH)


def embed(folder: Path) -> None:
    """An embedding per slide, each in a file of its own; those that are there are not computed again."""
    remove_leftovers(folder)
    encoder = load_pretrained(folder.parent / "encoder")
    for path in sorted((folder.parent / "slides").glob("*.pt")):
        target = folder / path.name
        if not target.exists():
            tiles, coords = torch.load(path, weights_only=True)
            with torch.no_grad():
                pooled = encoder(tiles, coords).pooled
            replace_file(target, lambda temporary, x=pooled: torch.save(x, temporary))


def named(program: Callable[[Path], None]) -> Callable[[Path], None]:
    """The program, with its errors in one line, as commands have them."""

    def run(folder: Path) -> None:
        try:
            program(folder)
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return run


PROGRAMS: dict[str, Callable[[Path], Any]] = {
    "train": train, "sharded": sharded, "generate": generate, "stream": named(stream), "embed": named(embed)
}  # fmt: skip


def prepare(root: Path) -> None:
    """The inputs of all programs, which none of them changes."""
    torch.manual_seed(0)
    for name in ("text", "rows", "slides"):
        (root / name).mkdir(parents=True)
    for i in range(40):
        (root / "text" / f"{i}.txt").write_text(f"def function_{i}(x):\n    return x + {i}\n" * 20)
    for name in "qkv":
        torch.randn(ROWS, HEADS, WIDTH).numpy().tofile(root / "rows" / name)
    encoder = SlideEncoder(in_chans=12, embed_dim=32, depth=2, num_heads=4, ffn_dim=48, segment_lengths=(64, 1024),
                           dilation_rates=(1, 4))  # fmt: skip
    save_pretrained(encoder, root / "encoder")
    for i in range(SLIDES):
        places = torch.randperm(10_000)[: 500 + 40 * i]
        coords = torch.stack((places // 100, places % 100), 1)[None] * 256
        torch.save((torch.randn(1, len(places), 12), coords), root / "slides" / f"{i:02}.pt")
