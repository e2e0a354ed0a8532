"""Old names where new ones are: of the package itself, of `core`, and of the function `dilated_attention`."""

from __future__ import annotations

import importlib
from typing import Any

from dilated_attention_pytorch import core, functional
from dilated_attention_pytorch._deprecated import PACKAGE, REMOVED_IN, load, warn_once
from dilated_attention_pytorch._old.gone import install, why_gone
from dilated_attention_pytorch._old.names import BY_PLACE, OLD_MODULES


def old_name(name: str, place: str = "") -> Any:
    """What stands in for an old name of the package or of `core`, with its warning; None where it never was one."""
    owner = f"{PACKAGE}.{place}" if place else PACKAGE
    if not place and name in OLD_MODULES:  # 0.2's package had imported them
        return importlib.import_module(f"{PACKAGE}.{name}")
    row = BY_PLACE[place].get(name)
    if row is not None:
        found = load(row.stand_in)
        warn_once(f"{place}.{name}", f"{owner}.{name} is deprecated and goes with {REMOVED_IN}: it is now {row.moved}")
        return found
    if (reason := why_gone(name, place)) is not None:
        raise AttributeError(f"module {owner!r} has no attribute {name!r}: {reason}")
    return None


def _name_of_core(name: str) -> Any:
    found = old_name(name, "core")
    if found is None:
        raise AttributeError(f"module {core.__name__!r} has no attribute {name!r}")
    return found


install()
# Imported before the package binds the function: importing this module binds the name to it.
importlib.import_module(f"{PACKAGE}.dilated_attention")
# `import dilated_attention_pytorch.dilated_attention as m` gives the function too, whatever is imported first: Python
# takes the attribute. So the function has the names that the old module is asked for; what stands in for them warns.
for _row in BY_PLACE["dilated_attention"].values():
    setattr(functional.dilated_attention, _row.name, load(_row.stand_in))
# 0.2 had its factories and configurations there.
vars(core)["__getattr__"] = _name_of_core
