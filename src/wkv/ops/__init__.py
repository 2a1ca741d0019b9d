"""The operators that make RWKV a recurrence: one public function each, several backends behind it.

    wkv4, wkv5, wkv6, wkv7    the time mixing of each generation
    time_mix7                 RWKV-7's with all that stands between matrix products
    token_shift, mix          each token's predecessor, carried from call to call; a share of it
    Segments                  several sequences in one row, each with a state of its own
    explain, use_backend      which implementation runs, and why

Usable without any model: tensors in, tensors and a new state out, gradients through both.
"""

from __future__ import annotations

import torch

from ..errors import InputError
from . import time_mix7 as _time_mix7
from . import wkv4 as _wkv4
from . import wkv5 as _wkv5
from . import wkv6 as _wkv6
from . import wkv7 as _wkv7
from .dispatch import Call, Operator, use_backend
from .segments import Segments
from .time_mix7 import time_mix7
from .token_shift import mix, token_shift
from .wkv4 import wkv4
from .wkv5 import wkv5
from .wkv6 import wkv6
from .wkv7 import wkv7

__all__ = [
    "OPERATORS",
    "Segments",
    "explain",
    "mix",
    "time_mix7",
    "token_shift",
    "use_backend",
    "wkv4",
    "wkv5",
    "wkv6",
    "wkv7",
]

OPERATORS: dict[str, Operator] = {
    module.OPERATOR.name: module.OPERATOR for module in (_wkv4, _wkv5, _wkv6, _wkv7, _time_mix7)
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
