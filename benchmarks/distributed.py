"""What several processes keep and send: the tables of docs/scaling.md.

    torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py    bytes per parameter
    python benchmarks/distributed.py --paper                              bytes and seconds per step

Counted: the bytes of the weights, gradients and optimizer tensors that process 0 holds after a step of a
small RWKV-7, over its number of parameters. On paper: what one GPU sends per step, from the parameters of
the published sizes. Assumed: 32 768 tokens per GPU and step, 400 TFLOP/s of 6 operations per parameter and
token, 400 GB/s between the GPUs of a machine and 50 GB/s per GPU between machines, float32 on the wire.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import wkv
from wkv.models import RWKV7
from wkv.training import TokenData, TrainConfig, Trainer
from wkv.training.distributed import join, own_part

TOKENS, FLOPS, INSIDE, BETWEEN = 32_768, 400e12, 400e9, 50e9
SIZES = ("0.4B", "1.5B", "2.9B", "7.2B", "13.3B")


@dataclass
class Noise:
    """Training data that nobody could learn from."""

    train: TokenData
    validation: None = None
    separator: int = 0
    tokenizer: None = None


def counted() -> None:
    tokens = np.random.default_rng(0).integers(1, 1024, 100_000).astype(np.uint16)
    data = Noise(TokenData(Path("noise"), tokens, np.array([len(tokens)])))
    shape = wkv.RWKV7Config.of_size(vocab_size=1024, n_layer=4, n_embd=256)
    if join(torch.device("cpu")).is_writer:
        print_row("bytes per parameter", "weights", "gradients", "optimizer", "all")
    for optimizer in ("adamw", "muon"):
        for parallel in ("replicate", "shard"):
            config = TrainConfig(
                batch_size=8, context=32, tokens=256, optimizer=optimizer, parallel=parallel, warmup_tokens=0
            )
            trainer = Trainer(wkv.build(shape), data, config)  # type: ignore[arg-type]
            n = sum(weight.numel() for weight in trainer.model.parameters())
            trainer._gradients(trainer.batches.next())
            kept = [
                sum(own_part(weight).nbytes for weight in trainer.model.parameters()),
                sum(
                    own_part(weight.grad).nbytes
                    for weight in trainer.model.parameters()
                    if weight.grad is not None
                ),
            ]
            trainer.fit()
            kept.append(sum(own_part(tensor).nbytes for _, tensor in trainer._optimizer_tensors()))
            if trainer.group.is_writer:
                name = f"{optimizer}, {parallel} over {trainer.group.size}"
                print_row(name, *(f"{size / n:.2f}" for size in (*kept, sum(kept))))
    for recompute in ("nothing", "blocks"):
        config = TrainConfig(batch_size=8, context=32, precision="bfloat16", recompute=recompute)
        trainer = Trainer(wkv.build(shape), data, config)  # type: ignore[arg-type]
        if trainer.group.is_writer:
            print_row(f"bfloat16 copies, recompute {recompute}", f"{copied(trainer) / n:.2f}")


def copied(trainer: Trainer) -> int:
    """Bytes of the bfloat16 copies of matrices that wait for the backward."""
    sizes = {weight.numel() for weight in trainer.model.parameters() if weight.ndim == 2}
    waiting: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.bfloat16 and tensor.ndim == 2 and tensor.numel() in sizes:
            waiting[tensor.data_ptr()] = tensor.nbytes
        return tensor

    tokens = torch.ones(1, 3, dtype=torch.int64)  # so few that no vector of theirs is as large as a matrix
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        trainer.objective(tokens, tokens, None, None, 3)
    return sum(waiting.values())


def on_paper() -> None:
    columns = (
        "parameters",
        "compute s",
        "replicate GB, s",
        "shard GB, s",
        "hybrid: inside GB, s",
        "between GB, s",
    )
    for gpus in (8, 64, 1024):
        print_row(f"{gpus} GPUs", *columns)
        for size in SIZES:
            with torch.device("meta"):
                model = RWKV7(wkv.RWKV7Config.named(size))
            n = sum(weight.numel() for weight in model.parameters())
            speed = INSIDE if gpus == 8 else BETWEEN
            others = (gpus - 1) / gpus
            # A sum sends each gradient twice; FSDP2 sends weights for forward and backward, gradients once.
            replicate, shard = 2 * 4 * n * others, 3 * 4 * n * others
            inside = 3 * 4 * n * 7 / 8
            between = 2 * 4 * n / 8 * (1 - 8 / gpus)
            cells = [(replicate, speed), (shard, speed), (inside, INSIDE), (between, BETWEEN)]
            print_row(
                size,
                f"{n / 1e9:.2f} B",
                f"{6 * n * TOKENS / FLOPS:.2f}",
                *(f"{sent / 1e9:.1f}, {sent / speed:.2f}" for sent, speed in cells),
            )


def print_row(*cells: Any) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--paper", action="store_true")
    on_paper() if parser.parse_args().paper else counted()
