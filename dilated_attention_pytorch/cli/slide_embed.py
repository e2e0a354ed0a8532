"""`slide embed`: a folder of feature files to embeddings."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.progress import BarColumn, Progress, TaskID, TimeElapsedColumn, TimeRemainingColumn
from typer import Argument, Context, Exit, Option

from dilated_attention_pytorch.cli import options
from dilated_attention_pytorch.cli.options import console, notes
from dilated_attention_pytorch.cli.words import in_options

if TYPE_CHECKING:
    from dilated_attention_pytorch.models.slide.work import Outcome

_FOLDER = "Folder of feature files: .h5, .pt, .npz, .npy, .h5ad or .zarr."
_OUT = "Folder for the results; one that was interrupted goes on where it was."
_FORMAT = "h5, pt or npz: a file per slide. csv or parquet: a table of all."
_LAYERS = "Hidden states to write too: 11, 0,6,12 or all."
_BATCH = "Most tokens of a batch."
_RING = "Under torchrun: slides of more tiles are shared by all ranks; by default those too large for one device."
_PAUSE = 10.0  # seconds between two lines of progress where there is no terminal


def embed(
    context: Context,
    folder: Annotated[Path, Argument(help=_FOLDER)],
    checkpoint: options.Checkpoint,
    out: Annotated[Path, Option(help=_OUT)],
    format_: Annotated[str, Option("--format", help=_FORMAT)] = "h5",
    layers: Annotated[str, Option(help=_LAYERS)] = "",
    tiles: Annotated[bool, Option("--tiles", help="Write each tile's output too.")] = False,
    patch_size_level0: options.TileSize = None,
    coords: options.CoordsFolder = None,
    grid: options.Grid = "tile",
    strict: Annotated[bool, Option("--strict", help="Take doubts for errors.")] = False,
    global_pool: options.Pooling = None,
    max_wsi_size: options.SlideSide = None,
    batch_tokens: Annotated[int, Option(min=1, help=_BATCH)] = 16_384,
    ring_above: Annotated[int | None, Option(min=1, metavar="TILES", help=_RING)] = None,
    dtype: options.Dtype = "fp32",
    device: options.Device = None,
) -> None:
    """Embed all slides of a folder, longest first; resumes, and runs under torchrun as it is.

    The exit code is 1 where a slide has no result; problems.csv in the folder names it.
    """
    from dilated_attention_pytorch.core.validation import check_choice
    from dilated_attention_pytorch.models import SlideEncoder
    from dilated_attention_pytorch.models.slide.embed import EmbedOptions, SlideEmbedder, run_settings
    from dilated_attention_pytorch.models.slide.files import SlideReader, find_slides
    from dilated_attention_pytorch.models.slide.results import TABLES, Format, ResultFolder
    from dilated_attention_pytorch.models.slide.work import Ranks, scan
    from dilated_attention_pytorch.training.distributed import join

    kind = options.check_dtype(dtype)
    form: Format = check_choice("--format", format_, Format)
    if tiles and format_ in TABLES:
        raise ValueError(f"expected --format h5, pt or npz with --tiles, got {format_}")
    if device is not None:
        options.check_device(device)
    if out.resolve() == folder.resolve():
        raise ValueError(f"expected --out to be another folder than that of the feature files, got {out}")
    paths = find_slides(folder)
    shape: dict[str, Any] = {} if global_pool is None else {"global_pool": global_pool}
    with join(device) as world, ExitStack() as held:
        encoder = SlideEncoder.from_pretrained(checkpoint, max_wsi_size, device=world.device, **shape)
        depth = encoder.config.depth
        chosen = tuple(range(depth + 1)) if layers == "all" else options.ints("--layers", layers) if layers else ()
        reading: dict[str, Any] = {"grid": grid, "strict": strict, "patch_size_level0": patch_size_level0}
        reader = SlideReader.of(encoder.config, coords_folder=coords, **reading)
        how = EmbedOptions(dtype=kind, layers=chosen, tiles=tiles, batch_tokens=batch_tokens, ring_above=ring_above)
        results = ResultFolder(out, form, run_settings(encoder, reader, checkpoint, how))
        ranks = Ranks(world.rank, world.size, world.host)
        embedder = SlideEmbedder(encoder, reader, results, how, ranks)
        world.first(lambda: held.enter_context(results.held()))
        found = ranks.from_first(scan(paths, reader) if world.is_main else None)
        with _Report(found, world.is_main, ranks.size, context.command) as report:
            mine = [report.add(outcome) for outcome in embedder.run(found)]
        everything = [outcome for part in ranks.gather(mine) for outcome in part]
        failed = {one.name: in_options(one.problem, context.command) for one in everything if one.problem is not None}
        if world.is_main:
            results.write_problems(failed)
            table = results.write_table(one.name for one in everything if one.problem is None)
            report.summary(everything, failed, out if table is None else table)
    if failed:
        raise Exit(1)


class _Report:
    """What is printed while slides are embedded: a bar on a terminal, else a line from time to time."""

    def __init__(self, found: Any, is_main: bool, ranks: int, command: Any) -> None:
        self._command = command
        self._tiles, self._main, self._ranks = sum(found.sizes.values()), is_main, ranks
        self._done, self._began, self._last = 0, time.monotonic(), time.monotonic()
        self._task = TaskID(0)
        self._bar = Progress(
            "slides", BarColumn(), "{task.completed:,.0f} of {task.total:,.0f} tiles", TimeElapsedColumn(), "left",
            TimeRemainingColumn(), console=console, disable=not (console.is_terminal and is_main),
        )  # fmt: skip

    def __enter__(self) -> _Report:
        self._task = self._bar.add_task("slides", total=self._tiles / self._ranks)
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def add(self, outcome: Outcome) -> Outcome:
        """Print what a slide needs to have said of it."""
        for line in (outcome.problem and f"no result: {in_options(outcome.problem, self._command)}", *outcome.doubts):
            if line:
                notes.print(f"{outcome.name}: {line}", soft_wrap=True)
        if outcome.was_there or outcome.problem:
            self._tiles -= outcome.tiles
        else:
            self._done += outcome.tiles
        total = max(self._tiles / self._ranks, self._done)
        self._bar.update(self._task, completed=self._done, total=total)
        now = time.monotonic()
        if self._main and not console.is_terminal and self._done and now - self._last > _PAUSE:
            left = (total - self._done) / self._done * (now - self._began)
            console.print(f"{self._done:,} of {total:,.0f} tiles, {left / 60:.1f} minutes left", soft_wrap=True)
            self._last = now
        return outcome

    def summary(self, everything: list[Outcome], failed: dict[str, str], where: Path) -> None:
        """Print what came of the run."""
        said = Counter(one.said for one in everything if one.said)
        for words, count in said.most_common():
            console.print(f"{count:,} slides: {words}", soft_wrap=True)
        there = sum(one.was_there for one in everything)
        new = len(everything) - there - len(failed)
        doubtful = sum(bool(one.doubts) for one in everything)
        minutes = (time.monotonic() - self._began) / 60
        console.print(
            f"{new:,} slides written in {minutes:.1f} minutes ({doubtful:,} with doubts), {there:,} were there, "
            f"{len(failed):,} have no result: {where}",
            soft_wrap=True,
        )
