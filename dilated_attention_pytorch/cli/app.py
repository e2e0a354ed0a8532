"""The application: its subcommands, and how errors look."""

from __future__ import annotations

import io
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import typer

from dilated_attention_pytorch._old.migrate.command import migrate  # 0.4.0: goes with _old
from dilated_attention_pytorch.cli import words
from dilated_attention_pytorch.cli.bench import bench
from dilated_attention_pytorch.cli.convert import convert
from dilated_attention_pytorch.cli.export import export
from dilated_attention_pytorch.cli.generate import generate
from dilated_attention_pytorch.cli.info import info
from dilated_attention_pytorch.cli.options import notes
from dilated_attention_pytorch.cli.plan import plan
from dilated_attention_pytorch.cli.show import show
from dilated_attention_pytorch.cli.slide import slide
from dilated_attention_pytorch.cli.train import train

app = typer.Typer(
    help="Exact LongNet dilated attention: plan a pattern, look at it, time it, train a language model with it.",
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
    app_command: Any = typer.main.get_command(app)
    words.name_types(app_command, typer.Context(app_command))
    if isinstance(sys.stdout, io.TextIOWrapper):  # escapes for what its encoding lacks, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:]
    command, path = _named(app_command, arguments)

    def warn(message: Warning | str, *_: object, **__: object) -> None:
        notes.print(f"warning: {words.in_options(str(message), command)}", soft_wrap=True)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = warn
            code = app_command(standalone_mode=False)
    except USER_ERRORS as error:
        _refuse(words.in_options(str(error), command))
    except typer.Abort:
        sys.exit(130)  # interrupted
    except Exception as error:  # click's classes stand in other places from one release to another
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            sys.exit(2)
        _refuse(words.of_parser(error, command, path, arguments[path.count(" ") :]))
    sys.exit(code or 0)


def _refuse(message: str) -> NoReturn:
    """End with one line. torchrun, which follows it with a traceback of its own, is given it for its last lines."""
    line = f"error: {message}"
    print(line, file=sys.stderr)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        report = {"message": line, "extraInfo": {"timestamp": f"{time.time():.0f}"}}
        Path(file).write_text(json.dumps({"message": report}), encoding="utf-8")
    sys.exit(2)


def in_options(message: str, *command: str) -> str:
    """A message of the library with the options of a command, named by its words, in place of its argument names."""
    return words.in_options(message, _named(typer.main.get_command(app), command)[0])


def _named(command: Any, arguments: Sequence[str]) -> tuple[Any, str]:
    """The command, and all its words, that the first words of a command line name."""
    path = "dilated-attention"
    for word in arguments:
        if word not in getattr(command, "commands", {}):
            break
        command, path = command.commands[word], f"{path} {word}"
    return command, path
