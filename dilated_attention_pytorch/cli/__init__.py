"""The `dilated-attention` command: one file per subcommand, which calls the library and prints."""

from __future__ import annotations

import sys

_NEEDS = ("typer", "rich", "click")


def main() -> None:
    """Run the command line: the entry point of `dilated-attention`."""
    try:
        from dilated_attention_pytorch.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in _NEEDS:
            raise
        print(
            f"error: the command line needs {error.name}, which is not installed: "
            "pip install 'dilated-attention-pytorch[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    run()
