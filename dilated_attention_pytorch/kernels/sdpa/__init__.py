"""The backend over torch's own attention kernels: any device, memory linear in N."""
