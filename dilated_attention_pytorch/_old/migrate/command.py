"""`migrate`: the names of 0.1 and 0.2 in a code base."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer


def migrate(
    paths: Annotated[list[Path], typer.Argument(help="Files, or folders that are searched for Python files.")],
    write: Annotated[bool, typer.Option("--write", help="Rewrite the files; otherwise show the changes.")] = False,
) -> None:
    """List the names of 0.1 and 0.2 in a code base, and rewrite those with unchanged calls."""
    from dilated_attention_pytorch._old.migrate.files import python_files, write_atomically
    from dilated_attention_pytorch._old.migrate.program import migrate as migrated

    count, left, unread, changed = 0, 0, 0, 0

    def sources() -> Iterator[tuple[str, bytes]]:
        nonlocal unread
        for path in (file for one in paths for file in python_files(one)):
            try:
                yield str(path), path.read_bytes()
            except OSError as error:
                print(f"{path}: skipped: {error}", file=sys.stderr)
                unread += 1

    for path, result in migrated(sources()).items():
        if isinstance(result, ValueError):
            print(f"{path}: skipped: {result}", file=sys.stderr)
            unread += 1
            continue
        for line, old, new, by_hand in result.findings:
            print(f"{path}:{line}: {old} -> {new or 'nothing'}" + (f" (by hand: {by_hand})" if by_hand else ""))
            count, left = count + 1, left + bool(by_hand)
        if result.before == result.after:
            continue
        changed += 1
        if write:
            write_atomically(Path(path), result.after)
            continue
        before, after = (text.decode("utf-8", "replace").splitlines() for text in (result.before, result.after))
        print("\n".join(difflib.unified_diff(before, after, path, path, lineterm="")))
    did = f"{changed} files rewritten" if write else f"{changed} files would change (--write does it)"
    print(f"{count} old names, {left} of them left to do by hand; {did}")
    if unread:
        raise typer.Exit(1)
