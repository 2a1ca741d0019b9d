"""Decoding and prefill of wkv beside the official package `rwkv`, in one process and in turns.

    python benchmarks/against_rwkv.py [--models rwkv4-169m,rwkv7-0.1b] [--threads 1,2] [--rounds 7]

Random weights, float32, batch 1. Each round times one after the other, so a machine whose speed drifts
moves both; the last column is the median of the rounds' ratios (above 1: wkv is faster).
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import wkv

MODELS = {
    "rwkv4-169m": wkv.RWKV4Config.named("169M"),
    "rwkv4-430m": wkv.RWKV4Config.named("430M"),
    "rwkv5-0.1b": wkv.RWKV5Config.named("0.1B"),
    "rwkv6-0.1b": wkv.RWKV6Config.named("0.1B"),
    "rwkv7-0.1b": wkv.RWKV7Config.named("0.1B"),
    "rwkv7-0.4b": wkv.RWKV7Config.named("0.4B"),
}
PROMPT, DECODED = 512, 24


def official(path: Path, is_v7: bool) -> Any:
    """The peer at its best on a CPU: float32, with its TorchScript switched on."""
    os.environ.update(RWKV_JIT_ON="1", RWKV_CUDA_ON="0", RWKV_V7_ON="1" if is_v7 else "0")
    sys.modules.pop("rwkv.model", None)
    module = importlib.import_module("rwkv.model")
    if is_v7:
        return module.RWKV_x070(str(path.with_suffix("")), "cpu fp32")
    return module.RWKV(str(path), "cpu fp32", verbose=False)


def in_turns(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
    """Median seconds of each, and the median of the rounds' ratios theirs / ours."""
    ours(), theirs()
    pairs = []
    for _ in range(rounds):
        pair = []
        for call in (ours, theirs):
            start = time.perf_counter()
            call()
            pair.append(time.perf_counter() - start)
        pairs.append(pair)
    mine, peer = (statistics.median(column) for column in zip(*pairs, strict=True))
    return mine, peer, statistics.median(b / a for a, b in pairs)


@torch.inference_mode()  # as wkv.Session decodes; the official package switches gradients off itself
def compare(name: str, threads: list[int], rounds: int) -> None:
    config = MODELS[name]
    model = wkv.build(config)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight += 0.02 * torch.randn(weight.shape, generator=generator)
    tokens = torch.randint(1, config.vocab_size, (PROMPT,), generator=generator)
    ids = tokens.tolist()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / f"{name}.pth"
        wkv.save(model, path)
        del model
        model, _ = wkv.load(path)
        peer = official(path, config.generation == 7)

    ours, state = model(tokens[None], output="last")
    theirs, peer_state = peer.forward(ids, None)
    error = float((ours[0, 0] - theirs).abs().max() / theirs.std())
    assert error < 1e-3, f"the two disagree by {error} standard deviations: nothing to time"

    def decode_ours() -> None:
        current = state
        for token in ids[:DECODED]:
            _, current = model(torch.tensor([[token]]), current)

    def decode_theirs() -> None:
        current = peer_state
        for token in ids[:DECODED]:
            _, current = peer.forward([token], current)

    jobs = {
        "decode": (DECODED, decode_ours, decode_theirs),
        f"prefill {PROMPT}": (
            PROMPT,
            lambda: model(tokens[None], output="last"),
            lambda: peer.forward(ids, None),
        ),
    }
    for count in threads:
        torch.set_num_threads(count)
        for job, (n, mine, other) in jobs.items():
            a, b, ratio = in_turns(mine, other, rounds)
            print(f"| {name} | {job} | {count} | {n / a:.1f} | {n / b:.1f} | {ratio:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="rwkv4-169m,rwkv7-0.1b", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print("| model | job | threads | wkv tokens/s | rwkv tokens/s | wkv / rwkv |\n|---|---|---|---|---|---|")
    for name in arguments.models.split(","):
        compare(name, [int(t) for t in arguments.threads.split(",")], arguments.rounds)


if __name__ == "__main__":
    main()
