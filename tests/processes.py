"""Several processes at once, for tests/test_distributed.py. Run as a script it is one of them.

    succeed(2, tmp_path, [{"folder": "a", "arch": "RWKV4", "parallel": "shard"}, ...])

Each process trains one run after another; what they leave is in the runs' folders.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from train_runs import trainer

from wkv.errors import Error


def start(size: int, folder: Path, jobs: list[dict]) -> list[subprocess.Popen]:
    """One process per rank. They meet over a file in `folder`: no port that another test may take."""
    folder.mkdir(exist_ok=True)
    meeting = folder / f"meeting-{len(list(folder.iterdir()))}"
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(size), str(meeting), json.dumps(jobs)],
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def end(processes: list[subprocess.Popen]) -> list[str]:
    """Wait for all; what each wrote to stderr."""
    return [process.communicate()[1] for process in processes]


def succeed(size: int, folder: Path, jobs: list[dict]) -> None:
    processes = start(size, folder, jobs)
    errors = end(processes)
    assert not any(process.returncode for process in processes), "\n".join(errors)


def interfere(run, step: int, what: str) -> None:
    """When the run takes its `step`-th batch, send this process a signal, or make the loss infinite."""
    take, forward = run.batches.next, run.objective.forward
    taken = 0

    def next_batch():
        nonlocal taken
        taken += 1
        if taken == step and what.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, what))
        return take()

    def poisoned(*inputs):
        loss, state = forward(*inputs)
        return (loss * float("inf") if taken == step and what == "poison" else loss), state

    run.batches.next, run.objective.forward = next_batch, poisoned


def first_gradients(run) -> dict:
    """In float64: the loss of the first batch and the gradient of each weight."""
    run.model.double()
    loss, _ = run._gradients(run.batches.next())
    weights = run.model.named_parameters()
    return {
        "loss": torch.tensor(loss, dtype=torch.float64),
        **{name: weight.grad.contiguous() for name, weight in weights},
    }


def main(rank: int, size: int, meeting: str, jobs: list[dict]) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=200)
    )
    for job in jobs:
        victim, *interference = job.pop("interfere", (None,))
        gradients, refused = job.pop("gradients", None), job.pop("refused", None)
        run = trainer(job.pop("folder", None), **job)
        if rank == victim:
            interfere(run, *interference)
        if refused is not None:
            with pytest.raises(Error) as caught:
                run.fit()
            Path(f"{refused}-{rank}.txt").write_text(str(caught.value))
            continue
        if gradients is None:
            run.fit()
        elif (found := first_gradients(run)) and rank == 0:
            save_file(found, gradients)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
