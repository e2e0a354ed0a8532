"""Warnings of deprecated use, at the user's line, and the decorator that lets a class take an old call.

What is deprecated is loaded by its name when it is used: this file imports nothing of ours, so that anything may lean
on it.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

PACKAGE = __name__.rpartition(".")[0]
REMOVED_IN = "0.4.0"
_T = TypeVar("_T")
_warned: set[str] = set()


def warn_once(key: str, message: str) -> None:
    """Gives one DeprecationWarning per process and key, at the line of the user's code that led here."""
    if key in _warned:
        return
    warn_user(
        f"{message} (see docs/migration.md; `dilated-attention migrate` lists and rewrites old names)",
        DeprecationWarning,
    )
    # After the warning: where a filter makes it an error, it is one every time.
    _warned.add(key)


def warn_user(message: str, category: type[Warning]) -> None:
    """Warns at the line of the user's code that led here, however many of our frames lie between."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_inner(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__", "<unknown>"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _is_inner(module: str) -> bool:
    # A module is called through torch's, and a Hugging Face model through transformers'.
    inner = {PACKAGE, "torch", "transformers", "importlib", "_frozen_importlib", "_frozen_importlib_external"}
    return module.partition(".")[0] in inner


def load(place: str) -> Any:
    """The object at `module:attribute`, under the package."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(f"{PACKAGE}.{module}"), attribute)


def takes_old_call(place: str) -> Callable[[type[_T]], type[_T]]:
    """Lets a class that has kept its name be constructed as before, with a warning.

    Args:
        place: `module:attribute`, under the package, of what translates old arguments into new ones.
    """

    def decorate(cls: type[_T]) -> type[_T]:
        construct = cls.__init__

        @functools.wraps(construct)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            translated = load(place).translated(construct, args, kwargs)
            if translated is None:
                construct(self, *args, **kwargs)
            else:
                construct(self, **translated)

        cls.__init__ = __init__  # type: ignore[method-assign]
        return cls

    return decorate
