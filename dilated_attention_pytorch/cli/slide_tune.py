"""`slide tune`: a table of labels and a folder of feature files to a model per fold, predictions and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from typer import Argument, Context, Option

from dilated_attention_pytorch.cli import options
from dilated_attention_pytorch.cli.options import console

_LABELS = "Table, .csv or .tsv: slide_id, case_id, label; fold or fold_0, fold_1, ... where folds are given."
_OUT = "Folder of the run; one that was interrupted goes on where it was."
_MODE = "probe: a linear head on embeddings. lora: low-rank changes of all layers too. full: all weights."
_LAYER = "Hidden state to take, as 11 of a 12-layer encoder; by default the last output."
_CHECKPOINTING = "Compute activations again in the backward: less memory, more time."


def tune(
    context: Context,
    labels: Annotated[Path, Argument(help=_LABELS)],
    features: Annotated[Path, Option(help="Folder of feature files.")],
    checkpoint: options.Checkpoint,
    out: Annotated[Path, Option(help=_OUT)],
    mode: Annotated[str, Option(help=_MODE)] = "probe",
    label: Annotated[str, Option(help="Column of classes.")] = "label",
    time: Annotated[str | None, Option(help="Column of times: survival.")] = None,
    event: Annotated[str | None, Option(help="Column of events; of a name with censor... 1 is censored.")] = None,
    folds: Annotated[int, Option(help="Folds by patient, where the table gives none.")] = 5,
    epochs: Annotated[int | None, Option(help="Most epochs; 100 of a probe, else 20.")] = None,
    batch_size: Annotated[int, Option(help="Slides per step.")] = 16,
    learning_rate: Annotated[float | None, Option(help="The highest; 5e-3, 1e-3, 2.5e-4 by mode.")] = None,
    patience: Annotated[int, Option(help="Epochs without a lower validation loss, then a fold ends.")] = 10,
    rank: Annotated[int, Option(help="Of the changes of --mode lora.")] = 8,
    dropout: Annotated[float, Option(help="In training, of --mode lora and full.")] = 0.1,
    layer: Annotated[int | None, Option(help=_LAYER)] = None,
    global_pool: options.Pooling = None,
    max_wsi_size: options.SlideSide = None,
    patch_size_level0: options.TileSize = None,
    coords: options.CoordsFolder = None,
    grid: options.Grid = "tile",
    skip_missing: Annotated[bool, Option("--skip-missing", help="Leave out slides without features.")] = False,
    gradient_checkpointing: Annotated[bool, Option("--gradient-checkpointing", help=_CHECKPOINTING)] = False,
    dtype: Annotated[str, Option(help="fp32, bf16 (autocast), or auto: bf16 on CUDA.")] = "auto",
    bootstraps: Annotated[int, Option(help="Samples for the 95% intervals.")] = 1000,
    seed: Annotated[int, Option(help="Of folds, batches, dropout and bootstrap.")] = 0,
    device: options.Device = None,
) -> None:
    """Learn labels of slides, fold by fold; resumes exactly.

    Leaves predictions.csv, metrics.json, and per fold head.safetensors, TensorBoard's events and the tuned encoder.
    """
    from dilated_attention_pytorch.models import SlideEncoder
    from dilated_attention_pytorch.models.slide.files import SlideReader
    from dilated_attention_pytorch.models.slide.tune.config import TuneConfig
    from dilated_attention_pytorch.models.slide.tune.labels import read_labels
    from dilated_attention_pytorch.models.slide.tune.run import Tuner

    if mode == "probe":
        options.refuse(context, ("dropout", "gradient_checkpointing"), "with --mode probe")
    if mode != "lora":
        options.refuse(context, ("rank",), "without --mode lora")
    if time is not None:
        options.refuse(context, ("label",), "with --time")
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else options.check_device(device)
    auto = torch.bfloat16 if where.startswith("cuda") else torch.float32
    given: dict[str, Any] = {"mode": mode, "folds": folds, "epochs": epochs, "batch_size": batch_size, "rank": rank}
    given |= {"learning_rate": learning_rate, "patience": patience, "layer": layer, "seed": seed}
    kind = options.check_dtype(dtype, {"auto": auto, "bf16": torch.bfloat16, "fp32": torch.float32})
    config = TuneConfig(**given, bootstraps=bootstraps, dtype=kind)
    table = read_labels(labels, features, label=label, time=time, event=event, skip_missing=skip_missing)
    shape: dict[str, Any] = {"dropout": dropout, "drop_path": 0.0, "gradient_checkpointing": gradient_checkpointing}
    shape |= {} if global_pool is None else {"global_pool": global_pool}
    encoder = SlideEncoder.from_pretrained(checkpoint, max_wsi_size, device=where, **shape)
    reading: dict[str, Any] = {"grid": grid, "patch_size_level0": patch_size_level0, "coords_folder": coords}
    reader = SlideReader.of(encoder.config, **reading)
    tuner = Tuner(encoder, reader, table, config, out, checkpoint=checkpoint, say=_say)
    console.print(f"{len(table.slides):,} slides of {len(set(table.cases)):,} patients, {len(tuner.folds)} folds")
    metrics = tuner.run()
    rows = [(name, f"{x['mean']:.3f}", f"{x['low']:.3f} to {x['high']:.3f}") for name, x in metrics["scores"].items()]
    options.print_table("mean over folds", ("score", "mean", "95%"), rows, left=1)
    console.print(f"predictions.csv and metrics.json are in {out}", soft_wrap=True)


def _say(line: str) -> None:
    console.print(line, soft_wrap=True)
