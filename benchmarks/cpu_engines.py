"""The processes that `cpu.py` measures: each holds one engine with one model, and does what it is told.

    python benchmarks/cpu_engines.py KIND      one of KINDS, at the end of this file

A line of JSON on stdin is answered by one on stdout: first what the engine is made of, then commands,
{"do": a method, ...}. What libraries print goes to stderr. Every library is imported by the engine that
wants it, because no Python needs to have them all.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODELS: dict[str, tuple[int, str | None]] = {  # generation, published size
    "v7-191M": (7, "0.1B"),
    "v7-0.4B": (7, "0.4B"),
    "v4-169M": (4, "169M"),
    "v7-tiny": (7, None),  # to try the script
}
PROMPT_TOKENS = 512
COMPARED_TOKENS = 32  # whose logits tell whether two engines compute the same function


def tokens(count: int, vocab_size: int) -> list[int]:
    """The same random tokens in every process."""
    chosen = random.Random(0)
    return [chosen.randrange(1, vocab_size) for _ in range(count)]


def median_seconds(run: Callable[[], Any], seconds: float) -> float:
    """The median time of as many calls as fit into `seconds`, of one at least."""
    times: list[float] = []
    while sum(times) < seconds or not times:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Engine:
    """Reads tokens one after the other from the state that it keeps. Subclasses say how."""

    version: str
    vocab_size: int
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def use_threads(self, threads: int) -> None:
        raise NotImplementedError

    def start(self, tokens: Sequence[int]) -> Any:
        """Forget everything, read a prompt at once, return the logits after it (V,)."""
        raise NotImplementedError

    def step(self, token: int) -> Any:
        """Read one more token, return the logits after it (V,)."""
        raise NotImplementedError

    def bytes_per_token(self) -> int:
        """What writing one token must read and write, as `wkv bench` counts it."""
        raise NotImplementedError

    def warm_up(self) -> None:
        """Twice: TorchScript compiles what it sees for the second time."""
        for _ in range(2):
            self.start(tokens(PROMPT_TOKENS, self.vocab_size))
            self.step(1)

    def logits(self, to: str) -> dict[str, Any]:
        """Save the logits (T + 1, V) after each of T tokens, and after all of them read at once."""
        import numpy as np

        read = tokens(COMPARED_TOKENS, self.vocab_size)
        rows = [np.array(self.start(read[:1]))]  # copies: an engine may write the next ones over them
        rows += [np.array(self.step(token)) for token in read[1:]]
        np.save(to, np.stack([*rows, np.array(self.start(read))]))
        return {}

    def measure(self, threads: int, seconds: float, prefill: bool = True) -> dict[str, Any]:
        """Tokens per second of decoding, one by one, and of a prompt; about `seconds` for each."""
        self.use_threads(threads)
        prompt = tokens(PROMPT_TOKENS, self.vocab_size)
        following = itertools.cycle(prompt)
        self.step(next(following))  # wakes the threads
        decode = median_seconds(lambda: self.step(next(following)), seconds)
        read = median_seconds(lambda: self.start(prompt), seconds) if prefill else None
        return {
            "decode": 1 / decode,
            "prefill": None if read is None else PROMPT_TOKENS / read,
            "bytes": self.bytes_per_token(),
        }


class Wkv(Engine):
    """This library. For RWKV-7 also with another share of zeros behind the channel mix's ReLU."""

    def __init__(self, path: str, form: str) -> None:
        import torch

        import wkv
        from wkv.ops import native

        self.context = torch.inference_mode
        dtype = torch.bfloat16 if form == "bf16" else torch.float32
        quantize = form if form in ("int8", "int4") else None
        self.model, _ = wkv.load(path, dtype=dtype, quantize=quantize)
        self.vocab_size = self.model.config.vocab_size
        self.state: Any = None
        self.biases = [block.ln2.bias.detach().clone() for block in self.model.blocks]
        self.shift: dict[float, float] = {}  # share of zeros wanted -> what to fill the biases with
        self.found: dict[float | None, float] = {}  # share of zeros wanted -> the one that there is
        self.version = (
            f"{wkv.__version__} ({native.why_not() or native.engines()[0]}), torch {version('torch')}"
        )

    def use_threads(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)

    def start(self, tokens: Sequence[int]) -> Any:
        self.state = None
        return self._read(tokens)

    def step(self, token: int) -> Any:
        return self._read([token])

    def _read(self, tokens: Sequence[int]) -> Any:
        import torch

        logits, self.state = self.model(torch.tensor([tokens]), self.state, output="last")
        return logits[0, 0].float()

    def measure(
        self, threads: int, seconds: float, prefill: bool = True, zeros: float | None = None
    ) -> dict[str, Any]:
        self._set_zeros(zeros)
        self.zeros = zeros
        return super().measure(threads, seconds, prefill) | {"zeros": self._share_of_zeros()}

    def bytes_per_token(self) -> int:
        from wkv.cli.bench import bytes_per_token

        return bytes_per_token(self.model, self.state, self._share_of_zeros())

    def _share_of_zeros(self) -> float:
        if self.zeros not in self.found:
            self.found[self.zeros] = self._zeros_of(PROMPT_TOKENS)
        return self.found[self.zeros]

    def _zeros_of(self, count: int) -> float:
        import torch

        from wkv.cli.bench import share_of_zeros

        return share_of_zeros(self.model, torch.tensor([tokens(count, self.vocab_size)]))

    def _set_zeros(self, wanted: float | None) -> None:
        """Move all hidden units up or down, see `Weights`, until that share is not above zero."""
        if wanted is None:
            for block, bias in zip(self.model.blocks, self.biases, strict=True):
                block.ln2.bias.copy_(bias)
            return
        if wanted not in self.shift:
            low, high = -2.0, 2.0  # nearly all are zero, none is
            for _ in range(10):
                middle = (low + high) / 2
                self._fill_biases(middle)
                low, high = (middle, high) if self._zeros_of(32) > wanted else (low, middle)
            self.shift[wanted] = high
        self._fill_biases(self.shift[wanted])

    def _fill_biases(self, value: float) -> None:
        for block in self.model.blocks:
            block.ln2.bias.fill_(value)


class Rwkv(Engine):
    """The official package at its best on a CPU: float32, with its TorchScript switched on."""

    def __init__(self, path: str, generation: int) -> None:
        os.environ.update(RWKV_JIT_ON="1", RWKV_CUDA_ON="0", RWKV_V7_ON="1" if generation == 7 else "0")
        name = path.removesuffix(".pth")
        module = importlib.import_module("rwkv.model")
        if generation == 7:
            self.model = module.RWKV_x070(name, "cpu fp32")
            self.weights = self.model.z
        else:
            self.model = module.RWKV(name, "cpu fp32", verbose=False)
            self.weights = self.model.w
        self.state: Any = None
        self.vocab_size = len(self.weights["emb.weight"])
        self.version = f"{version('rwkv')}, torch {version('torch')}"

    use_threads = Wkv.use_threads

    def start(self, tokens: Sequence[int]) -> Any:
        logits, self.state = self.model.forward(list(tokens), None)
        return logits

    def step(self, token: int) -> Any:
        logits, self.state = self.model.forward([token], self.state)
        return logits

    def bytes_per_token(self) -> int:
        weights = sum(w.nbytes for name, w in self.weights.items() if name != "emb.weight")
        return weights + 2 * sum(part.nbytes for part in self.state)


class LlamaCpp(Engine):
    """llama.cpp through the C interface of `llama-cpp-python`, which adds next to nothing per token."""

    def __init__(self, path: str) -> None:
        import gguf
        import llama_cpp as c

        self.c = c
        c.llama_backend_init()
        self.model = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        wanted = c.llama_context_default_params()
        wanted.n_ctx, wanted.n_batch, wanted.n_ubatch = 2**20, PROMPT_TOKENS, PROMPT_TOKENS
        self.handle = c.llama_init_from_model(self.model, wanted)
        if not self.handle:
            raise RuntimeError(f"llama.cpp makes no context for {path}")
        stored = gguf.GGUFReader(path).tensors
        self.weights = sum(int(t.n_bytes) for t in stored if not t.name.startswith("token_embd."))
        self.vocab_size = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        self.version = f"of llama-cpp-python {c.__version__}, gguf {version('gguf')}"

    def use_threads(self, threads: int) -> None:
        self.c.llama_set_n_threads(self.handle, threads, threads)

    def start(self, tokens: Sequence[int]) -> Any:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.handle), True)
        return self._read(tokens)

    def step(self, token: int) -> Any:
        return self._read([token])

    def _read(self, tokens: Sequence[int]) -> Any:
        import numpy as np

        c, count = self.c, len(tokens)
        ids = (c.llama_token * count)(*tokens)  # the batch points to it
        if status := c.llama_decode(self.handle, c.llama_batch_get_one(ids, count)):
            raise RuntimeError(f"llama_decode returned {status}")
        logits = c.llama_get_logits_ith(self.handle, -1)  # waits until they are there
        return np.ctypeslib.as_array(logits, (self.vocab_size,))

    def bytes_per_token(self) -> int:
        return self.weights + 2 * self.c.llama_state_seq_get_size(self.handle, 0)


class Memory:
    """How fast this machine reads memory now, as `wkv bench` measures it."""

    version = "measured"
    context = contextlib.nullcontext

    def warm_up(self) -> None:
        """Nothing to do: the measurement takes the best of several passes."""

    def bandwidth(self, threads: int) -> dict[str, Any]:
        import torch

        from wkv.cli.bench import read_bandwidth

        torch.set_num_threads(threads)
        return {"bandwidth": read_bandwidth(torch.device("cpu"))}


def config_of(model: str) -> Any:
    from wkv.config import CONFIGS

    generation, size = MODELS[model]
    if size is None:
        return CONFIGS[generation].of_size(vocab_size=512, n_layer=3, n_embd=256)
    return CONFIGS[generation].named(size)


def write_weights(model: str, folder: str) -> dict[str, Any]:
    """Random weights for all engines: weights.pth, weights.npz, and logits.npy, what float32 makes of them.

    RWKV-7's `ffn.key` gets the same small number everywhere. What it multiplies comes from a norm and sums to
    nearly zero, so that changes next to nothing; but a constant `ln2.bias` now moves all hidden units alike.
    """
    import numpy as np
    import torch

    import wkv
    from wkv.cli.quantize_report import random_model

    config = config_of(model)
    network = random_model(config)
    if config.generation == 7:
        with torch.no_grad():
            for block in network.blocks:
                block.ffn.key.weight += block.ffn.key.weight.std() / 4
    place = Path(folder)
    wkv.save(network, place / "weights.pth")
    np.savez(place / "weights.npz", **{name: w.detach().numpy() for name, w in network.named_parameters()})
    engine = Wkv(str(place / "weights.pth"), "float32")
    with engine.context():
        engine.logits(str(place / "logits.npy"))
    return {"parameters": sum(weight.numel() for weight in network.parameters())}


def write_ggufs(folder: str) -> dict[str, Any]:
    """f16.gguf out of weights.npz, and out of that Q8_0.gguf and Q4_0.gguf, by llama.cpp's own quantiser."""
    import llama_cpp as c
    import numpy as np
    from rwkv7_gguf import write_gguf

    place = Path(folder)
    with np.load(place / "weights.npz") as file:
        write_gguf(place / "f16.gguf", dict(file))
    for form, kind in {"Q8_0": c.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": c.LLAMA_FTYPE_MOSTLY_Q4_0}.items():
        how = c.llama_model_quantize_default_params()
        how.ftype = kind
        source, target = place / "f16.gguf", place / f"{form}.gguf"
        if status := c.llama_model_quantize(str(source).encode(), str(target).encode(), how):
            raise RuntimeError(f"llama_model_quantize returned {status} for {form}")
    return {}


KINDS: dict[str, Callable[..., Any]] = {
    "weights": write_weights,
    "ggufs": write_ggufs,
    "memory": Memory,
    "wkv": Wkv,
    "rwkv": Rwkv,
    "llama.cpp": LlamaCpp,
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")

    def answer(told: dict[str, Any]) -> None:
        print(json.dumps(told), file=answers, flush=True)

    made = KINDS[sys.argv[1]](**json.loads(sys.stdin.readline()))
    if isinstance(made, dict):  # work that is done
        answer(made)
        return
    with made.context():
        made.warm_up()
        answer({"version": made.version})
        for line in sys.stdin:
            command = json.loads(line)
            answer(getattr(made, command.pop("do"))(**command))


if __name__ == "__main__":
    main()
