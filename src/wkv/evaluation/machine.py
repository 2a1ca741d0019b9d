"""What this machine can do at best: the measure for everything else."""

from __future__ import annotations

from time import perf_counter

import torch


def matmul_peak(device: torch.device, dtype: torch.dtype = torch.float32, *, seconds: float = 0.3) -> float:
    """Floating-point operations per second of the best of many large matrix products, within `seconds`."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best, end = float("inf"), perf_counter() + seconds
    while perf_counter() < end:
        start = perf_counter()
        product = a @ b
        product[0, 0].item()  # on a GPU: wait for it
        best = min(best, perf_counter() - start)
    return 2 * size**3 / best
