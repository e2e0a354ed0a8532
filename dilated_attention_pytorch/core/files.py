"""Files that are written whole, beside their place and then moved there; folders that one process holds."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dilated_attention_pytorch.core.messages import quoted, shown

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.part")


def check_path(name: str, value: object) -> Path:
    """A path, given as a str or as anything that stands for one."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"expected {name} to be a path, got {shown(value)}")
    path = Path(value)
    try:
        os.lstat(path)
    except ValueError as error:  # a null byte
        raise ValueError(f"expected {name} to be a path, got {quoted(path)}: {error}") from None
    except OSError as error:  # whether it is there is for others to ask
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"expected {name} to be a path, got {quoted(path)}: {error.strerror}") from None
    return path


def replace_file(path: Path, write: Callable[[Path], object], mode: int | None = None) -> None:
    """Replace a file at once: a reader, or a crash, finds the old file or the new one, whole.

    Args:
        path: the file.
        write: writes the new content to the path it is given, in the same folder.
        mode: of the new file; what the umask leaves by default.

    Raises:
        OSError: the new content could not be written; the old file stays, and nothing is left beside it.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    # O_EXCL follows no link that waits under the name; the system takes the umask off the mode.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if mode is None else 0o600))
    mode = temporary.stat().st_mode if mode is None else mode
    try:
        write(temporary)
        with temporary.open("r+b") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(mode)  # safetensors puts a file of its own there, which only the owner may read
        os.replace(temporary, path)
    except Exception as error:  # on a full disk torch and safetensors raise errors of their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"expected room and permission to write {path}, got: {reason}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def replace_text(path: Path, text: str) -> None:
    """Write a text file that is never seen half-written."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def checksum(path: Path) -> int:
    """The CRC-32 of a file, read bit by bit: a map would count as memory of this process."""
    found = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            found = zlib.crc32(block, found)
    return found


def parse_json(text: str) -> Any:
    """The value of a JSON text, which may begin with a byte order mark.

    Raises:
        ValueError: any other text, one nested too deep for Python included.
    """
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed within `replace_file` left in a folder."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder for one run, by `.lock` in it, until the process ends at the latest.

    Args:
        folder: to hold.
        wait: until another run has left it.

    Raises:
        ValueError: another run holds it.
    """
    with (folder / ".lock").open("a") as stream:
        try:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"expected a folder that no other run is writing to, got {folder}") from None
        except (ImportError, OSError):  # Windows, and file systems without locks
            pass
        yield
