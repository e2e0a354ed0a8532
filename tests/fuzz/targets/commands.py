"""The command line's commands in this process, with wrong values."""

from __future__ import annotations

import contextlib
import tempfile
from typing import Any

import typer
from hypothesis import strategies as st
from typer.testing import CliRunner

from dilated_attention_pytorch.cli.app import app, in_options
from fuzz.judge import REFUSALS, Call
from fuzz.table import target
from fuzz.targets import slides

_WRONG = ("", "-1", "0", "1", "3", "2147483648", "9223372036854775807", "9223372036854775808", "1e400", "nan", "inf",
          "0.5", "x", "1,2", "1,,2", ",", "1,2,3,4,5,6", "modulo", "cuda", "cuda:7", "meta", "[bold]", "all",
          "{folder}", "{folder}/none/at/all", "None", "9" * 5000, "None=None", "steps=-1", "alternate",
          "\u00e9\n")  # fmt: skip

_MODEL = {"--checkpoint": "{slides}/encoder", "--device": "cpu"}
# Of each command: what is given for positional arguments, and right options. All others it has are spoiled too.
_COMMANDS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "plan": ((), {"--length": "64", "--segments": "16,32", "--rates": "1,2", "--heads": "2", "--head-dim": "8",
                  "--offsets": "modulo", "--dtype": "fp32", "--query": "5", "--head": "0", "--ranks": "2",
                  "--layers": "3", "--shift": "alternate"}),
    "show": (("receptive",), {"--length": "16", "--segments": "8,16", "--rates": "1,2", "--heads": "2",
                              "--offsets": "modulo", "--query": "3", "--shift": "0", "--out": "{folder}/x.svg"}),
    "bench": ((), {"--length": "64", "--segments": "16,32", "--rates": "1,2", "--heads": "2", "--head-dim": "8",
                   "--offsets": "modulo", "--dtype": "fp32", "--device": "cpu", "--repeats": "1"}),
    "info": ((), {}),
    "convert": (("{folder}/none.pth", "{folder}/out"), {"--from": "gigapath", "--heads": "2", "--segments": "8",
                                                        "--rates": "1"}),
    "export": (("{folder}/none",), {"--out": "{folder}/out"}),
    "generate": (("{folder}",), {"--prompt": "def", "--bytes": "2", "--seed": "1", "--device": "cpu"}),
    "train": ((), {"--data": "{folder}/none", "--out": "{folder}/run", "--preset": "demo", "--device": "cpu"}),
    "migrate": (("{folder}",), {}),
    "slide embed": (("{slides}/features",), {"--out": "{folder}/out", **_MODEL}),
    "slide tune": (("{slides}/labels.csv",), {"--features": "{slides}/features", "--out": "{folder}/out",
                                              "--folds": "2", "--epochs": "1", "--bootstraps": "5", **_MODEL}),
    "slide map": (("{slides}/features/s0.h5",), {"--out": "{folder}/x.geojson", **_MODEL}),
}  # fmt: skip
# What is not there in an empty folder, so that right options are refused all the same.
_REFUSED_ANYWAY = ("convert", "export", "generate", "train")
_HUGE = {"--length", "--heads", "--head-dim", "--repeats", "--ranks", "--query", "--bytes", "--bootstraps", "--epochs"}


def _options() -> dict[str, dict[str, bool]]:
    """Of each command every option, and whether it is a flag: from the application, so that none is forgotten."""

    def of(group: Any, before: str = "") -> dict[str, Any]:
        found = {}
        for name, command in group.commands.items():
            found |= of(command, f"{name} ") if hasattr(command, "commands") else {before + name: command}
        return found

    return {
        name: {max(x.opts, key=len): x.is_flag for x in command.params if x.param_type_name == "option"}
        for name, command in of(typer.main.get_command(app)).items()
    }


OPTIONS = _options()


def invoke(*arguments: str) -> str:
    """Runs the command line; raises what the user reads, of typer's usage errors and slides without a result too."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        given = [a.replace("{folder}", folder).replace("{slides}", str(slides.folder())) for a in arguments]
        try:
            result = CliRunner().invoke(app, given, catch_exceptions=False)
        except REFUSALS as error:
            raise type(error)(in_options(str(error), *given[:2])) from error
        if result.exit_code in (1, 2):
            raise ValueError(f"expected a right command line, got {result.output[-2000:]}")
        assert result.exit_code == 0, result.output
        return result.stdout


@target("commands", 60)
def _commands(draw: st.DrawFn) -> Call:
    command = draw(st.sampled_from(sorted(OPTIONS)))
    positional, right = _COMMANDS[command]
    options, chosen = OPTIONS[command], dict(right)
    names = draw(st.lists(st.sampled_from(sorted(options)), max_size=2, unique=True)) if options else []
    for name in names:
        if options[name]:
            chosen[name] = ""
            continue
        chosen[name] = draw(st.sampled_from(_WRONG))
        if name in _HUGE and chosen[name] in ("2147483648", "9223372036854775807"):
            chosen[name] = "7"  # a right one that takes for ever, or more memory than there is
    arguments = [*command.split(), *positional]
    for name, value in chosen.items():
        arguments += [name] if options[name] else [name, value]
    named = {word for name in options for word in name.strip("-").split("-")} | {"folder", "steps"}
    is_right = not names and command not in _REFUSED_ANYWAY
    return Call(invoke, tuple(arguments), {}, sorted(named), right=is_right, also=(OSError,))
