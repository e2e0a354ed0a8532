"""The command line's commands in this process, with wrong values."""

from __future__ import annotations

import tempfile
from typing import Any

from hypothesis import strategies as st
from typer.testing import CliRunner

from dilated_attention_pytorch.cli.app import app
from fuzz.judge import Call
from fuzz.table import target

_WRONG = ("", "-1", "0", "1", "3", "2147483648", "9223372036854775807", "9223372036854775808", "1e400", "nan", "inf",
          "0.5", "x", "1,2", "1,,2", ",", "1,2,3,4,5,6", "modulo", "cuda", "cuda:7", "meta", "[bold]",
          "/nowhere/at/all", "None", "9" * 5000, "None=None", "steps=-1", "\u00e9\n")  # fmt: skip

# Of each command: what is given for positional arguments, and every option that takes a value, with a right one.
_COMMANDS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "plan": ((), {"--length": "64", "--segments": "16,32", "--rates": "1,2", "--heads": "2", "--head-dim": "8",
                  "--offsets": "modulo", "--dtype": "fp32", "--query": "5", "--head": "0", "--ranks": "2"}),
    "show": (("neighbours",), {"--length": "16", "--segments": "8,16", "--rates": "1,2", "--heads": "2",
                               "--offsets": "modulo", "--head": "0", "--query": "3", "--out": "{folder}/x.svg"}),
    "bench": ((), {"--length": "64", "--segments": "16,32", "--rates": "1,2", "--heads": "2", "--head-dim": "8",
                   "--offsets": "modulo", "--dtype": "fp32", "--device": "cpu", "--repeats": "1"}),
    "info": ((), {}),
    "convert": (("{folder}/none.pth", "{folder}/out"), {"--from": "gigapath", "--heads": "2", "--segments": "8",
                                                        "--rates": "1", "--max-wsi-size": "262144",
                                                        "--tile-size": "256"}),
    "generate": (("{folder}",), {"--prompt": "def", "--bytes": "2", "--temperature": "0.7", "--top-k": "2",
                                 "--top-p": "0.5", "--seed": "1", "--device": "cpu"}),
    "train": ((), {"--data": "{folder}/none", "--out": "{folder}/run", "--preset": "demo", "--set": "steps=1",
                   "--suffix": ".md", "--field": "text", "--tokenizer": "bytes", "--context-parallel": "2",
                   "--val-fraction": "0.1", "--device": "cpu", "--sample-bytes": "2"}),
    "migrate": (("{folder}",), {}),
}  # fmt: skip
# What is not there in an empty folder, so that right options are refused all the same.
_REFUSED_ANYWAY = ("convert", "generate", "train")
_ALSO_NAMED = "num_heads segment_lengths dilation_rates seq_len position positions steps path"
_HUGE = {"--length", "--heads", "--head-dim", "--repeats", "--ranks", "--query", "--bytes"}


def invoke(*arguments: str) -> str:
    """Runs the command line; a usage error of typer's is raised as one of ours."""
    with tempfile.TemporaryDirectory() as folder:
        given = [a.replace("{folder}", folder) for a in arguments]
        result = CliRunner().invoke(app, given, catch_exceptions=False)
        if result.exit_code == 2:
            raise ValueError(f"expected a right command line, got {result.output[-400:]}")
        assert result.exit_code == 0, result.output
        return result.stdout


@target("commands", 40)
def _commands(draw: st.DrawFn) -> Call:
    command = draw(st.sampled_from(sorted(_COMMANDS)))
    positional, options = _COMMANDS[command]
    chosen: dict[str, Any] = dict(options)
    names = draw(st.lists(st.sampled_from(sorted(options)), min_size=1, max_size=2, unique=True)) if options else []
    for name in names:
        chosen[name] = draw(st.sampled_from(_WRONG))
        if name in _HUGE and chosen[name] in ("2147483648", "9223372036854775807"):
            chosen[name] = "7"  # a right one that takes for ever, or more memory than there is
    arguments = [command, *positional]
    for name, value in chosen.items():
        arguments += [name, value]
    # An option is named by its own words, or by the argument of the library that it stands for.
    words = {word for name in options for word in (*name.strip("-").split("-"), name.strip("-").replace("-", "_"))}
    named = words | set(_ALSO_NAMED.split())
    right = not names and command not in _REFUSED_ANYWAY
    return Call(invoke, tuple(arguments), {}, sorted(named), right=right, also=(FileNotFoundError,))
