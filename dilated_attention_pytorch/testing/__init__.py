"""Helpers for tests of attention code: distances that rounding explains, and peak memory."""

from dilated_attention_pytorch.testing.memory import peak_bytes
from dilated_attention_pytorch.testing.precision import gradient_scale, relative_norm

__all__ = ["gradient_scale", "peak_bytes", "relative_norm"]
