"""How fast wkv decodes and reads prompts on a CPU, in every format, beside its peers in the same run.

    make bench-peers                                  with llama.cpp, built for this processor, in .venv-peers
    python benchmarks/cpu.py [--models v7-191M] [--formats float32,int4] [--threads 1,2] [--rounds 5]
                             [--seconds 2] [--markdown FILE] [--llama-python PATH]

Peers: the official package `rwkv` (float32), llama.cpp (f16, Q8_0, Q4_0; RWKV-7 only). All get the same
random weights, and a peer's speed is set in relation to wkv's only where their logits agree. Each engine has
a process of its own, and they are measured one at a time and in rounds, all of them in each: whatever else
the machine does, it does to all. Tables hold medians over the rounds; a ratio is the median of the rounds'.

decode      tokens/s, one after the other, batch 1
prefill     tokens/s of a prompt of 512
MB/token    what writing a token reads and writes: weights and state, without what wkv skips (see `wkv bench`)
efficiency  the least time in which the memory, measured just before, could deliver that, over the time taken
noise       the largest share of the processor's time that others took while this was measured

RWKV-7 is also decoded with 87 % zeros behind the ReLU of its channel mix, which wkv does not multiply, and
with none: the engine has no switch for all formats that would turn skipping off, so all hidden units are made
positive instead. Wants an idle machine with 10 GB of free memory and 6 GB of free disk space.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from cpu_engines import COMPARED_TOKENS, MODELS
from numpy.typing import NDArray

from wkv.checkpoints import atomic_write

HERE = Path(__file__).resolve().parent
LLAMA_PYTHON = HERE.parent / ".venv-peers" / "bin" / "python"
MODELS_BY_DEFAULT = ["v7-191M", "v7-0.4B", "v4-169M"]
PEERS = {  # of the same number of bits
    "float32": ("rwkv", "float32"),
    "bf16": ("llama.cpp", "f16"),
    "int8": ("llama.cpp", "Q8_0"),
    "int4": ("llama.cpp", "Q4_0"),
}
INSTALL = {"rwkv": "pip install rwkv", "llama.cpp": "make bench-peers"}
ZEROS = 0.87
MOST_NOISE = 0.05
MOST_BYTES = 8e9  # of the engines that are kept at the same time
# Least cosine of the logits with those of wkv in float32. Two token mixes in the wrong order give 0.99, f16
# 0.99999. With fewer bits rounding alone costs more: there the f16 file, of which they are made, counts too.
LEAST_COSINE = {"float32": 0.9999, "f16": 0.9999, "bf16": 0.998}
LEAST_COSINE |= {"int8": 0.98, "Q8_0": 0.98, "int4": 0.7, "Q4_0": 0.7}
LLAMA_WHOLE = "llama.cpp", "f16"
# Bytes per parameter at most, while loading (the official package transposes).
FOOTPRINT = {"float32": 4, "bf16": 2, "f16": 2, "int8": 2, "Q8_0": 1.2, "int4": 1.5, "Q4_0": 0.7, "rwkv": 10}
OF_A_PROCESS = 3e8


class Engine(NamedTuple):
    name: str  # of cpu_engines.KINDS
    form: str

    def __str__(self) -> str:
        return f"{self.name} {self.form}"


@dataclass(frozen=True)
class Record:
    """What one measurement found."""

    model: str
    engine: Engine
    threads: int
    round: int
    decode: float  # tokens/s
    prefill: float | None  # tokens/s
    bytes: int  # per token
    bandwidth: float  # bytes/s
    noise: float | None  # share of the processor's time; None where it cannot be known
    wanted_zeros: float | None = None  # None: what random weights give
    zeros: float | None = None

    @property
    def efficiency(self) -> float:
        return self.bytes / self.bandwidth * self.decode


# --- processes ----------------------------------------------------------------------------------------------


class Process:
    """An engine of `cpu_engines.py` in a process of its own. `told`: what it said when it was ready."""

    def __init__(self, python: str, kind: str, **options: Any) -> None:
        self.kind = kind
        self.log: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  gone with this object
        self.child = subprocess.Popen(
            [python, str(HERE / "cpu_engines.py"), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.told = self._ask(options)

    def do(self, what: str, **options: Any) -> dict[str, Any]:
        return self._ask({"do": what, **options})

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self.child.stdin is not None and self.child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(command), file=self.child.stdin, flush=True)
        if line := self.child.stdout.readline():
            return json.loads(line)
        self.close()
        self.log.seek(0)
        raise SystemExit(f"{self.kind} ended with status {self.child.returncode}:\n{self.log.read()[-3000:]}")

    def close(self) -> None:
        assert self.child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.close()
        self.child.wait()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- noise --------------------------------------------------------------------------------------------------


class Clock(NamedTuple):
    """Ticks of all processors together since the start of the machine, and of the benchmark's processes."""

    total: int
    busy: int
    own: int


def read_clock(stat: str, own: Iterable[str]) -> Clock:
    """Out of /proc/stat and the /proc/PID/stat of the own processes."""
    ticks = [int(field) for field in stat.split("\n", 1)[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    spent = (line.rpartition(")")[2].split() for line in own)  # names of programs may hold spaces
    return Clock(sum(ticks), sum(ticks) - idle, sum(int(fields[11]) + int(fields[12]) for fields in spent))


def clock(processes: Iterable[Process]) -> Clock | None:
    pids = [os.getpid(), *(process.child.pid for process in processes)]
    try:
        return read_clock(
            Path("/proc/stat").read_text(), [Path(f"/proc/{pid}/stat").read_text() for pid in pids]
        )
    except OSError:
        return None  # not Linux


def others(before: Clock | None, after: Clock | None) -> float | None:
    """The share of all processors' time that went to other processes, and to other virtual machines."""
    if before is None or after is None:
        return None
    spent = Clock(*(b - a for a, b in zip(before, after, strict=True)))
    return max(0.0, (spent.busy - spent.own) / max(1, spent.total))


# --- measuring ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    formats: list[str]
    threads: list[int]
    rounds: int
    seconds: float
    pythons: dict[str, str]  # of the engines that are installed


def engines_for(model: str, form: str, plan: Plan) -> list[Engine]:
    """wkv, and the peer of as many bits where there is one."""
    peer = Engine(*PEERS[form])
    found = peer.name in plan.pythons and (peer.name == "rwkv" or MODELS[model][0] == 7)
    return [Engine("wkv", form), *([peer] if found else [])]


def batches(groups: Sequence[list[Engine]], parameters: int, most: float = MOST_BYTES) -> list[list[Engine]]:
    """As many groups at the same time as memory allows; engines that are compared stay together."""
    found: list[list[Engine]] = []
    room = 0.0
    for group in groups:
        need = sum(parameters * FOOTPRINT.get(e.name, FOOTPRINT[e.form]) + OF_A_PROCESS for e in group)
        if need > room:
            found.append([])
            room = most
        found[-1] += group
        room -= need
    return found


def measure_model(model: str, plan: Plan) -> tuple[list[Record], dict[Engine, float], dict[str, str]]:
    """All records of a model, the cosine of each engine's logits with wkv's in float32, and versions."""
    records: list[Record] = []
    cosines: dict[Engine, float] = {}
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="wkv-bench-") as folder:
        progress(f"{model}: random weights")
        with Process(sys.executable, "weights", model=model, folder=folder) as weights:
            parameters = weights.told["parameters"]
        expected = np.load(Path(folder) / "logits.npy")
        groups = [engines_for(model, form, plan) for form in plan.formats]
        if any(engine.name == "llama.cpp" for group in groups for engine in group):
            progress(f"{model}: f16, Q8_0 and Q4_0 for llama.cpp")
            Process(plan.pythons["llama.cpp"], "ggufs", folder=folder).close()
            whole = Engine(*LLAMA_WHOLE)
            with start(whole, model, folder, plan) as process:
                cosines[whole] = compare(process, expected, folder)
        for batch in batches(groups, parameters):
            with contextlib.ExitStack() as stack:
                memory = stack.enter_context(Process(sys.executable, "memory"))
                running: dict[Engine, Process] = {}
                for engine in batch:
                    progress(f"{model}: loading {engine}")
                    process = running[engine] = stack.enter_context(start(engine, model, folder, plan))
                    versions[engine.name] = process.told["version"]
                    cosines[engine] = compare(process, expected, folder)
                    progress(f"{model}: {engine}: cosine with wkv float32 {cosines[engine]:.6f}")
                records += measure_rounds(model, plan, memory, running)
    return records, cosines, versions


def start(engine: Engine, model: str, folder: str, plan: Plan) -> Process:
    python = plan.pythons[engine.name]
    if engine.name == "llama.cpp":
        return Process(python, engine.name, path=f"{folder}/{engine.form}.gguf")
    more = {"form": engine.form} if engine.name == "wkv" else {"generation": MODELS[model][0]}
    return Process(python, engine.name, path=f"{folder}/weights.pth", **more)


def compare(process: Process, expected: NDArray, folder: str) -> float:
    """The least cosine of the logits after a token, read one by one or at once, with the expected ones."""
    path = f"{folder}/compared.npy"
    process.do("logits", to=path)
    return least_cosine(np.load(path), expected)


def least_cosine(found: NDArray, expected: NDArray) -> float:
    """Row by row, of two arrays (T, V)."""
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((found * expected).sum(axis=1) / lengths).min())


def measure_rounds(model: str, plan: Plan, memory: Process, running: dict[Engine, Process]) -> list[Record]:
    records = []
    own = [memory, *running.values()]
    for number in range(plan.rounds):
        for threads in plan.threads:
            for engine, process in running.items():
                for zeros in shares_of_zeros(model, engine):
                    bandwidth = memory.do("bandwidth", threads=threads)["bandwidth"]
                    options: dict[str, Any] = {"threads": threads, "seconds": plan.seconds}
                    if zeros is not None:
                        options |= {"zeros": zeros, "prefill": False}
                    before = clock(own)
                    told = process.do("measure", **options)
                    noise = others(before, clock(own))
                    record = Record(
                        model,
                        engine,
                        threads,
                        number,
                        bandwidth=bandwidth,
                        noise=noise,
                        wanted_zeros=zeros,
                        **told,
                    )
                    records.append(record)
                    progress(told_of(record))
    return records


def shares_of_zeros(model: str, engine: Engine) -> list[float | None]:
    return [None, ZEROS, 0.0] if engine.name == "wkv" and MODELS[model][0] == 7 else [None]


def told_of(record: Record) -> str:
    what = f"{record.model}: round {record.round + 1}, {record.engine} on {record.threads} threads"
    what += "" if record.wanted_zeros is None else f", {record.zeros:.0%} zeros"
    what += f": {record.decode:.1f} tokens/s"
    what += "" if record.prefill is None else f", prompt {record.prefill:.1f}"
    loud = record.noise is not None and record.noise > MOST_NOISE
    return what + (f" (WARNING: others took {record.noise:.0%} of the processor)" if loud else "")


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- tables -------------------------------------------------------------------------------------------------


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def median(records: Iterable[Record], of: Callable[[Record], float | None]) -> float | None:
    """None when there is nothing to take it of."""
    found = [value for record in records if (value := of(record)) is not None]
    return statistics.median(found) if found else None


def ratio(
    ours: Sequence[Record], theirs: Sequence[Record], of: Callable[[Record], float | None]
) -> float | None:
    """The median over the rounds of ours / theirs; None when they share no round."""
    by_round = {record.round: of(record) for record in theirs}
    ratios = [
        mine / other
        for record in ours
        if (mine := of(record)) is not None and (other := by_round.get(record.round)) is not None
    ]
    return statistics.median(ratios) if ratios else None


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


Group = tuple[str, Engine, int, float | None]  # model, engine, threads, wanted zeros


def grouped(records: Iterable[Record]) -> dict[Group, list[Record]]:
    groups: dict[Group, list[Record]] = {}
    for record in records:
        key = record.model, record.engine, record.threads, record.wanted_zeros
        groups.setdefault(key, []).append(record)
    return groups


def speeds(records: Iterable[Record]) -> str:
    """The table of what each engine does."""
    rows = []
    for (model, engine, threads, wanted), group in grouped(records).items():
        if wanted is not None:
            continue
        noises = [record.noise for record in group if record.noise is not None]
        rows.append(
            [
                model,
                engine.name,
                engine.form,
                str(threads),
                number(median(group, lambda r: r.decode), 1),
                number(median(group, lambda r: r.prefill), 1),
                number(median(group, lambda r: r.bytes / 1e6), 0),
                number(median(group, lambda r: r.efficiency), 2),
                f"{max(noises):.0%}" if noises else "-",
            ]
        )
    heads = (
        "model",
        "engine",
        "format",
        "threads",
        "decode tok/s",
        "prefill tok/s",
        "MB/token",
        "efficiency",
        "noise",
    )
    return table(heads, rows)


def ratios(records: Iterable[Record], cosines: dict[tuple[str, Engine], float]) -> str:
    """The table of wkv / peer, where both compute the same function."""
    rows = []
    groups = grouped(records)
    for (model, engine, threads, wanted), ours in groups.items():
        peer = Engine(*PEERS[engine.form]) if engine.name == "wkv" else engine
        theirs = groups.get((model, peer, threads, None))
        if wanted is not None or engine.name != "wkv" or theirs is None:
            continue
        needed = {engine, peer, *([Engine(*LLAMA_WHOLE)] if peer.name == "llama.cpp" else [])}
        agree = all(cosines[model, each] >= LEAST_COSINE[each.form] for each in needed)
        rows.append(
            [
                model,
                str(engine),
                str(peer),
                str(threads),
                number(ratio(ours, theirs, lambda r: r.decode), 2) if agree else "not the same function",
                number(ratio(ours, theirs, lambda r: r.prefill), 2) if agree else "not the same function",
                " / ".join(f"{cosines[model, each]:.5f}" for each in (engine, peer)),
            ]
        )
    heads = "model", "wkv", "peer", "threads", "decode: wkv / peer", "prefill: wkv / peer", "cosines"
    return table(heads, rows)


def zeros_table(records: Iterable[Record]) -> str:
    """The table of what skipping zeros gives."""
    rows = []
    groups = grouped(records)
    for (model, engine, threads, wanted), many in groups.items():
        if wanted != ZEROS:
            continue
        none = groups[model, engine, threads, 0.0]
        rows.append(
            [
                model,
                engine.form,
                str(threads),
                *(number(median(group, lambda r: r.decode), 1) for group in (many, none)),
                number(ratio(many, none, lambda r: r.decode), 2),
                *(number(median(group, lambda r: r.bytes / 1e6), 0) for group in (many, none)),
                " / ".join(f"{median(group, lambda r: r.zeros):.0%}" for group in (many, none)),
            ]
        )
    heads = (
        "model",
        "format",
        "threads",
        f"decode, {ZEROS:.0%} zeros",
        "none",
        "ratio",
        "MB/token",
        "none",
        "zeros found",
    )
    return table(heads, rows)


def warning(records: Iterable[Record]) -> str:
    """A line about measurements in which others were busy; empty when there was none."""
    records = list(records)
    loud = [record.noise for record in records if record.noise is not None and record.noise > MOST_NOISE]
    if not loud:
        return ""
    return (
        f"**Warning**: in {len(loud)} of {len(records)} measurements other processes took more than "
        f"{MOST_NOISE:.0%} of the processor's time, up to {max(loud):.0%}. Repeat on an idle machine."
    )


def processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


# --- the command --------------------------------------------------------------------------------------------


def installed(llama_python: Path) -> dict[str, str]:
    """The engines that are there, and the Python of each."""
    pythons = {"wkv": sys.executable}
    if importlib.util.find_spec("rwkv"):
        pythons["rwkv"] = sys.executable
    check = [str(llama_python), "-c", "import llama_cpp, gguf"]
    if llama_python.exists() and subprocess.run(check, capture_output=True).returncode == 0:
        pythons["llama.cpp"] = str(llama_python)
    return pythons


def report(
    records: list[Record],
    cosines: dict[tuple[str, Engine], float],
    versions: dict[str, str],
    missing: list[str],
) -> str:
    machine = f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    made_of = "; ".join(f"{name} {what}" for name, what in versions.items())
    parts = [
        f"{datetime.date.today()}, {machine}; {made_of}. `{shlex.join(['python', *sys.argv])}`",
        warning(records),
        *missing,
        speeds(records),
        "Ratios, medians of the rounds' own; cosines are the least of the logits' "
        f"({COMPARED_TOKENS} tokens) with those of wkv in float32:",
        ratios(records, cosines),
        "What skipping zeros behind the channel mix's ReLU gives (elsewhere in this run half are zero):",
        zeros_table(records),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def listed(text: str) -> list[str]:
    return text.split(",")


def counts(text: str) -> list[int]:
    return [int(count) for count in listed(text)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=listed, default=MODELS_BY_DEFAULT, help=f"of {', '.join(MODELS)}")
    parser.add_argument("--formats", type=listed, default=list(PEERS), help=f"of {', '.join(PEERS)}")
    parser.add_argument("--threads", type=counts, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each figure in each round")
    parser.add_argument("--markdown", type=Path, help="write the report there too")
    parser.add_argument("--llama-python", type=Path, default=LLAMA_PYTHON)
    given = parser.parse_args()
    for what, known in [("models", MODELS), ("formats", PEERS)]:
        if unknown := set(getattr(given, what)) - set(known):
            parser.error(f"--{what}: got {', '.join(sorted(unknown))}, expected some of {', '.join(known)}")
    return given


def main() -> None:
    given = arguments()
    plan = Plan(given.formats, given.threads, given.rounds, given.seconds, installed(given.llama_python))
    missing = [
        f"Without {name}, which is not installed: `{how}`."
        for name, how in INSTALL.items()
        if name not in plan.pythons
    ]
    for line in missing:
        progress(line)
    records: list[Record] = []
    cosines: dict[tuple[str, Engine], float] = {}
    versions: dict[str, str] = {}
    for model in given.models:
        found, agreement, made_of = measure_model(model, plan)
        records += found
        cosines |= {(model, engine): cosine for engine, cosine in agreement.items()}
        versions |= made_of
        text = report(records, cosines, versions, missing)
        if given.markdown is not None:  # after every model: an interrupted run leaves what it has
            with atomic_write(given.markdown) as file:
                file.write(text.encode())
    print(text)


if __name__ == "__main__":
    main()
