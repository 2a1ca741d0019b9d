"""Memory that a step frees is there for the next step, without asking the kernel again."""

import subprocess
import sys

import pytest

PROGRAM = """
import contextlib, resource, torch
from wkv.training.memory import kept_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    a, b = torch.zeros(2**21), torch.zeros(2**21)  # 8 MiB each, freed at the end

with {context}:
    for _ in range(20):
        step()  # until the blocks have found their places
    before = faults()
    for _ in range(10):
        step()
    print(faults() - before)
"""


def page_faults(context: str) -> int:
    result = subprocess.run([sys.executable, "-c", PROGRAM.format(context=context)], capture_output=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_step_needs_no_new_pages():
    pages = 10 * 2 * 2**23 // 4096
    assert page_faults("contextlib.nullcontext()") > pages / 4
    assert page_faults("kept_memory()") < pages / 100
