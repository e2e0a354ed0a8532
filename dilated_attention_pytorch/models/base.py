"""The base of the five models: their constructor, from a config."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar, get_args, get_origin

import torch
from torch import nn

from dilated_attention_pytorch.core.validation import check_bool
from dilated_attention_pytorch.models.config import ModelConfig
from dilated_attention_pytorch.types import BackendName

Config = TypeVar("Config", bound=ModelConfig)


class Model(nn.Module, Generic[Config]):
    """A model made from a config: subclasses are of `Model[<the config's class>]` and make their parts in `_build`."""

    config_class: ClassVar[type[ModelConfig]]

    def __init_subclass__(cls) -> None:
        for base in cls.__dict__.get("__orig_bases__", ()):
            if isinstance(origin := get_origin(base), type) and issubclass(origin, Model):
                (cls.config_class,) = get_args(base)

    def __init__(
        self,
        config: Config | None = None,
        *,
        backend: BackendName = "auto",
        gradient_checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        kind: Any = self.config_class
        if config is not None and not isinstance(config, kind):
            raise TypeError(f"expected config to be a {kind.__name__}, got {type(config).__name__} {config!r}")
        check_bool("gradient_checkpointing", gradient_checkpointing)
        self.config: Config = replace(config or kind(), **overrides)
        self.gradient_checkpointing = gradient_checkpointing
        self._backend: BackendName = backend
        self._build(device=device, dtype=dtype)

    def _build(self, **factory: Any) -> None:  # device and dtype of the parameters
        raise NotImplementedError


def has_head_groups(model: nn.Module) -> bool:
    """Whether a model was made in legacy mode: each head has one branch then, which no config tells."""
    return any(getattr(module, "head_groups", False) for module in model.modules())
