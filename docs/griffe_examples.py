"""Griffe extension: reads a docstring's `Example:` as `Examples:`.

The reader of docstrings knows only the plural as a section; the singular would become a note in which a doctest is a
quotation. Both are usual in Google style.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

SINGULAR = re.compile(r"^(\s*)Example:\s*$", re.MULTILINE)


class ExampleSections(Extension):
    """Registered in mkdocs.yml."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Called with each object once its docstring is read."""
        if not obj.is_alias and obj.docstring:
            obj.docstring.value = SINGULAR.sub(r"\1Examples:", obj.docstring.value)
