"""`slide`: what is done with slides from files; one file per command beside this one."""

from __future__ import annotations

import typer

from dilated_attention_pytorch.cli.slide_embed import embed
from dilated_attention_pytorch.cli.slide_map import slide_map
from dilated_attention_pytorch.cli.slide_tune import tune

slide = typer.Typer(help="Slides from feature files: embeddings, maps, tuned models.", no_args_is_help=True)


@slide.callback()
def _group() -> None:  # without it a lone command would take the group's place
    pass


for command in (embed, tune):
    slide.command()(command)
slide.command("map")(slide_map)
