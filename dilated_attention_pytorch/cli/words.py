"""A command's own words: in messages of the library and of the parser, and in place of Python's types in its help."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dilated_attention_pytorch.core.messages import line, listed, quoted

# Arguments of the library whose options have other names.
_RENAMED = {
    "segment_lengths": "--segments",
    "dilation_rates": "--rates",
    "num_heads": "--heads",
    "num_layers": "--layers",
    "head": "--heads",
    "preset": "--model",
    "seq_len": "--length",
    "segment_shift": "--shift",
    "greedy": "--temperature 0",
    "coords_folder": "--coords",
    "weights": "--checkpoint",
}
# An argument of the library in a message: `name=True` or `name='x'`, the word after "expected", or a word with an
# underscore outside a path and quotes.
_ARGUMENT = re.compile(r"\b(\w+)=(True\b|(?='))|(?:(?<=expected )|(?<![\w/.'-])(?=\w+_))(\w+)\b(?![/.-]\w)")
_EXTRA = re.compile(r"unexpected extra argument\S* \((.*)\)")  # the parser gives no other sign of them


def in_options(message: str, command: Any) -> str:
    """A message of the library, one line, with the options of a click command in place of its argument names."""
    options = {parameter.name: max(parameter.opts, key=len) for parameter in command.params}
    known = {name: option for name, option in _RENAMED.items() if option.split()[0] in options.values()}
    known |= {name: option for name, option in options.items() if option.startswith("--")}

    def option(found: re.Match[str]) -> str:
        name = known.get(found[1] or found[3])
        return found[0] if name is None else f"{name} " if found[2] == "" else name

    return _ARGUMENT.sub(option, line(message))


def of_parser(error: Any, command: Any, path: str, arguments: Sequence[str]) -> str:
    """What was expected and what came, of an error of click's parser.

    Args:
        error: click's exception.
        command: the click command of `path`, such as "dilated-attention plan".
        arguments: what stands behind it.
    """
    kind, message = type(error).__name__, error.format_message().rstrip(".")
    param = getattr(error, "param", None)
    name = "" if param is None else max(param.opts, key=len) if param.opts[0][0] == "-" else param.name.upper()
    extra = _EXTRA.search(message)
    if kind == "NoSuchOption":
        near = f"; there is {' and '.join(sorted(error.possibilities))}" if error.possibilities else ""
        return f"expected an option of '{path}', got {quoted(error.option_name)}{near}"
    if kind == "MissingParameter":
        return f"expected {name} with '{path}', got none"
    if kind == "BadOptionUsage" and "requires" in message:
        return f"expected a value of {error.option_name}, got none"
    if param is not None:
        return f"expected a value that fits {name}, got {listed(_given(param.opts, arguments))}: {line(error.message)}"
    if extra:
        return f"expected no more arguments of '{path}', got {quoted(extra[1])}"
    if hasattr(command, "commands"):
        return f"expected a command of '{path}', one of {list(command.commands)}, got {quoted(arguments[0])}"
    return f"expected what '{path} --help' shows, got: {line(message)}"


def _given(options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """The values that a command line gives an option of some names."""
    found = []
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in options:
            found.append(quoted(value if equals else following))
        elif word[:2] in options and word[1] != "-":  # -n8
            found.append(quoted(word[2:]))
    return found


def name_types(command: Any, context: Any) -> None:
    """Takes Python's names of types from the flags and lists of a click command and its subcommands in `--help`."""
    for sub in getattr(command, "commands", {}).values():
        name_types(sub, context)
    for parameter in [*command.params, command.get_help_option(context)]:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = " "  # it takes nothing
        elif getattr(parameter, "multiple", False) and parameter.metavar is None:
            parameter.metavar = "TEXT"
