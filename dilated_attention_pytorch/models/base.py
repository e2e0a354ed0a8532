"""The base of the five models: their constructor, from a config."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Generic, TypedDict, TypeVar, Unpack

import torch
from torch import nn

from dilated_attention_pytorch.core.validation import check_bool, check_choice, check_factory, shown
from dilated_attention_pytorch.models.config import ModelConfig
from dilated_attention_pytorch.types import BackendName

_Config = TypeVar("_Config", bound=ModelConfig)


class TensorOptions(TypedDict, total=False):
    """The device and dtype of parameters that are made."""

    device: torch.device | str | None
    dtype: torch.dtype | None


class Model(nn.Module, Generic[_Config]):
    """A model made from a config. Subclasses name the config's class and make their parts in `_build`."""

    config_class: ClassVar[type[ModelConfig]]

    def __init__(
        self,
        config: _Config | None = None,
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
            raise TypeError(f"expected config to be a {kind.__name__}, got {shown(config)}")
        check_bool("gradient_checkpointing", gradient_checkpointing)
        check_factory(device, dtype)
        backend = check_choice("backend", backend, BackendName)
        self.config: _Config = replace(config or kind(), **overrides)
        self.gradient_checkpointing = gradient_checkpointing
        self._backend: BackendName = backend
        self._build(device=device, dtype=dtype)

    def _build(self, **factory: Unpack[TensorOptions]) -> None:
        raise NotImplementedError


def has_head_groups(model: nn.Module) -> bool:
    """Whether a model was made in legacy mode: each head has one branch then, which no config tells."""
    return any(getattr(module, "head_groups", False) for module in model.modules())
