"""The table, filled: importing this brings every target in."""

from fuzz.table import TARGETS
from fuzz.targets import attention, commands, modules, others, pattern  # noqa: F401

__all__ = ["TARGETS"]
