"""The table, filled: importing this brings every target in."""

from fuzz.table import TARGETS
from fuzz.targets import attention, commands, files, integrations, modules, others, pattern, shards, slides  # noqa: F401

__all__ = ["TARGETS"]
