"""`wkv bench`: how fast a model reads and writes here, beside what the memory of this machine allows.

Writing one token reads every weight once (of the embedding table one row only, of the channel mix's last
matrix what meets no zero) and reads and writes the state. So bytes / bandwidth is the least time per token
that any program could take at this precision, unless the processor's caches hold the model.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ..config import CONFIGS, Config
from .common import (
    MODEL_DEFAULTS,
    ModelFlags,
    find_model,
    human_bytes,
    load_model,
    note,
    print_line,
    torch_dtype,
    use_device,
    use_threads,
)

if TYPE_CHECKING:
    import torch

    from ..models import RWKV
    from ..state import State

PROMPT_TOKENS = 512
LARGEST_BUFFER = 2**30  # bytes: far beyond any cache
BUDGET = 4.0  # seconds per figure


def bench(
    model: str | None = None,
    /,
    *,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
    how: ModelFlags = MODEL_DEFAULTS,
) -> None:
    """Measure speed, beside what this machine's memory allows.

    Prefill reads a prompt of 512 tokens at once; decode writes token after token. Both are medians.

    Examples:

        wkv bench model.pth --threads 2
        wkv bench model.pth --dtype bf16 --json
        wkv bench rwkv7-0.1b
        wkv bench rwkv4-169m --threads 1

    Parameters
    ----------
    model
        a checkpoint, or the name of a published size, which is then built with random weights; without it,
        the model that comes with wkv
    as_json
        print one JSON object instead
    """
    name, network = load_or_build(model, how)
    note("measuring, for about 10 seconds")
    figures = measure(network)
    if as_json:
        print(json.dumps({"model": name, **figures}))
        return
    threads, device = figures["threads"], figures["device"]
    form = figures["quantization"] or figures["dtype"]
    print_line(f"{name}: {figures['parameters']:,} parameters, {form}, {threads} threads on {device}")
    print_line(f"  prefill  {figures['prefill_tokens_per_second']:.1f} tokens/s ({PROMPT_TOKENS} tokens)")
    print_line(f"  decode   {figures['decode_tokens_per_second']:.1f} tokens/s")
    print_line(f"  zeros    {figures['zeros']:.0%} of the channel mix's hidden units")
    print_line(
        f"  moved    {human_bytes(figures['bytes_per_token'])} per token, "
        f"{human_bytes(figures['bytes_per_token_unskipped'])} if zeros were multiplied too"
    )
    print_line(f"  memory   {human_bytes(figures['bandwidth_bytes_per_second'])}/s, measured now")
    print_line(f"  efficiency  {figures['efficiency']:.2f}: least time / measured time of a token")


def load_or_build(name: str | None, how: ModelFlags) -> tuple[str, RWKV]:
    """A file where there is one; else a published size, such as rwkv7-0.1b, with random weights."""
    config = published_size(name)
    if config is None:
        path = find_model(name)
        return str(path), load_model(path, how)[0]
    use_threads(how.threads)
    import torch

    from ..models import build
    from ..models.arena import gather
    from ..models.quantized import quantize

    dtype = torch_dtype(how.dtype) or torch.float32
    model = build(config, device=use_device(how.device), dtype=dtype)
    if how.quantize is not None:
        quantize(model, how.quantize)
    if model.device.type == "cpu":
        gather(model)  # where `load` would have put it
    return f"{name} with random weights", model


def published_size(name: str | None) -> Config | None:
    """The config of a size such as rwkv7-0.1b; None for any other name, and where there is such a file."""
    known = re.fullmatch(r"rwkv([4-7])-([\d.]+[mb])", name or "", re.IGNORECASE)
    if name is None or known is None or Path(name).exists():
        return None
    return CONFIGS[int(known[1])].named(known[2])


def measure(model: RWKV) -> dict[str, Any]:
    """The figures of a model on the device and with the threads that it runs on now."""
    import torch

    from ..models import build

    tokens = _prompt(model)
    with torch.inference_mode():
        _, state = model(tokens, output="last")
        prefill = _median_seconds(lambda: model(tokens, output="last"), model.device)
    decode = decode_seconds(model)
    zeros = share_of_zeros(model, tokens)
    moved = bytes_per_token(model, state, zeros)
    bandwidth = read_bandwidth(model.device)
    return {
        "parameters": sum(weight.numel() for weight in build(model.config, device="meta").parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "prefill_tokens": PROMPT_TOKENS,
        "prefill_tokens_per_second": PROMPT_TOKENS / prefill,
        "decode_tokens_per_second": 1 / decode,
        "state_bytes": state.nbytes,
        "quantization": model.quantization,
        "zeros": zeros,
        "bytes_per_token": moved,
        "bytes_per_token_unskipped": bytes_per_token(model, state, zeros=0.0),
        "bandwidth_bytes_per_second": bandwidth,
        "efficiency": moved / bandwidth / decode,
    }


def bytes_per_token(model: RWKV, state: State, zeros: float) -> int:
    """What writing one token reads and writes, where this share of the hidden units is zero: see above."""
    weights = sum(weight.nbytes for name, weight in model.state_dict().items() if name != "emb.weight")
    sparse = sum(_bytes(matrix) for matrix in _sparse_matrices(model))
    return weights + 2 * state.nbytes - int(zeros * sparse if _skips(model) else 0)


def decode_seconds(model: RWKV) -> float:
    """The median time of one token after a prompt."""
    import torch

    tokens = _prompt(model)
    with torch.inference_mode():
        _, state = model(tokens, output="last")
        return _median_seconds(lambda: model(tokens[:, :1], state), model.device)


def _prompt(model: RWKV) -> torch.Tensor:
    """Tokens (1, PROMPT_TOKENS) drawn by lot, always the same."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, PROMPT_TOKENS), generator=generator).to(model.device)


def share_of_zeros(model: RWKV, tokens: torch.Tensor) -> float:
    """How many of the channel mixes' hidden units are zero while the model reads `tokens`, on average."""
    found: list[float] = []
    hooks = [
        matrix.register_forward_pre_hook(
            lambda _, inputs: found.append(float((inputs[0] == 0).float().mean()))
        )
        for matrix in _sparse_matrices(model)
    ]
    try:
        model(tokens, output="last")
    finally:
        for hook in hooks:
            hook.remove()
    return sum(found) / len(found)


def _skips(model: RWKV) -> bool:
    """Whether what meets a zero is left unread: the compiled engine does."""
    from ..models.compiled import why_not

    return why_not(model) is None


def _sparse_matrices(model: RWKV) -> list[torch.nn.Module]:
    return [model.get_submodule(f"blocks.{i}.ffn.value") for i in range(model.config.n_layer)]


def _bytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of reading memory: the best of several matrix-vector products over up to 1 GiB.

    That product is what decoding consists of, and the fastest read that torch has; where the compiled engine
    runs, its plain sum is faster, and counts. In huge pages, as weights lie. With little memory free, a
    quarter of it.
    """
    import torch

    from ..models.arena import Arena
    from ..ops import native

    rows = max(1, min(LARGEST_BUFFER, _free_memory(device) // 4) // (4 * 4096))
    shape = torch.empty(rows, 4096, device="meta")
    on_cpu = device.type == "cpu"
    matrix = Arena.like(shape).empty_like(shape) if on_cpu else torch.empty_like(shape, device=device)
    matrix.fill_(1)
    if on_cpu and native.why_not() is None:
        return matrix.nbytes / min(_seconds(lambda: native.total(matrix), device) for _ in range(8))
    vector = torch.ones(4096, device=device)
    return matrix.nbytes / min(_seconds(lambda: matrix.mv(vector), device) for _ in range(8))


def _free_memory(device: torch.device) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 4 * LARGEST_BUFFER  # not Linux: assume that a buffer of full size fits


def _median_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The median of as many runs as fit into BUDGET seconds, at least 3, after one to warm up."""
    run()
    times = [_seconds(run, device) for _ in range(3)]
    while sum(times) < BUDGET:
        times.append(_seconds(run, device))
    return median(times)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    import torch

    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # launches return before the work is done
    return time.perf_counter() - start
