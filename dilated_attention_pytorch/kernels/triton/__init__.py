"""The fused kernels; imported only where they are chosen, so that the package loads without Triton."""
