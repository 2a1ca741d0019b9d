"""What share of the time matrix products would take at torch's best: batched decoding, prefill, training.

    python benchmarks/batches.py [--models rwkv7-0.1b,rwkv4-169m] [--formats float32,bf16,int8,int4]
                                 [--threads 2] [--rounds 5] [--skip-training]

rows        that decode together, a token each, their states anywhere in a pool; `prompt`: one of 512
tokens/s    of all rows together
products    floating-point operations of the matrix products / (peak x time); peak: those per second of
            torch's float32 product of 2048 x 2048 matrices, the best in the same run

Formats of fewer bits are measured by the same peak. Training: a step of benchmarks/training.py, whose
products count three times (forward, and a gradient for x and for W each).
"""

from __future__ import annotations

import argparse
import time

import torch
from scaling import seconds
from training import CONFIGS as TRAINED
from training import SHAPES, Training, random_tokens

from wkv.cli.bench import load_or_build
from wkv.cli.common import ModelFlags
from wkv.inference import StatePool
from wkv.models import build
from wkv.models.base import RWKV
from wkv.training.memory import kept_memory

ROWS = (1, 2, 4, 8, 16, 32, 64)
PROMPT = 512
SIDE = 2048


def peak() -> float:
    """Operations per second of torch's float32 product at its best."""
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    out = torch.empty(SIDE, SIDE)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        times.append(time.perf_counter() - start)
    return 2 * SIDE**3 / min(times)


def operations(model: RWKV) -> int:
    """Of the matrix products of one token: two for each number of a matrix."""
    plain = build(model.config, device="meta")
    sizes = (p.shape.numel() for name, p in plain.named_parameters() if p.ndim == 2 and min(p.shape) > 1)
    return 2 * (sum(sizes) - plain.emb.weight.numel())


def rows_of(name: str, dtype: str, args: argparse.Namespace) -> None:
    quantize = dtype if dtype.startswith("int") else None
    flags = ModelFlags(dtype="fp32" if quantize or dtype == "float32" else dtype, quantize=quantize)
    _, model = load_or_build(name, flags)
    torch.set_num_threads(args.threads)
    each = operations(model)
    tokens = torch.randint(model.config.vocab_size, (max(ROWS), PROMPT))
    pool = StatePool(model, max(ROWS))
    slots = torch.randperm(max(ROWS)).tolist()
    with torch.inference_mode():
        for B in ROWS:
            pieces = [(slot, [int(tokens[slot, 0])]) for slot in slots[:B]]
            best = peak()
            took = seconds(lambda: pool.read(pieces), 4 * args.rounds)  # noqa: B023
            print(f"| {name} | {dtype} | {B} | {B / took:.1f} | {each * B / best / took:.2f} |", flush=True)
        took = seconds(lambda: model(tokens[:1], output="last"), args.rounds)
        head = 2 * model.config.n_embd * model.config.vocab_size  # once, for the last token
        work = (each - head) * PROMPT + head
        print(f"| {name} | {dtype} | prompt | {PROMPT / took:.0f} | {work / best / took:.2f} |", flush=True)


def training(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    for name in TRAINED:
        for B, T in SHAPES:
            made, tokens = Training(name, T, "cheap"), random_tokens(B, T)
            best = peak()
            took = seconds(lambda: made.step(tokens), args.rounds)  # noqa: B023
            assert isinstance(made.model, RWKV)
            share = 3 * operations(made.model) * B * T / best / took
            print(f"| {name} | training | {B} x {T} | {B * T / took:.0f} | {share:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="rwkv7-0.1b,rwkv4-169m")
    parser.add_argument("--formats", default="float32,bf16,int8,int4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-training", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| model | format | rows | tokens/s | products |\n|---|---|---:|---:|---:|")
    for name in args.models.split(","):
        for dtype in args.formats.split(","):
            rows_of(name, dtype, args)
    if not args.skip_training:
        with kept_memory():
            training(args)


if __name__ == "__main__":
    main()
