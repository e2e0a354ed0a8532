"""What is trained: a linear head on frozen embeddings, low-rank changes of the encoder's layers, or all of it."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dilated_attention_pytorch.models.slide.encoder import SlideEncoder
from dilated_attention_pytorch.models.slide.tune.config import TuneConfig

_ADAPTED = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


class Head(nn.Module):
    """One linear layer on standardised embeddings `(B, D)`."""

    def __init__(self, width: int, num_outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_outputs)
        self.register_buffer("mean", torch.zeros(width, device=self.linear.weight.device))
        self.register_buffer("scale", torch.ones(width, device=self.linear.weight.device))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def standardise(self, x: Tensor) -> None:
        """Take mean and deviation from the embeddings `(S, D)` of a training part."""
        self.mean: Tensor = x.mean(0)
        self.scale: Tensor = x.std(0).clamp(min=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs `(B, O)` in fp32."""
        with torch.autocast(x.device.type, enabled=False):
            return self.linear((x.float() - self.mean) / self.scale)  # type: ignore[no-any-return]


class SlideModel(nn.Module):
    """An encoder and a head on its slide embedding: `pooled`, or hidden state `layer`."""

    def __init__(self, encoder: SlideEncoder, num_outputs: int, layer: int | None) -> None:
        super().__init__()
        self.encoder, self.layer = encoder, layer
        self.head = Head(encoder.config.embed_dim, num_outputs).to(encoder.cls_token.device)

    def forward(self, tiles: Tensor, coords: Tensor) -> Tensor:
        """Outputs `(B, O)` of slides as the encoder takes them."""
        out = self.encoder(tiles, coords)
        return self.head(out.pooled if self.layer is None else out.layers[self.layer])  # type: ignore[no-any-return]


class LowRank(nn.Module):
    """A change `scale * B A` of a weight `(out, in)`, 0 at the start (LoRA, arXiv 2106.09685, section 4.1)."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.a = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.b = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        return weight + self.scale * (self.b @ self.a)


def _adapted(encoder: SlideEncoder) -> list[nn.Module]:
    """The linear maps of attention and feed-forward network in every layer."""
    return [m for name, m in encoder.encoder.named_modules() if name.rpartition(".")[2] in _ADAPTED]


def add_low_rank(encoder: SlideEncoder, rank: int, alpha: float) -> None:
    """Freeze the encoder and give each linear map of its layers a low-rank change that is trained."""
    encoder.requires_grad_(False)
    for linear in _adapted(encoder):
        weight: Any = linear.weight
        parametrize.register_parametrization(linear, "weight", LowRank(weight, rank, alpha))


def merge_low_rank(encoder: SlideEncoder) -> None:
    """Add the changes to the weights: the encoder is a plain one again."""
    for linear in _adapted(encoder):
        if parametrize.is_parametrized(linear):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The state that training changes: parameters that are not frozen, and the head's buffers."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: x.detach() for name, x in model.state_dict().items() if name not in frozen}


def parameter_groups(model: nn.Module, config: TuneConfig) -> list[dict[str, Any]]:
    """AdamW's groups, with `scale` for the learning rate and no weight decay of vectors.

    With `mode="full"` layer i of n has the scale `layer_decay ** (n - i)`, and the cls token `layer_decay ** (n + 1)`.
    The input projection has 1, as in the official script, whose name for it matches no parameter.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    encoder = getattr(model, "encoder", None)
    depth = encoder.config.depth if encoder is not None and config.mode == "full" else 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = re.match(r"encoder\.encoder\.layers\.(\d+)\.", name)
        above = depth - int(layer[1]) if depth and layer else depth + 1 if depth and name.endswith("cls_token") else 0
        decay = config.weight_decay if parameter.dim() > 1 and not name.endswith("cls_token") else 0.0
        groups.setdefault((config.layer_decay**above, decay), []).append(parameter)
    return [{"params": each, "scale": scale, "weight_decay": decay} for (scale, decay), each in groups.items()]
