"""One small call through every Triton kernel, for NVIDIA's memory checker:

compute-sanitizer --tool memcheck --error-exitcode 9 python tests/kernels/sanitize_kernels.py
"""

import torch

from dilated_attention_pytorch import dilated_attention_with_lse
from dilated_attention_pytorch.kernels.triton.hopper import support

SHORT, WASTE, FEW, LITTLE = support._SHORT, support._WASTE, support._FEW, support._LITTLE
CASES = {
    "aligned": (1024, {"segment_lengths": [512, 1024], "dilation_rates": [1, 2]}),
    "aligned, ragged end": (1000, {"segment_lengths": [512, 2048], "dilation_rates": [1, 2]}),
    "aligned, fewer keys": (1000, {"segment_lengths": [2048], "dilation_rates": [2], "num_keys": 700}),
    "short causal": (1000, {"segment_lengths": [512, 2048], "dilation_rates": [1, 2], "is_causal": True}),
    # On a Hopper GPU these take its own kernels, short as they are.
    "Hopper's, ragged end": (3201, {"segment_lengths": [512, 2048], "dilation_rates": [1, 2]}),
    "Hopper's, causal": (3201, {"segment_lengths": [512, 2048], "dilation_rates": [1, 2], "is_causal": True}),
    "Hopper's, one branch": (3201, {"segment_lengths": [500, 1333], "dilation_rates": [1, 3]}),
    "Hopper's, one branch causal": (
        3201,
        {"segment_lengths": [500, 1333], "dilation_rates": [1, 3], "offsets": "blocked", "is_causal": True},
    ),
    "general": (700, {"segment_lengths": [100, 333], "dilation_rates": [1, 3]}),
    "general causal": (700, {"segment_lengths": [100, 333], "dilation_rates": [1, 3], "is_causal": True}),
    "short segments": (700, {"segment_lengths": [16, 60], "dilation_rates": [1, 3]}),
    "zero keys": (700, {"segment_lengths": [100, 333], "dilation_rates": [1, 3], "padding": "zero_keys"}),
    "dropout": (300, {"segment_lengths": [100], "dilation_rates": [3], "dropout_p": 0.2, "seed": 1}),
}


def main() -> None:
    for width in (64, 48, 256):
        for name, (n, options) in CASES.items():
            if width == 256 and "one branch" not in name:  # wider tiles are of one branch
                continue
            of_hopper = name.startswith("Hopper")
            support._SHORT = {} if of_hopper else SHORT
            support._WASTE = 1.0 if of_hopper else WASTE
            support._FEW = dict.fromkeys(FEW, 5 * (64,)) if of_hopper else FEW
            support._LITTLE = dict.fromkeys(LITTLE, 0) if of_hopper else LITTLE
            options = dict(options)
            lengths = n, *[options.pop("num_keys", n)] * 2
            q, k, v = (torch.randn(1, size, 4, width, device="cuda", dtype=torch.bfloat16) for size in lengths)
            leaves = [x.requires_grad_() for x in (q, k, v)]
            for _ in range(2):  # the second call replays the first one's launches
                out, lse = dilated_attention_with_lse(*leaves, backend="triton", **options)
                grads = torch.autograd.grad(out.float().sum() + lse[torch.isfinite(lse)].sum(), leaves)
            torch.cuda.synchronize()
            assert all(torch.isfinite(g).all() for g in grads), name
            print(name, width, "ran")


if __name__ == "__main__":
    main()
