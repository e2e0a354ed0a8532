"""Helpers for testing attention code: how far two results are apart by what rounding allows, and what a call costs."""

from dilated_attention_pytorch.testing.memory import peak_bytes
from dilated_attention_pytorch.testing.precision import gradient_scale, relative_norm

__all__ = ["gradient_scale", "peak_bytes", "relative_norm"]
