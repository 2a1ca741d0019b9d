"""What goes wrong around the compiled engine ends in a clear error or in the same bits, never in a hang."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from small_models import random_tokens, small_model
from torch import Tensor

from wkv.cli import main
from wkv.models import RWKV, compiled
from wkv.models.quantized import quantize
from wkv.ops import native, use_backend
from wkv.state import State

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no engine: {native.why_not()}")
on_unix = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork, no signals")


@pytest.fixture(autouse=True)
def own_number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["4", "7"])
def model(request: pytest.FixtureRequest) -> RWKV:
    return small_model(request.param, dtype=torch.float32)


@torch.no_grad()
def read(
    model: RWKV, tokens: Tensor, state: State | None = None, output: str = "last"
) -> tuple[Tensor, State]:
    with use_backend("native"):
        return model(tokens, state, output=output)


def tensors(state: State) -> list[Tensor]:
    return [tensor for layer in state.layers for tensor in layer]


def equal(a: State, b: State) -> bool:
    return all(map(torch.equal, tensors(a), tensors(b)))


def read_in_pieces(model: RWKV, tokens: Tensor, output: str) -> tuple[Tensor, State]:
    """By calls that are through before anybody looks for a signal."""
    found, state = [], None
    for piece in tokens.split(256, dim=1):
        logits, state = read(model, piece, state, output)
        found.append(logits)
    assert state is not None
    return found[-1] if output == "last" else torch.cat(found, dim=1), state


# --- signals ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def signal_after(seconds: float, handler: Callable[[], None]) -> Iterator[None]:
    """Calls the handler in this thread, as Ctrl-C does."""
    before = signal.signal(signal.SIGUSR1, lambda *_: handler())
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGUSR1, before)


@on_unix
def test_ctrl_c_ends_a_long_prompt_within_a_second_and_leaves_the_state_as_it_was(model: RWKV) -> None:
    torch.set_num_threads(2)
    prompt = random_tokens(model, 1, 10).expand(1, 10)
    first, state = read(model, prompt)
    kept = state.clone()
    expected, _ = read(model, prompt, state)
    came = 0.0

    def stop() -> None:
        nonlocal came
        came = time.perf_counter()
        raise KeyboardInterrupt

    endless = random_tokens(model, 1, 2_000_000)  # minutes
    with signal_after(0.3, stop), pytest.raises(KeyboardInterrupt):
        sent = time.perf_counter() + 0.3
        read(model, endless, state)
    assert came - sent < 2 and time.perf_counter() - came < 1
    assert equal(state, kept) and torch.equal(read(model, prompt, state)[0], expected)
    assert torch.equal(read(model, prompt)[0], first)


@on_unix
def test_a_handler_may_read_tokens_itself_and_wait_for_another_thread_that_does() -> None:
    model, other = small_model("7", dtype=torch.float32), small_model("4", dtype=torch.float32)
    tokens, more = random_tokens(model, 1, 120_000), random_tokens(other, 2, 700)
    logits, state = read_in_pieces(model, tokens, "last")
    expected, _ = read(other, more)
    found: list[Tensor] = []

    def handler() -> None:
        thread = threading.Thread(target=lambda: found.append(read(other, more)[0]))
        thread.start()
        found.append(read(other, more)[0])
        thread.join()

    with signal_after(0.2, handler):
        ours, own = read(model, tokens)
        assert len(found) == 2  # in the middle of the call
    assert torch.equal(ours, logits) and equal(own, state)
    assert torch.equal(found[0], expected) and torch.equal(found[1], expected)


@pytest.mark.parametrize("output", ["last", "logits", "hidden"])
def test_a_call_that_stops_to_look_for_signals_gives_the_same_bits(model: RWKV, output: str) -> None:
    torch.set_num_threads(2)
    tokens = random_tokens(model, 3, 8_000)
    expected, state = read_in_pieces(model, tokens, output)
    began = time.perf_counter()
    found, own = read(model, tokens, output=output)
    assert time.perf_counter() - began > 0.1  # when it looks for the first time
    assert torch.equal(found, expected) and equal(own, state)


# --- threads and processes ----------------------------------------------------------------------------------


def test_numbers_of_threads_that_make_no_sense_are_refused() -> None:
    engine = native._engine()
    x = torch.ones(64)
    for threads in (0, -1, native.MOST_THREADS + 1, 2**31 - 1):
        with pytest.raises(ValueError, match=f"threads is {threads}, not from 1 to 256"):
            engine.handover(1, threads)
        with pytest.raises(ValueError, match="threads"):
            engine.read("portable", x.data_ptr(), 64, threads)
    with pytest.raises(ValueError, match="no engine avx1024"):
        engine.read("avx1024", x.data_ptr(), 64, 1)


def test_a_huge_number_of_threads_is_bounded_and_changes_no_bit(
    model: RWKV, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(model, 2, 9)
    expected, state = read(model, tokens)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 100_000)
    assert native.threads() <= min(4 * (os.cpu_count() or 1), native.MOST_THREADS)
    found, own = read(model, tokens)
    assert torch.equal(found, expected) and equal(own, state)


WITHOUT_THREADS = """
import os, resource, sys, torch
from wkv.ops import native
torch.set_num_threads(1)
native.borrows()
if child := os.fork():  # in the child the engine has threads of its own
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert not native.borrows()
weight, x = torch.randn(640, 64), torch.randn(3, 64)
expected = native.product(x, weight)
native.threads = lambda: 8
used = 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + (12 << 20), -1))  # a thread's stack takes 8 MiB
for _ in range(3):
    assert torch.equal(native.product(x, weight), expected)
def threads():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("Threads"))
assert threads() < 8, threads()
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
assert torch.equal(native.product(x, weight), expected) and threads() >= 8
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_system_that_gives_no_more_threads_gets_the_same_bits_from_those_there_are() -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_THREADS], capture_output=True, text=True, timeout=60
    )
    assert result.stdout == "done\n", result.stderr


FEWER_THREADS = """
import os, torch
from wkv.ops import native
weight, x = torch.randn(640, 64), torch.randn(3, 64)
native.threads = lambda: 1
expected = native.product(x, weight)
def same(*numbers):
    for native.threads in [lambda n=n: n for n in numbers]:
        assert torch.equal(native.product(x, weight), expected)
same(8, 3, 8)  # OpenMP's limit is 2
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
    same(8)
    print("done")
else:
    same(8, *[2, 3] * 50, 8)
"""


@on_unix
def test_a_team_that_is_smaller_than_asked_or_than_before_gives_the_same_bits() -> None:
    result = subprocess.run(
        [sys.executable, "-c", FEWER_THREADS],
        env={**os.environ, "OMP_THREAD_LIMIT": "2"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout == "done\n", result.stderr


@on_unix
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@torch.no_grad()
def test_a_process_may_fork_while_other_threads_use_the_engine() -> None:
    torch.set_num_threads(2)
    model = small_model("7", dtype=torch.float32)
    tokens = random_tokens(model, 1, 40)
    expected, _ = read(model, tokens)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            read(model, tokens)

    team = [threading.Thread(target=work) for _ in range(2)]
    for thread in team:
        thread.start()
    try:
        for _ in range(5):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    status = 0 if torch.equal(read(model, tokens)[0], expected) else 2
                finally:
                    os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        for thread in team:
            thread.join()


# --- what the engine says of itself -------------------------------------------------------------------------

LACKS = "this processor lacks AVX2, FMA or F16C"


def test_a_processor_without_avx2_runs_the_portable_engine(
    model: RWKV, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = random_tokens(model, 2, 9)
    with use_backend("reference"), torch.no_grad():
        expected, _ = model(tokens, output="last")
    monkeypatch.setattr(native, "instruction_sets", lambda: {"avx2": LACKS, "portable": None})
    compiled._KEPT.clear()
    used: list[str] = []
    made = native._engine().Model
    monkeypatch.setattr(native._engine(), "Model", lambda *parts: (used.append(parts[-1]), made(*parts))[1])
    found, _ = read(model, tokens)
    assert used == ["portable"] and torch.allclose(found, expected, atol=1e-5)
    assert main(["info", "--backends"]) == 0
    told = capsys.readouterr().out
    assert "the compiled engine: portable" in told
    assert f"avx2       refuses: {LACKS}\n  portable   runs" in told


def test_a_handover_takes_some_time_and_not_much() -> None:
    assert 0 < native.handover() < 0.1


@pytest.mark.skipif(
    not (native.why_not() is None and native.borrows()), reason="torch's OpenMP is of another kind"
)
def test_the_engine_starts_no_threads_beside_those_of_torch() -> None:
    torch.set_num_threads(3)
    torch.ones(1_000_000).add_(1)
    before = len(os.listdir("/proc/self/task"))
    for _ in range(3):
        native.product(torch.ones(5, 640), torch.ones(640, 640))
        torch.ones(1_000_000).add_(1)
    assert native.threads() == 3 and len(os.listdir("/proc/self/task")) == before


@pytest.mark.parametrize("tier", ["int8", "int4"])
def test_more_threads_than_an_output_has_sums_change_no_bit(
    tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantize(small_model("7", dtype=torch.float32), tier)
    tokens = random_tokens(model, 1, 1)
    monkeypatch.setattr(native, "threads", lambda: 1)
    expected, state = read(model, tokens)
    monkeypatch.setattr(native, "threads", lambda: 19)
    for _ in range(5):
        found, own = read(model, tokens)
        assert torch.equal(found, expected) and equal(own, state)
