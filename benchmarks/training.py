"""Training steps of RWKV-4, 6 and 7 and of a GPT with as many parameters, side by side.

    python benchmarks/training.py [--threads 2] [--rounds 3] [--models rwkv4 rwkv7] [--recompute nothing]
    python benchmarks/training.py --profile

6 layers of width 512, vocabulary 8192, float32. A step is forward, backward and AdamW, with the same loss
for both (`linear_cross_entropy`). Steps of the two models alternate within one process, so that whatever
else the machine does hits both; the figure to read is the ratio. Memory is measured in a fresh process
each: the peak during a step above what weights, gradients and moments take, per token of the batch (Linux).
With --profile: where a step's time goes, by kind of operation.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from gpt import as_large_as, count
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import wkv
from wkv.training import linear_cross_entropy, make_optimizers
from wkv.training.memory import kept_memory

SIZES = dict(vocab_size=8192, n_layer=6, n_embd=512)
SHAPES = [(4, 512), (1, 4096)]  # B x T
CONFIGS = {"rwkv4": wkv.RWKV4Config, "rwkv6": wkv.RWKV6Config, "rwkv7": wkv.RWKV7Config}


class Training:
    """A model and what trains it. The name "rwkv7-gpt" is the GPT with as many parameters as "rwkv7"."""

    def __init__(self, name: str, context: int, recompute: str) -> None:
        config = CONFIGS[name.removesuffix("-gpt")].of_size(**SIZES)
        self.name = name
        self.model: nn.Module = wkv.build(config)
        self.model.recompute = recompute
        if name.endswith("-gpt"):
            self.model = as_large_as(count(self.model), context=context, **SIZES)
        self.optimizers = make_optimizers(self.model, lr=6e-4, weight_decay=0.1)

    def step(self, tokens: Tensor) -> None:
        hidden, _ = self.model(tokens[:, :-1], output="hidden")
        linear_cross_entropy(hidden, self.model.head.weight, tokens[:, 1:]).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def seconds(self, tokens: Tensor) -> float:
        start = time.perf_counter()
        self.step(tokens)
        return time.perf_counter() - start


def random_tokens(B: int, T: int) -> Tensor:
    return torch.randint(SIZES["vocab_size"], (B, T + 1), generator=torch.Generator().manual_seed(0))


def compare(name: str, B: int, T: int, rounds: int, recompute: str) -> str:
    tokens = random_tokens(B, T)
    pair = Training(name, T, recompute), Training(f"{name}-gpt", T, recompute)
    for training in pair:
        training.step(tokens)
    times = [[training.seconds(tokens) for training in pair] for _ in range(rounds)]
    ratio = statistics.median(gpt / ours for ours, gpt in times)
    ours, gpt = (B * T / min(column) for column in zip(*times, strict=True))
    sizes = [f"{count(training.model) / 1e6:.1f} M" for training in pair]
    return f"{name} ({sizes[0]}) {ours:5.0f} tokens/s, GPT ({sizes[1]}) {gpt:5.0f}: {ratio:.2f} x"


def peak_bytes_per_token(name: str, B: int, T: int, recompute: str) -> float:
    """Of this process, which must be fresh."""
    training = Training(name, T, recompute)
    training.step(random_tokens(1, 16))  # gradients and moments are there
    before = _memory("VmRSS")
    training.step(random_tokens(B, T))
    return (_memory("VmHWM") - before) / (B * T)


def _memory(field: str) -> int:
    """Bytes that the kernel counts for this process: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def memory_in_a_fresh_process(name: str, B: int, T: int, args: argparse.Namespace) -> float:
    command = [sys.executable, __file__, "--threads", str(args.threads), "--recompute", args.recompute]
    command += ["--measure-memory", name, str(B), str(T)]
    return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


# An operation belongs to the outermost of these that it runs inside of ...
INSIDE = {
    "Optimizer.step": "optimizer",
    "LinearCrossEntropy": "head and loss",
    "wkv::": "wkv operator",
    "scaled_dot_product": "attention",
    "_norm": "norms",
}
# ... and otherwise to the kind of its own name.
KINDS = {
    "matrix products": ("mm", "matmul", "linear", "einsum"),
    "copies": ("copy", "cat", "clone", "contiguous", "fill", "zero", "pad", "stack", "index"),
    "embedding": ("embedding",),
}


def kind_of(event: torch.autograd.profiler_util.FunctionEvent) -> str:
    names = [event.name]
    while (event := event.cpu_parent) is not None:
        names.append(event.name)
    for name in reversed(names):
        for part, kind in INSIDE.items():
            if part in name:
                return kind
    for kind, parts in KINDS.items():
        if any(part in names[0] for part in parts):
            return kind
    return "elementwise" if names[0].startswith("aten::") else "overhead"


def breakdown(name: str, B: int, T: int, recompute: str) -> str:
    training, tokens = Training(name, T, recompute), random_tokens(B, T)
    training.step(tokens)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        training.step(tokens)
    times: Counter[str] = Counter()
    for event in profiler.events():
        times[kind_of(event)] += event.self_cpu_time_total
    total = times.total()
    shares = ", ".join(f"{kind} {100 * used / total:.0f} %" for kind, used in times.most_common())
    return f"{name} ({total / 1e6:.1f} s): {shares}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--recompute", choices=("nothing", "cheap", "blocks"), default="cheap")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--measure-memory", nargs=3, metavar=("MODEL", "B", "T"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with kept_memory():  # as the trainer does
        run(args)


def run(args: argparse.Namespace) -> None:
    if args.measure_memory:
        name, B, T = args.measure_memory
        print(peak_bytes_per_token(name, int(B), int(T), args.recompute))
        return
    for B, T in SHAPES:
        print(f"B x T = {B} x {T}", flush=True)
        for name in args.models:
            if args.profile:
                for each in (name, f"{name}-gpt"):
                    print(f"  {breakdown(each, B, T, args.recompute)}", flush=True)
                continue
            print(f"  {compare(name, B, T, args.rounds, args.recompute)}", flush=True)
            if not args.skip_memory:
                ours, gpt = (
                    memory_in_a_fresh_process(each, B, T, args) / 1024 for each in (name, f"{name}-gpt")
                )
                print(f"  {name} {ours:.0f} KiB per token at the peak, GPT {gpt:.0f}", flush=True)


if __name__ == "__main__":
    main()
