"""A small LongNet encoder that predicts tiles it cannot see from those it can: a task that needs the neighbourhood."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tiles import TileSet
from torch import Tensor, nn

from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.positions import Rotation
from dilated_attention_pytorch.kernels.hilbert import CurveOrder
from dilated_attention_pytorch.models import LongNetEncoder


@dataclass(frozen=True)
class Settings:
    """One budget for every order.

    Attributes:
        segment_lengths: w_i.
        dilation_rates: r_i.
        width: of the model.
        heads: of the model.
        layers: of the model.
        steps: of training, each over the whole slide.
        learning_rate: at its highest.
        held_out: share of tiles that training never shows, neither as input nor as target.
        hidden: share of the others that one step hides and predicts.
    """

    segment_lengths: tuple[int, ...] = (64, 256, 1024)
    dilation_rates: tuple[int, ...] = (1, 2, 4)
    width: int = 96
    heads: int = 4
    layers: int = 2
    steps: int = 100
    learning_rate: float = 3e-3
    held_out: float = 0.1
    hidden: float = 0.2

    @property
    def pattern(self) -> DilatedPattern:
        """Who attends to whom."""
        return DilatedPattern(self.segment_lengths, self.dilation_rates, self.heads)


class Probe(nn.Module):
    """Tile features and places in, predicted targets out.

    Places enter as rotary positions in each axis alone, so attention knows how far apart tiles are and in which
    direction, whatever the order of the sequence, and cannot tell a tile by its absolute place.

    Args:
        tiles: gives the sizes.
        settings: the rest.
    """

    def __init__(self, tiles: TileSet, settings: Settings) -> None:
        super().__init__()
        self.embed = nn.Linear(tiles.features.shape[1], settings.width)
        self.mask_token = nn.Parameter(torch.zeros(settings.width))
        self.encoder = LongNetEncoder(
            d_model=settings.width,
            nhead=settings.heads,
            num_encoder_layers=settings.layers,
            dim_feedforward=2 * settings.width,
            segment_lengths=settings.segment_lengths,
            dilation_rates=settings.dilation_rates,
            positions=None,
            activation="gelu",
        ).encoder
        self.head = nn.Linear(settings.width, tiles.targets.shape[1])
        self.head_dim = settings.width // settings.heads

    def forward(self, features: Tensor, coords: Tensor, hidden: Tensor) -> Tensor:
        """Predictions `(N, T)`.

        Args:
            features: `(N, F)`, in the order that attention runs along.
            coords: `(N, D)`, likewise.
            hidden: bool `(N,)`, tiles whose features may not be seen.
        """
        x = torch.where(hidden[:, None], self.mask_token, self.embed(features))[None]
        rotation = turns(coords, self.head_dim)
        for layer in self.encoder.layers:
            x = layer(x, is_causal=False, rotation=rotation)
        predicted: Tensor = self.head(self.encoder.layer_norm(x)[0])
        return predicted


def turns(coords: Tensor, head_dim: int) -> Rotation:
    """Rotary positions along each axis, with wavelengths from 4 to 64 tiles."""
    count = head_dim // 2 // coords.shape[1]
    if count * 2 * coords.shape[1] != head_dim:
        raise ValueError(f"expected a head width that is a multiple of {2 * coords.shape[1]}, got {head_dim}")
    angles = (coords[..., None] * (2 * torch.pi / 4 * 16 ** -torch.linspace(0, 1, count))).flatten(1)[:, None]
    return Rotation(angles.cos(), angles.sin(), angles.cos(), angles.sin())


@dataclass
class Run:
    """What one training gave.

    Attributes:
        loss: mean squared error on validation tiles, 1 for always guessing the mean.
        seconds: of the training, in processor time, which other jobs on the machine do not stretch.
        model: trained.
        errors: `(N,)`, squared error of each validation tile in original order, nan elsewhere.
        held_out: bool `(N,)`, original order.
        history: training loss at each step.
    """

    loss: float
    seconds: float
    model: Probe
    errors: Tensor
    held_out: Tensor
    history: list[float] = field(default_factory=list)


def train(
    tiles: TileSet, order: CurveOrder, settings: Settings, seed: int, on_step: Callable[[], None] = lambda: None
) -> Run:
    """Trains a probe along an order. Weights at the start and hidden tiles depend on the seed, not on the order."""
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.rand(len(tiles.features), generator=generator) < settings.held_out
    torch.manual_seed(seed)
    model = Probe(tiles, settings)
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, settings.steps + 1, pct_start=0.1)
    features, coords, targets = (order.apply(x, 0) for x in (tiles.features, tiles.coords, tiles.targets))
    never = order.apply(held_out, 0)
    history = []
    start = time.process_time()
    for _ in range(settings.steps):
        drawn = torch.rand(len(features), generator=generator) < settings.hidden
        asked = order.apply(drawn, 0) & ~never
        predicted = model(features, coords, asked | never)
        loss = (predicted[asked] - targets[asked]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        history.append(float(loss.detach()))
        on_step()
    seconds = time.process_time() - start
    with torch.no_grad():
        errors = (model(features, coords, never) - targets).square().mean(1)
    errors = order.undo(errors.masked_fill(~never, torch.nan), 0)
    return Run(float(errors[held_out].mean()), seconds, model, errors, held_out, history)


def mean_of_neighbours(tiles: TileSet, held_out: Tensor) -> Tensor:
    """The errors of guessing the mean target of a tile's visible neighbours, as `Run.errors`: what needs no model."""
    from locality import neighbour_pairs

    first, second = neighbour_pairs(tiles.coords)
    seen = ~held_out[second]
    sums = torch.zeros_like(tiles.targets).index_add_(0, first[seen], tiles.targets[second[seen]])
    counts = torch.bincount(first[seen], minlength=len(sums))[:, None]
    guess = sums / counts.clamp(min=1)
    return (guess - tiles.targets).square().mean(1).masked_fill(~held_out, torch.nan)
