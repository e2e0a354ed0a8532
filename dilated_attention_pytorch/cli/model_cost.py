"""What a training run costs on some devices, by formula: bytes per device, bytes that travel, FLOPs, hours.

The activations are what autograd saves, tensor by tensor, as `models/layers.py` calls them; tests hold the formula to
autograd on the CPU, byte for byte, and to `torch.cuda.max_memory_allocated` on GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

from dilated_attention_pytorch.models import LongNetLM
from dilated_attention_pytorch.ring_attention.forecast import forecast
from dilated_attention_pytorch.ring_attention.plan import equal_bounds
from dilated_attention_pytorch.training.config import TrainConfig
from dilated_attention_pytorch.training.metrics import flops_per_sequence


class ModelCost:
    """The cost of a training step of a config on `devices` devices.

    Args:
        config: of the run; its precision decides the width of what is computed, `"auto"` counts as bf16.
        devices: their number.

    Raises:
        ValueError: a batch that the devices cannot share.
    """

    def __init__(self, config: TrainConfig, devices: int) -> None:
        self.config, self.devices = config, devices
        self.micro_steps = config.micro_steps(devices)
        self.is_sharded = devices > 1 and (config.shard_parameters or config.context_parallel > 1)
        self.width = 4 if config.precision == "fp32" else 2  # of what matrix products take
        model = LongNetLM(config.model_config(), device="meta")
        self.parameters = sum(p.numel() for p in model.parameters())
        self.in_layer = sum(p.numel() for p in model.decoder.layers[0].parameters())
        self.tokens = config.micro_batch_size * -(-config.context // config.context_parallel)  # on a device at a time

    def states(self) -> dict[str, int]:
        """Bytes per device that stay: parameters, AdamW's moments, gradients, and copies to compute with."""
        mine = -(-self.parameters // self.devices) if self.is_sharded else self.parameters
        found = {"parameters": 4 * mine, "optimizer": 8 * mine, "gradients": 4 * mine}
        if self.is_sharded:  # the root's for good; a layer's while it runs, and that of the next
            root = self.parameters - self.config.num_layers * self.in_layer
            return found | {"gathered parameters": 4 * root + 2 * self.width * self.in_layer}
        copies = 0 if self.width == 4 else self.width * self.parameters  # autocast's
        return found | {"gathered parameters": copies + (4 * self.parameters if self.devices > 1 else 0)}  # DDP's

    def saved_by_layer(self) -> int:
        """Bytes that autograd saves in a layer's forward; LayerNorm and the residual stream are in fp32."""
        c, w = self.config, self.width
        d, f, head = c.d_model, c.dim_feedforward, c.d_model // c.nhead
        kv = head * (c.model_config().num_kv_heads or c.nhead)
        residual = 2 * (4 * d + 8)  # inputs of two LayerNorms, with a mean and a deviation each
        attention = w * d + w * (2 * d + 2 * kv) + 4 * c.nhead  # the projections' input; q, k, v, out and lse
        sub_norm = (0 if w == 4 else 4 * d) + 8 + w * d  # a copy in fp32, and out_proj's input
        feed_forward = w * d + w * f + 4 * f + 8 + w * f  # inputs of fc1, GELU, LayerNorm and fc2
        return self.tokens * (residual + attention + sub_norm + feed_forward) + self.exchange()["kept rows"]

    def activations(self) -> dict[str, int]:
        """Bytes at the peak of a step, kept layers and what is there for a moment, with the config's checkpointing."""
        c, w, n = self.config, self.width, self.tokens
        layer = self.saved_by_layer()
        each = 4 * c.d_model * n if c.gradient_checkpointing else layer
        # In the backward of a LayerNorm over the inner width: the gradients of both its sides, and the residual's.
        moment = n * (8 * c.dim_feedforward - w * c.dim_feedforward + 4 * c.d_model)
        moment += layer if c.gradient_checkpointing else 0
        # The loss: logits, their logarithms, and two gradients in fp32.
        logits = n * c.vocab_size * (12 + (2 if w == 2 else 4))
        return {"kept activations": c.num_layers * each, "one layer's backward": moment, "logits": logits}

    def exchange(self) -> dict[str, int]:
        """Bytes that the busiest device receives: by a layer's ring forward, and by a step."""
        c, w = self.config, self.width
        ring = 0
        if c.context_parallel > 1:
            pattern, head = c.model_config().pattern, c.d_model // c.nhead
            bounds = equal_bounds(c.context, c.context_parallel)
            shares = forecast(pattern, bounds, head, batch=c.micro_batch_size, element_size=w, is_causal=True)
            ring = max(share.received for share in shares)
        others = (self.devices - 1) / self.devices
        # Gradients of rows go home in fp32. Weights are gathered twice, for the backward again.
        step = ring * (1 + 4 // w) * c.num_layers * self.micro_steps
        step += ring * c.num_layers * self.micro_steps if c.gradient_checkpointing else 0
        sharded = (2 * w + 4) * self.micro_steps
        return {
            "kept rows": ring,
            "per step": int(step + self.parameters * others * (sharded if self.is_sharded else 8)),
        }

    def peak(self) -> int:
        """Bytes per device at the worst moment: where the backward begins, or where it ends."""
        states, parts = self.states(), self.activations()
        fixed = sum(states.values()) - states["gradients"]
        begins = parts["kept activations"] + max(parts["logits"], parts["one layer's backward"])
        begins += states["gradients"] if self.micro_steps > 1 else 0
        ends = parts["kept activations"] // self.config.num_layers + parts["one layer's backward"] + states["gradients"]
        return fixed + max(begins, ends)

    @cached_property
    def flops(self) -> int:
        """FLOPs of a step, forward and backward, over all devices; what is computed again does not count."""
        return flops_per_sequence(self.config) * self.config.batch_size


def meshes(config: TrainConfig, devices: int) -> Iterator[ModelCost]:
    """The ways to lay a run on some devices, from the least exchange on, where the batch can be shared."""
    sizes = [p for p in range(1, devices + 1) if devices % p == 0 and p <= config.context]
    for shards in sizes:
        for sharded in (False, True) if shards == 1 and devices > 1 else (devices > 1,):
            for again in (False, True):
                how: Any = {"context_parallel": shards, "shard_parameters": sharded, "gradient_checkpointing": again}
                try:
                    yield ModelCost(replace(config, **how), devices)
                except ValueError:
                    continue
