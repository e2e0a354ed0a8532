"""Helpers for testing attention code: how far two results are apart, judged by what rounding allows."""

from dilated_attention_pytorch.testing.precision import gradient_scale, relative_norm

__all__ = ["gradient_scale", "relative_norm"]
