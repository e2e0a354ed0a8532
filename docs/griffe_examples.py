"""Griffe extension: reads a docstring's `Example:` as `Examples:`, and `q, k: text` as an entry for each name.

The reader of docstrings knows only the plural as a section; the singular would become a note in which a doctest is a
quotation. Both are usual in Google style, as is one entry for several arguments.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

SINGULAR = re.compile(r"^(\s*)Example:\s*$", re.MULTILINE)
# An entry of a section with its further lines, which are indented more.
SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)


class ExampleSections(Extension):
    """Registered in mkdocs.yml."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Called with each object once its docstring is read."""
        if not obj.is_alias and obj.docstring:
            text = SINGULAR.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = SEVERAL.sub(one_each, text)


def one_each(entry: re.Match[str]) -> str:
    """The entry's text under each of its names."""
    return "\n".join(f"{entry[1]}{name}: {entry[3]}" for name in entry[2].split(", "))
