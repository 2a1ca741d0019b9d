"""The compiled engine: whole blocks and matrix products on the CPU, where no gradient is wanted.

    why_not()             None where it runs, else the reason
    engines()             the instruction sets that this processor has, best first
    product(x, W)         x W^T
    Block(...)            one block of a model; `wkv.models.compiled` builds them

Nothing here is needed: without the extension (an installation without a compiler) torch does it all, more
slowly. Sums are float32 whatever the format of the weights; each row's result is the same, bit for bit,
whatever shares the call with it, however its tokens are split over calls, and for any number of threads.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Format of engine.h
MOST_THREADS = 256  # Pool::kMostThreads


@functools.cache
def _load() -> ModuleType | str:
    """The extension, or why there is none."""
    try:
        import wkv._native as extension
    except ModuleNotFoundError:
        return "it was not built: installing wkv found no C++ compiler"
    except ImportError as error:
        return f"it does not load: {error}"
    return extension


def why_not() -> str | None:
    """The reason why the engine cannot run here, None when it can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def engines() -> list[str]:
    """What this processor runs, such as "avx2" and "portable"; empty where there is no engine."""
    loaded = _load()
    return [] if isinstance(loaded, str) else list(loaded.engines())


def threads() -> int:
    """As many as torch uses."""
    return min(torch.get_num_threads(), MOST_THREADS)


def lies_by_input(weight: Tensor) -> bool | None:
    """How W [out, in] lies in memory: False by output (rows), True by input (columns), None neither."""
    return False if weight.is_contiguous() else True if weight.mT.is_contiguous() else None


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` and `normalized` do it: one format on the CPU, no gradient, nothing that traces."""
    return (
        weight.dtype in FORMATS
        and x.dtype == weight.dtype
        and weight.device.type == "cpu"
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and why_not() is None
        and (weight.ndim < 2 or lies_by_input(weight) is not None)
    )


_PLAIN = (Tensor, torch.nn.Parameter)  # not: sharded, fake, quantised by others


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) times W [out, in]: (..., out), in the format of both. `takes` says when."""
    outputs, inputs = weight.shape
    rows = x.reshape(-1, inputs).to(torch.float32).contiguous()
    y = torch.empty(len(rows), outputs)
    _engine().multiply(
        engines()[0],
        weight.data_ptr(),
        FORMATS[weight.dtype],
        inputs,
        outputs,
        lies_by_input(weight),
        rows.data_ptr(),
        len(rows),
        y.data_ptr(),
        threads(),
    )
    return y.view(*x.shape[:-1], outputs).to(weight.dtype)


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
    return y.view(x.shape).to(weight.dtype)


class Block:
    """One block in the engine's hands: where its weights are, and the call that runs it.

    The tensors are kept alive, not copied: what happens to them in place is seen.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        sizes: dict[str, int],
        *,
        norm_eps: float,
        head_eps: float,
        engine: str | None = None,
    ) -> None:
        self._tensors = tensors
        parts: dict[str, Any] = dict(sizes)
        for name, tensor in tensors.items():
            by_input = tensor.ndim == 2 and lies_by_input(tensor) is True
            parts[name] = (tensor.data_ptr(), FORMATS[tensor.dtype], by_input)
        self._runner = _engine().Runner(parts, norm_eps, head_eps, engine or engines()[0])

    def run(
        self,
        source: Tensor,
        x: Tensor,
        v_first: Tensor | None,
        before: tuple[Tensor, Tensor, Tensor],
        after: tuple[Tensor, Tensor, Tensor],
        *,
        slots: tuple[Tensor, Tensor] | None = None,
        skips: bool = True,
        n_threads: int | None = None,
    ) -> None:
        """Take `source` (B, T, D) through the block to x (B, T, D).

        source   contiguous, in any format
        x        float32, contiguous; it may be `source` itself
        v_first  (B, T, A) float32: written by layer 0 of generation 7, read by its others; else None
        before   the states: att_shift (S, D), memory (S, ...) float32, ffn_shift (S, D), contiguous
        after    where the new ones go; it may be the same
        slots    int64 (B,) each: the rows of `before` and of `after`; without it, 0 to B - 1
        skips    leave rows of ffn.value unread that meet a zero, where it lies so that they can be
        """
        self._runner.run(
            x.shape[0],
            x.shape[1],
            source.data_ptr(),
            FORMATS[source.dtype],
            x.data_ptr(),
            0 if v_first is None else v_first.data_ptr(),
            FORMATS[before[0].dtype],
            (before[0].data_ptr(), before[1].data_ptr(), before[2].data_ptr()),
            (after[0].data_ptr(), after[1].data_ptr(), after[2].data_ptr()),
            0 if slots is None else slots[0].data_ptr(),
            0 if slots is None else slots[1].data_ptr(),
            skips,
            threads() if n_threads is None else n_threads,
        )


def _engine() -> ModuleType:
    loaded = _load()
    if isinstance(loaded, str):
        raise ImportError(loaded)
    return loaded
