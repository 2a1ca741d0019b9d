"""Choosing a token out of 65 536 logits, with the default settings, on one thread.

    python benchmarks/sampling.py

Prints the fastest and the median of 200 choices in milliseconds, for logits as sure as a trained model's
and for flatter ones, which need more of the vocabulary sorted.
"""

from __future__ import annotations

import statistics
import time

import torch

from wkv.inference import Sampling
from wkv.inference.sampling import Sampler

VOCABULARY = 65536


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    for kind, spread in [("sure", 4.0), ("unsure", 2.0), ("nearly flat", 0.5)]:
        logits = spread * torch.randn(VOCABULARY, generator=generator)
        sampler = Sampler(Sampling(seed=0), VOCABULARY)
        times = []
        for _ in range(200):
            start = time.perf_counter()
            sampler.record(sampler.pick(logits))
            times.append(1e3 * (time.perf_counter() - start))
        print(f"{kind:<12} fastest {min(times):.2f} ms, median {statistics.median(times):.2f} ms")


if __name__ == "__main__":
    main()
