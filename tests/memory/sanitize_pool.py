"""Every strategy's blocks on several streams, for NVIDIA's memory checker:

compute-sanitizer --tool memcheck --error-exitcode 9 python tests/memory/sanitize_pool.py
"""

import torch

from dilated_attention_pytorch import UnifiedMemoryPool
from dilated_attention_pytorch.core.memory.strategies import STRATEGIES


def main() -> None:
    for strategy in STRATEGIES:
        pool = UnifiedMemoryPool(strategy, limit=64 << 20)
        streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
        wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in streams]
        torch.cuda.synchronize()
        for step in range(90):
            size = 1 + (step * 7919 % 1013) * 997
            with torch.cuda.stream(streams[step % 3]):
                staging = pool.borrow(size, torch.uint8, "cpu", "staging", pinned=True)
                staging.tensor.fill_(step % 5)
                device = pool.borrow(size, torch.uint8, "cuda", "device")
                device.tensor.copy_(staging.tensor, non_blocking=True)
                staging.release()
                wrong[step % 3] += (device.tensor != step % 5).sum()
                device.release()
            if step % 30 == 29:
                pool.trim()
        torch.cuda.synchronize()
        assert sum(map(int, wrong)) == 0, strategy
        pool.trim()
        assert pool.stats().reserved == 0, strategy
        print(strategy, "ran")


if __name__ == "__main__":
    main()
