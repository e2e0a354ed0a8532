"""A command's own words: in messages of the library, and in place of Python's names of types in its help."""

from __future__ import annotations

import re
from typing import Any

# Arguments of the library whose options have other names.
_RENAMED = {
    "segment_lengths": "--segments",
    "dilation_rates": "--rates",
    "num_heads": "--heads",
    "num_layers": "--layers",
    "seq_len": "--length",
    "segment_shift": "--shift",
    "greedy": "--temperature 0",
    "coords_folder": "--coords",
}
# An argument of the library in a message: `name=True`, the word after "expected", or a word with an underscore outside
# a path.
_ARGUMENT = re.compile(r"\b(\w+)=True\b|(?:(?<=expected )|(?<![\w/.-])(?=\w+_))(\w+)\b(?![/.-]\w)")


def in_options(message: str, command: Any) -> str:
    """A message of the library with the options of a click command in place of its argument names."""
    options = {parameter.name: max(parameter.opts, key=len) for parameter in command.params}
    known = {name: option for name, option in options.items() if option.startswith("--")}
    known |= {name: option for name, option in _RENAMED.items() if option.split()[0] in options.values()}
    return _ARGUMENT.sub(lambda found: known.get(found[1] or found[2], found[0]), message)


def name_types(command: Any, context: Any) -> None:
    """Takes Python's names of types from the flags and lists of a click command and its subcommands in `--help`."""
    for sub in getattr(command, "commands", {}).values():
        name_types(sub, context)
    for parameter in [*command.params, command.get_help_option(context)]:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = " "  # it takes nothing
        elif getattr(parameter, "multiple", False) and parameter.metavar is None:
            parameter.metavar = "TEXT"
