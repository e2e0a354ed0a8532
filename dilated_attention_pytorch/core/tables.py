"""Tables of tensors that depend on plain numbers alone, made once and kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

from dilated_attention_pytorch.core import torch_private

_P = ParamSpec("_P")
_R = TypeVar("_R")


def kept(maxsize: int) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """An `lru_cache` that tracers go around: their tensors are fake, and their sizes are symbols and no keys."""

    def decorate(make: Callable[_P, _R]) -> Callable[_P, _R]:
        @lru_cache(maxsize)
        def cached(*args: Any, **kwargs: Any) -> _R:
            with torch.inference_mode(False):  # what is kept serves training too
                return make(*args, **kwargs)

        @wraps(make)
        def table(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if torch.compiler.is_compiling() or torch_private.is_watched():
                return make(*args, **kwargs)
            return cached(*args, **kwargs)  # type: ignore[arg-type]

        return table

    return decorate
