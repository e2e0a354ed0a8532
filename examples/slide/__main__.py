"""Does the order of tiles matter to dilated attention? One slide job on real data, order by order.

    python examples/slide --data images --out runs/slide
    python examples/slide --data mni152 --out runs/slide-3d

Leaves results.json, table.md, orders.png, neighbourhood.png and heat.png in the folder.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from locality import locality
from pictures import draw
from probe import Run, Settings, mean_of_neighbours, train
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tiles import load

from dilated_attention_pytorch.kernels.hilbert import CURVES, curve_order

console = Console(highlight=False)
TILE = {"images": 20, "mni152": 8}


def main(
    data: Annotated[str, typer.Option(help="images (scikit-image's, 2-D) or mni152 (a brain, 3-D).")] = "images",
    out: Annotated[Path, typer.Option(help="Folder for results and pictures.")] = Path("runs/slide"),
    tile: Annotated[int | None, typer.Option(min=4, help="Side of a tile; 20 pixels or 8 voxels by default.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = Settings.steps,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each order.")] = 3,
    segments: Annotated[str, typer.Option(help="Segment lengths, in tiles.")] = "64,256,1024",
    rates: Annotated[str, typer.Option(help="Dilation rates.")] = "1,2,4",
) -> None:
    """Train the same probe along raster, snake, Morton and Hilbert order and compare."""
    if data not in TILE:
        raise typer.BadParameter(f"expected --data images or mni152, got {data!r}")
    tiles = load(data, TILE[data] if tile is None else tile)
    settings = Settings(_ints(segments), _ints(rates), steps=steps)
    orders = {name: curve_order(name, tiles.coords) for name in CURVES}
    console.print(f"{len(tiles.coords):,} tiles in a grid of {' x '.join(map(str, tiles.grid))}")
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    with _progress() as progress:
        task = progress.add_task("", total=len(orders) * seeds * steps)
        for name, order in orders.items():
            near = locality(settings.pattern, order, tiles.coords)
            rows[name] = {**near._asdict(), "losses": [], "seconds": [], "baseline": []}
            for seed in range(seeds):
                progress.update(task, description=f"{name}, seed {seed}")
                run = train(tiles, order, settings, seed, lambda: progress.advance(task))
                rows[name]["losses"].append(run.loss)
                rows[name]["seconds"].append(run.seconds)
                rows[name]["baseline"].append(float(mean_of_neighbours(tiles, run.held_out)[run.held_out].mean()))
                runs.setdefault(name, run)
    out.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    results = {
        "data": data, "tiles": len(tiles.coords), "grid": tiles.grid, "machine": machine,
        "settings": asdict(settings), "orders": rows,
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    lines = table(rows)
    (out / "table.md").write_text("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n", encoding="utf-8")
    shown = Table(*lines[0])
    for line in lines[2:]:
        shown.add_row(*line)
    console.print(shown)
    baseline = next(iter(rows.values()))["baseline"]
    console.print(f"for comparison, the mean of the visible neighbours: {_spread(baseline)}; the mean of all tiles: 1")
    for path in draw(out, tiles, settings, orders, runs):
        console.print(f"wrote {path}")


def table(rows: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The results as cells of a Markdown table."""
    head = [
        "order",
        "loss on validation tiles",
        "less raster's",
        "distance of a key",
        "neighbours in reach (one head)",
        "CPU seconds",
    ]
    lines = [head, ["---"] * len(head)]
    for name, row in rows.items():
        # Seed by seed: runs of one seed share their tiles and first weights.
        gain = [a - b for a, b in zip(row["losses"], rows["raster"]["losses"], strict=True)]
        reach = f"{row['neighbours']:.1%} ({row['neighbours_per_head']:.1%})"
        seconds = f"{sum(row['seconds']) / len(row['seconds']):.0f}"
        lines.append([name, _spread(row["losses"]), _spread(gain), f"{row['distance']:.1f}", reach, seconds])
    return lines


def _spread(values: list[float]) -> str:
    """The mean, and the standard deviation where there is one."""
    x = torch.tensor(values, dtype=torch.float64)
    return f"{x.mean():.4f}" + (f" ± {x.std():.4f}" if len(values) > 1 else "")


def _ints(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"expected ints with commas between them, got {text!r}") from None


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    left = TextColumn("left"), TimeRemainingColumn()
    return Progress(*columns, *left, console=console, disable=not console.is_terminal)


if __name__ == "__main__":
    typer.run(main)
