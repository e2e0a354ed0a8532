"""`export`: the model of a run's saved state, for use."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from dilated_attention_pytorch.cli.options import check_dtype, console


def export(
    run: Annotated[Path, Argument(help="Folder of a run of `train`, which may still be going on.")],
    out: Annotated[
        Path | None, Option(help="Folder for model.safetensors and config.json; the run's by default.")
    ] = None,
    step: Annotated[int | None, Option(help="A step whose state is there; the last one by default.")] = None,
    dtype: Annotated[str, Option(help="Of the weights: fp32, bf16 or fp16.")] = "fp32",
) -> None:
    """Write the model of a run's state, however many processes it is sharded over, as one file of weights."""
    from dilated_attention_pytorch.models import save_pretrained
    from dilated_attention_pytorch.training.state import trained_model
    from dilated_attention_pytorch.training.tokenizer import FILE

    kind = check_dtype(dtype)
    model, step = trained_model(run, step)
    save_pretrained(model.to(kind), out or run)
    if out is not None and (run / FILE).is_file():
        shutil.copyfile(run / FILE, out / FILE)
    count = sum(p.numel() for p in model.parameters())
    console.print(f"{count:,} parameters after step {step:,} in {out or run}", soft_wrap=True)
