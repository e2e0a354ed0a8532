"""Buffers that keep their address and their place: see `unified_pool`."""
