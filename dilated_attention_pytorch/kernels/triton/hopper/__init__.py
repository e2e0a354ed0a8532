"""Kernels for Hopper (sm_90) in Gluon; `aligned.py`'s are their twins on every other GPU."""
