"""The application: its subcommands, and how errors look."""

from __future__ import annotations

import sys
from typing import Any

import typer

from dilated_attention_pytorch._old.migrate.command import migrate  # 0.4.0: goes with _old
from dilated_attention_pytorch.cli import words
from dilated_attention_pytorch.cli.bench import bench
from dilated_attention_pytorch.cli.convert import convert
from dilated_attention_pytorch.cli.export import export
from dilated_attention_pytorch.cli.generate import generate
from dilated_attention_pytorch.cli.info import info
from dilated_attention_pytorch.cli.plan import plan
from dilated_attention_pytorch.cli.show import show
from dilated_attention_pytorch.cli.slide import slide
from dilated_attention_pytorch.cli.train import train

app = typer.Typer(
    help="Exact LongNet dilated attention: plan a pattern, look at it, time it, train a byte model with it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (train, export, generate, convert, plan, show, bench, info):
    app.command()(command)
app.add_typer(slide, name="slide")
app.command()(migrate)  # 0.4.0: goes with _old

# Errors of the library for a user's mistake, a missing package or a missing file.
USER_ERRORS = (ValueError, TypeError, ImportError, NotImplementedError, OSError, FloatingPointError)


def run() -> None:
    """Run the application: a user's mistake is one line on stderr and exit code 2, never a traceback."""
    command: Any = typer.main.get_command(app)
    words.name_types(command, typer.Context(command))
    try:
        command()
    except USER_ERRORS as error:
        print(f"error: {in_options(str(error), *sys.argv[1:3])}", file=sys.stderr)
        sys.exit(2)


def in_options(message: str, *command: str) -> str:
    """A message of the library with the options of a command, named by its words, in place of its argument names."""
    known: Any = typer.main.get_command(app)
    for word in command:
        known = getattr(known, "commands", {}).get(word, known)
    return words.in_options(message, known)
