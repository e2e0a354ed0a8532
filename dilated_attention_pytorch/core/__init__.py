"""torch only: the pattern, validation, the dense reference, the portable backend, merging."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # 0.2 had its factories and configurations here.
    from dilated_attention_pytorch._deprecated import old_name

    return old_name("core", name)
