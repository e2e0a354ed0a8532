"""`migrate`: the names of 0.1 and 0.2 in a code base."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from dilated_attention_pytorch.core.files import replace_file


def migrate(
    paths: Annotated[list[Path], typer.Argument(help="Files, or folders that are searched for Python files.")],
    write: Annotated[bool, typer.Option("--write", help="Rewrite the files; otherwise show the changes.")] = False,
) -> None:
    """List the names of 0.1 and 0.2 in a code base, and rewrite those with unchanged calls."""
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


def python_files(path: Path) -> Iterator[Path]:
    """The Python files under a folder, without hidden folders and virtual environments; or the file itself.

    Raises:
        FileNotFoundError: nothing is there.
    """
    if not path.exists():
        raise FileNotFoundError(f"expected a file or a folder at {path}, found none")
    if path.is_file():
        yield path
        return
    for folder, folders, files in os.walk(path):
        inner = (name for name in sorted(folders) if not name.startswith((".", "__pycache__")))
        folders[:] = [name for name in inner if not Path(folder, name, "pyvenv.cfg").exists()]
        yield from (Path(folder, name) for name in sorted(files) if name.endswith((".py", ".pyi")))


def write_atomically(path: Path, source: bytes) -> None:
    """Puts a source in the place of a file, whole, with the file's own mode; a link stays one."""
    target = path.resolve()
    replace_file(target, lambda temporary: temporary.write_bytes(source), mode=target.stat().st_mode)
