"""The operators that make RWKV a recurrence: one public function each, several backends behind it.

    wkv4, wkv5, wkv6, wkv7    the time mixing of each generation
    time_mix7                 RWKV-7's with all that stands between matrix products
    token_mix                 each token mixed with its predecessor, carried from call to call
    squared_relu              the activation of the channel mix
    cheap, cheap_again        what is computed again for the gradients instead of kept
    Segments                  several sequences in one row, each with a state of its own
    explain, use_backend      which implementation runs, and why

Usable without any model: tensors in, tensors and a new state out, gradients through both.
"""

from __future__ import annotations

import torch

from ..errors import InputError
from . import squared_relu as _squared_relu
from . import time_mix7 as _time_mix7
from . import token_mix as _token_mix
from . import wkv4 as _wkv4
from . import wkv5 as _wkv5
from . import wkv6 as _wkv6
from . import wkv7 as _wkv7
from .cheap import cheap, cheap_again
from .dispatch import Call, Operator, use_backend
from .segments import Segments
from .squared_relu import squared_relu
from .time_mix7 import time_mix7
from .token_mix import token_mix
from .wkv4 import wkv4
from .wkv5 import wkv5
from .wkv6 import wkv6
from .wkv7 import wkv7

__all__ = [
    "OPERATORS",
    "Segments",
    "cheap",
    "cheap_again",
    "explain",
    "squared_relu",
    "time_mix7",
    "token_mix",
    "use_backend",
    "wkv4",
    "wkv5",
    "wkv6",
    "wkv7",
]

OPERATORS: dict[str, Operator] = {
    module.OPERATOR.name: module.OPERATOR
    for module in (_squared_relu, _token_mix, _wkv4, _wkv5, _wkv6, _wkv7, _time_mix7)
}


def explain(
    operator: str,
    *,
    T: int = 1024,
    head_size: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    needs_grad: bool = False,
) -> str:
    """A line per backend of `operator` for such a call: runs, would run, or the reason it refuses."""
    if operator not in OPERATORS:
        raise InputError(f"no operator {operator!r}", f"one of {', '.join(OPERATORS)}")
    return OPERATORS[operator].explain(Call(T, head_size, dtype, torch.device(device), needs_grad))
