"""Slide encoders: loading, coordinates, pooling, attention maps and rows over ranks."""
