"""Memory that a step frees is there for the next step, without asking the kernel again."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import contextlib, resource, torch
from wkv.training.memory import kept_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    blocks = [torch.zeros(5 * 2**20) for _ in range(4)]  # 20 MiB each, freed at the end

with {context}:
    for _ in range(20):
        step()  # until the blocks have found their places
    before = faults()
    for _ in range(10):
        step()
    print(faults() - before)
"""


def page_faults(context: str) -> int:
    # Pinned to what glibc begins with: on its own it adjusts, more or less, to what it sees.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
    program = [sys.executable, "-c", PROGRAM.format(context=context)]
    result = subprocess.run(program, capture_output=True, env=environment)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_step_needs_no_new_pages():
    pages = 10 * 4 * 20 * 2**20 // 4096
    assert page_faults("contextlib.nullcontext()") > pages / 2
    assert page_faults("kept_memory()") < pages / 100
