"""The application: its subcommands, and how errors look."""

from __future__ import annotations

import sys

import typer

from dilated_attention_pytorch._old.migrate.command import migrate  # 0.4.0: goes with _old
from dilated_attention_pytorch.cli.bench import bench
from dilated_attention_pytorch.cli.convert import convert
from dilated_attention_pytorch.cli.generate import generate
from dilated_attention_pytorch.cli.info import info
from dilated_attention_pytorch.cli.plan import plan
from dilated_attention_pytorch.cli.show import show
from dilated_attention_pytorch.cli.train import train

app = typer.Typer(
    help="Exact LongNet dilated attention: plan a pattern, look at it, time it, train a byte model with it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (train, generate, convert, plan, show, bench, info):
    app.command()(command)
app.command()(migrate)  # 0.4.0: goes with _old

# What the library raises for a user's mistake, or for a package or file that is not there.
USER_ERRORS = (ValueError, TypeError, ImportError, NotImplementedError, OSError)


def run() -> None:
    """Runs the application: a user's mistake is one line on stderr and exit code 2, never a traceback."""
    try:
        app()
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
