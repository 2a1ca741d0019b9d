"""How time grows: with the length of a sequence in training, and with the position in decoding.

    python benchmarks/scaling.py [--threads 2]

Prints, for each generation: the time of forward + backward at T = 512 ... 8192 and the slope of its
logarithm (1 is linear); how many times faster a training step at T = 1024 is than the same model run token
by token; and the time per decoded token at position 10 000 over that at position 100.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import wkv

LENGTHS = [512, 1024, 2048, 4096, 8192]
SIZES = dict(vocab_size=512, n_layer=2, n_embd=256, dim_att=256, dim_ffn=1024)


def configs() -> dict[str, wkv.RWKV4Config | wkv.RWKV5Config | wkv.RWKV6Config | wkv.RWKV7Config]:
    return {
        "rwkv4": wkv.RWKV4Config(**SIZES),
        "rwkv5": wkv.RWKV5Config(**SIZES),
        "rwkv6": wkv.RWKV6Config(**SIZES),
        "rwkv7": wkv.RWKV7Config(**SIZES),
    }


def seconds(call: Callable[[], object], repeat: int = 3) -> float:
    """The median of some runs after a first one."""
    call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    generator = torch.Generator().manual_seed(0)

    for name, config in configs().items():
        model = wkv.build(config)
        tokens = torch.randint(0, 512, (1, max(LENGTHS) + 1), generator=generator)

        def step(T: int) -> None:
            logits, _ = model(tokens[:, :T])  # noqa: B023
            F.cross_entropy(logits[0], tokens[0, 1 : T + 1]).backward()  # noqa: B023

        def step_by_token(T: int) -> None:
            state, losses = None, []
            for t in range(T):
                logits, state = model(tokens[:, t : t + 1], state)  # noqa: B023
                losses.append(F.cross_entropy(logits[0], tokens[0, t + 1 : t + 2]))  # noqa: B023
            torch.stack(losses).mean().backward()

        times = [seconds(lambda T=T: step(T)) for T in LENGTHS]
        slope = statistics.linear_regression(
            [math.log(T) for T in LENGTHS], [math.log(t) for t in times]
        ).slope
        grid = ", ".join(f"T={T} {t:.3f} s" for T, t in zip(LENGTHS, times, strict=True))
        print(f"{name}: forward + backward {grid}")
        print(f"{name}: log-log slope {slope:.3f}")
        ratio = seconds(lambda: step_by_token(1024), repeat=1) / times[LENGTHS.index(1024)]
        print(f"{name}: a training step at T = 1024 is {ratio:.1f} x faster than token by token")
        print(
            f"{name}: time per token at position 10 000 over position 100: {by_position(model):.3f}",
            flush=True,
        )


@torch.no_grad()
def by_position(model: wkv.models.RWKV, window: int = 100, rounds: int = 7) -> float:
    """Time per token after 10 000 tokens over time per token after 100, in turns."""
    tokens = torch.zeros(1, 10_000, dtype=torch.int64)
    _, early = model(tokens[:, :100], output="last")
    _, late = model(tokens, output="last")

    def decode(state: wkv.State) -> float:
        start = time.perf_counter()
        for _ in range(window):
            _, state = model(tokens[:, :1], state)
        return time.perf_counter() - start

    decode(early)
    return statistics.median(decode(late) / decode(early) for _ in range(rounds))


if __name__ == "__main__":
    main()
