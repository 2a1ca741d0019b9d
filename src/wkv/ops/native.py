"""The compiled engine on the CPU: whole models and matrix products, where no gradient is wanted, and the
operators wkv4 to wkv7 forward and backward.

    why_not()             None where it runs, else the reason
    engines()             the instruction sets that this processor has, best first
    instruction_sets()    all that there are, and why one does not run here
    product(x, W)         x W^T
    Model(...)            a whole model; `wkv.models.compiled` builds it
    wkv4, wkv6, wkv7, time_mix7, token_mix, squared_relu
                          the operators on plain tensors; the rows "native" of `wkv.ops` call them

Nothing here is needed: without the extension (an installation without a compiler) torch does it all, more
slowly. Sums are float32 whatever the format of the weights; each row's result is the same, bit for bit,
whatever shares the call with it, however its tokens are split over calls, and for any number of threads.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import Call

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Format of engine.h
QUANTIZED = {8: 3, 4: 4}  # by bits; the same enum
GROUP = 64  # kGroup of quantized.h: numbers that share a scale
ROWS_AT_ONCE = 512  # tokens that go through all blocks together
MOST_THREADS = 256  # Pool::kMostThreads


@functools.cache
def _load() -> ModuleType | str:
    """The extension, or why there is none."""
    try:
        import wkv._native as extension
    except ModuleNotFoundError:
        return (
            "it was not built: installing wkv found no C++ compiler."
            " Try: install wkv again where there is one for C++20, such as g++ 12"
        )
    except ImportError as error:
        return f"it does not load: {error}"
    return extension


def why_not() -> str | None:
    """The reason why the engine cannot run here, None when it can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def instruction_sets() -> dict[str, str | None]:
    """Every one that the engine was compiled for, best first: None, or the reason why this processor does not
    run it. Empty where there is no engine."""
    loaded = _load()
    return {} if isinstance(loaded, str) else dict(loaded.engines())


def engines() -> list[str]:
    """What this processor runs, such as "avx2" and "portable"; empty where there is no engine."""
    return [name for name, reason in instruction_sets().items() if reason is None]


def threads() -> int:
    """As many as torch uses, up to four a core: threads that wait for each other must all get their turn."""
    return min(torch.get_num_threads(), 4 * (os.cpu_count() or 1), MOST_THREADS)


def lies_by_input(weight: Tensor) -> bool | None:
    """How W [out, in] lies in memory: False by output (rows), True by input (columns), None neither."""
    return False if weight.is_contiguous() else True if weight.mT.is_contiguous() else None


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` and `normalized` do it: one format on the CPU, no gradient, nothing that traces."""
    return (
        weight.dtype in FORMATS
        and x.dtype == weight.dtype
        and x.shape[-1:] == weight.shape[-1:]  # else torch says what is wrong
        and _takes(x, weight)
        and (weight.ndim < 2 or lies_by_input(weight) is not None)
    )


def takes_quantized(x: Tensor, weight: Tensor) -> bool:
    """The same for `quantized_product`."""
    return x.dtype in FORMATS and _takes(x, weight)


def _takes(x: Tensor, weight: Tensor) -> bool:
    return (
        weight.device.type == x.device.type == "cpu"
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and why_not() is None
    )


_PLAIN = (Tensor, torch.nn.Parameter)  # not: sharded, fake, quantised by others


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) times W [out, in]: (..., out), in the format of both. `takes` says when."""
    return _product(x, weight, FORMATS[weight.dtype], len(weight), lies_by_input(weight) is True, None)


def quantized_product(
    x: Tensor, weight: Tensor, scales: Tensor, bits: int, outputs: int, by_input: bool
) -> Tensor:
    """The same with W in 8 or 4 bits, as `wkv.models.quantized` stores it; in the format of x."""
    return _product(x, weight, QUANTIZED[bits], outputs, by_input, scales)


def _product(
    x: Tensor, weight: Tensor, form: int, outputs: int, by_input: bool, scales: Tensor | None
) -> Tensor:
    inputs = x.shape[-1]
    rows = x.reshape(-1, inputs).to(torch.float32).contiguous()
    y = torch.empty(len(rows), outputs)
    _engine().multiply(
        engines()[0],
        weight.data_ptr(),
        form,
        inputs,
        outputs,
        by_input,
        0 if scales is None else scales.data_ptr(),
        rows.data_ptr(),
        len(rows),
        y.data_ptr(),
        threads(),
    )
    return converted(y.view(*x.shape[:-1], outputs), x.dtype)


def normalized(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm, or without a bias RMSNorm, of x (..., D), in the format of the weight."""
    rows = x.reshape(-1, len(weight)).to(torch.float32).contiguous()
    y = torch.empty_like(rows)
    _engine().normalize(
        engines()[0],
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        FORMATS[weight.dtype],
        eps,
        rows.data_ptr(),
        len(rows),
        len(weight),
        y.data_ptr(),
        threads(),
    )
    return converted(y.view(x.shape), weight.dtype)


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x float32 in a dtype of FORMATS. By the engine's threads: torch's own would stay awake for a while, in
    the way of what comes next."""
    if dtype == torch.float32:
        return x
    y = torch.empty(x.shape, dtype=dtype)
    _engine().convert(engines()[0], x.data_ptr(), y.data_ptr(), FORMATS[dtype], x.numel(), threads())
    return y


def total(x: Tensor) -> float:
    """The sum of x, float32 and contiguous, read once: how fast memory can be read."""
    return _engine().read(engines()[0], x.data_ptr(), x.numel(), threads())


def borrows() -> bool:
    """Whether it works on the threads of torch's OpenMP, which then do not wait beside its own."""
    return _engine().borrows()


def handover() -> float:
    """Seconds from giving all threads a job that does nothing until all are through with it."""
    return min(_engine().handover(100, threads()) for _ in range(10))  # the first wakes them up


class Stored(NamedTuple):
    """A tensor as the engine reads it."""

    tensor: Tensor
    form: int  # of FORMATS or QUANTIZED
    by_input: bool = False  # of a matrix

    @classmethod
    def plain(cls, tensor: Tensor) -> Stored:
        return cls(tensor, FORMATS[tensor.dtype], tensor.ndim == 2 and lies_by_input(tensor) is True)


Parts = dict[str, Stored | int]  # named tensors, and sizes

OUTPUTS = {"logits": 0, "last": 1, "hidden": 2}  # enum Output of engine.h


class Model:
    """A model in the engine's hands: where its weights are, and the call that runs it.

    The tensors are kept alive, not copied: what happens to them in place is seen.
    """

    def __init__(self, blocks: Sequence[Parts], whole: Parts, *, norm_eps: float, head_eps: float) -> None:
        self._kept = [*blocks, whole]
        parts = [{name: _place(part) for name, part in block.items()} for block in self._kept]
        self._model = _engine().Model(parts[:-1], parts[-1], norm_eps, head_eps, engines()[0])

    def run(
        self,
        tokens: Tensor,
        before: tuple[Tensor, Tensor, Tensor],
        after: tuple[Tensor, Tensor, Tensor],
        output: str,
        y: Tensor,
        *,
        lengths: Tensor | None = None,
        slots: tuple[Tensor, Tensor] | None = None,
        skips: bool = True,
    ) -> bool:
        """Read tokens; False, and nothing is done, when one of them is not in the vocabulary.

        tokens  (B, T) int64, or with `lengths` (N,): B sequences, one after the other without a gap
        before  the states: att_shift (L, S, D), memory (L, S, ...) float32, ffn_shift (L, S, D)
        after   where the new ones go; it may be the same
        output  "logits", "last" or "hidden"
        y       float32 (B, T, V), (B, 1, V) or (B, T, D); with `lengths` N is in the place of B, T
        lengths int64 (B,): tokens of each sequence, at least one
        slots   int64 (B,) each: the rows s of `before` and of `after`; without it, 0 to B - 1. Of several
                sequences that end in one row, the last stays there
        skips   leave rows of ffn.value unread that meet a zero, where it lies so that they can be

        All contiguous. A long call lets Python handle signals several times a second; what a handler raises,
        such as KeyboardInterrupt, ends it with `after` and `y` half-way.
        """
        return bool(
            self._model.run(
                tokens.data_ptr(),
                tokens.numel(),
                len(tokens) if lengths is None else len(lengths),
                0 if lengths is None else lengths.data_ptr(),
                FORMATS[before[0].dtype],
                (*map(Tensor.data_ptr, before), before[0].shape[1]),
                (*map(Tensor.data_ptr, after), after[0].shape[1]),
                0 if slots is None else slots[0].data_ptr(),
                0 if slots is None else slots[1].data_ptr(),
                OUTPUTS[output],
                y.data_ptr(),
                skips,
                ROWS_AT_ONCE,
                threads(),
            )
        )


def refuses(call: Call) -> str | None:
    """Why an operator's row "native" would not run this call."""
    if reason := why_not():
        return reason
    if call.device.type != "cpu":
        return f"the tensors are on {call.device}, not on the CPU"
    if call.dtype != torch.float32:
        return f"{call.dtype}: it sums in float32 alone"
    return None


def empty_like(*tensors: Tensor) -> list[Tensor]:
    """Contiguous tensors of these shapes, to be filled.

    Large ones get some bytes more, fewer from one to the next. To align a block the C library wants 96 more
    than the block has, so it never puts a tensor where one of the same size was: each temporary would leave
    a hole in a step's memory.
    """
    return [_empty(x) for x in tensors]


def _empty(x: Tensor) -> Tensor:
    if x.numel() < _LARGE:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return x.new_empty(x.numel() + next(_SLACKS))[: x.numel()].view(x.shape)


_LARGE = 2**16  # numbers
_SLACKS = itertools.cycle(range(2**13, 32, -32))  # numbers: more of them than a step asks for


def wkv4(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], lengths: Tensor | None, *, backward: bool
) -> None:
    """Fill `outputs` (y, state; backward: gradients) from `inputs` (log_w, u, k, v, state; dy, dstate)."""
    B, T, A = inputs[2].shape
    _operate("wkv4", (B, T, 1, A, 1), inputs, outputs, lengths, backward)


def wkv6(
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    lengths: Tensor | None,
    *,
    backward: bool,
    constant_decay: bool,
) -> None:
    """The same for r, log_w, k, v, u, state, where log_w may be (H, K)."""
    _operate(
        "wkv6", (*inputs[0].shape, inputs[3].shape[-1]), inputs, outputs, lengths, backward, constant_decay
    )


def wkv7(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], lengths: Tensor | None, *, backward: bool
) -> None:
    """The same for r, log_w, k, v, kappa, a, state."""
    _operate("wkv7", (*inputs[0].shape, inputs[3].shape[-1]), inputs, outputs, lengths, backward)


def time_mix7(
    inputs: Sequence[Tensor | None],
    outputs: Sequence[Tensor | None],
    lengths: Tensor | None,
    *,
    backward: bool,
    eps: float,
) -> None:
    """The same for what TimeMix7Inputs names. Of parameters: one tensor (B, 8, A), each row's gradients."""
    r, state = inputs[0], inputs[8]
    assert r is not None and state is not None
    B, T, _ = r.shape
    _operate("time_mix7", (B, T, *state.shape[1:]), inputs, outputs, lengths, backward, eps)


def token_mix(inputs: Sequence[Tensor | None], outputs: Sequence[Tensor], *, backward: bool) -> None:
    """Fill `outputs` (the mixes; backward: gradients of x, last, weights) from `inputs`: x, last, weights
    (n, D) or (n, B, T, D), starts; backward then the gradients of the mixes."""
    x, _, weights, *_ = inputs
    assert x is not None and weights is not None
    B, T, D = x.shape
    _operate("token_mix", (B, T, len(weights), D, 1), inputs, outputs, None, backward, weights.ndim == 4)


def squared_relu(inputs: Sequence[Tensor], output: Tensor, *, backward: bool) -> None:
    """The same for x, output y; backward: the gradient of x from that of y and x."""
    F = max(1, output.shape[-1]) if output.ndim else 1
    _operate("squared_relu", (1, output.numel() // F, 1, F, 1), inputs, [output], None, backward)


def _operate(
    name: str,
    sizes: tuple[int, ...],
    inputs: Sequence[Tensor | None],
    outputs: Sequence[Tensor | None],
    lengths: Tensor | None,
    *options: float,
) -> None:
    """float32 each, None where there is none; the outputs contiguous, the inputs made so."""
    read = [None if x is None else x.contiguous() for x in (lengths, *inputs)]
    rows, *places = (0 if x is None else x.data_ptr() for x in read)
    run = getattr(_engine(), name)
    filled = [0 if x is None else x.data_ptr() for x in outputs]
    run(engines()[0], sizes, rows, places, filled, *options, threads())


def _place(part: Stored | int) -> tuple[int, int, bool] | int:
    return part if isinstance(part, int) else (part.tensor.data_ptr(), part.form, part.by_input)


def _engine() -> ModuleType:
    loaded = _load()
    if isinstance(loaded, str):
        raise ImportError(loaded)
    return loaded
