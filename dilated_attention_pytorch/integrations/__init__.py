"""The library inside others; each module is imported on demand and needs its own extra."""
