"""Runs the command line in this process: what a command prints, and what it says when it refuses."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from dilated_attention_pytorch.cli.app import app, run


def call(*arguments: object) -> str:
    """What a command prints; its errors are the test's."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """What the entry point says on stderr when it refuses: one line, exit code 2."""
    monkeypatch.setattr(sys, "argv", ["dilated-attention", *(str(a) for a in arguments)])
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: expected ")
    return lines[0]
