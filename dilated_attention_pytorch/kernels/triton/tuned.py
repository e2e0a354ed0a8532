"""Tile shapes measured on lines of `benchmarks/patterns.py` by `benchmarks/tune.py`; `configs.py` reads them.

(architecture, kernel, head_dim up to, causal) -> (rows of queries, rows of keys, warps, stages) for 16-bit inputs, the
best first; later ones are for shorter segments. "early" takes dO V^T before the exponentials in dK/dV.
"""

from typing import Any

WIDTHS = 48, 64, 128, 256
TABLE: dict[tuple[str, str, int, bool], tuple[tuple[Any, ...], ...]] = {
    ("sm_90", "aligned_forward", 64, False): ((64, 128, 4, 2), (64, 64, 4, 4)),
    ("sm_90", "aligned_forward", 128, False): ((128, 128, 8, 3), (64, 64, 4, 3)),
    ("sm_90", "aligned_forward", 64, True): ((64, 64, 4, 3),),
    ("sm_90", "aligned_forward", 128, True): ((64, 64, 4, 3),),
    ("sm_90", "aligned_dq", 64, False): ((64, 128, 4, 3), (64, 64, 4, 2)),
    ("sm_90", "aligned_dq", 128, False): ((128, 64, 8, 3), (64, 64, 4, 2)),
    ("sm_90", "aligned_dkv", 64, False): ((64, 64, 4, 3, "early"),),
    ("sm_90", "aligned_dkv", 128, False): ((32, 128, 8, 3, "early"), (32, 64, 4, 3)),
    ("sm_90", "forward", 64, False): ((64, 64, 4, 3),),
    ("sm_90", "forward", 128, False): ((128, 64, 8, 3),),
    ("sm_90", "forward", 256, False): ((128, 64, 8, 2),),
    ("sm_90", "forward", 64, True): ((128, 64, 4, 3), (64, 64, 4, 2)),
    ("sm_90", "forward", 128, True): ((64, 64, 4, 3),),
    ("sm_90", "forward", 256, True): ((128, 64, 8, 2),),
    ("sm_90", "dq", 64, False): ((64, 64, 4, 3),),
    ("sm_90", "dq", 128, False): ((128, 64, 8, 3),),
    ("sm_90", "dq", 256, False): ((128, 32, 8, 2),),
    ("sm_90", "dq", 64, True): ((64, 64, 4, 2),),
    ("sm_90", "dq", 128, True): ((128, 64, 8, 3),),
    ("sm_90", "dq", 256, True): ((128, 32, 8, 2),),
    ("sm_90", "dkv", 48, False): ((64, 64, 4, 2, "early"),),
    ("sm_90", "dkv", 64, False): ((64, 64, 4, 3, "early"),),
    ("sm_90", "dkv", 128, False): ((32, 64, 4, 2, "early"),),
    ("sm_90", "dkv", 256, False): ((64, 64, 8, 2, "early"),),
    ("sm_90", "dkv", 64, True): ((64, 64, 4, 3, "early"), (64, 64, 4, 2, "early")),
    ("sm_90", "dkv", 128, True): ((32, 64, 4, 2, "early"),),
    ("sm_90", "dkv", 256, True): ((64, 64, 8, 2, "early"),),
}
