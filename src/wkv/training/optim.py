"""AdamW as RWKV is trained: the groups come from the recipe that stands beside each parameter.

    optimizer = adamw(model, lr=6e-4, weight_decay=0.1)
    ...
    set_learning_rate(optimizer, warmup_cosine(tokens_seen / tokens_planned, warmup=0.01, final=0.1))

A block inside somebody else's network keeps its recipe: `parameter_groups(network, ...)` finds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import Error


def parameter_groups(module: nn.Module, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups for all trainable parameters of `module`; each parameter is in exactly one.

    Parameters of wkv's layers follow their recipes: a multiple of the learning rate, decayed or not.
    Those of other modules follow the common rule: tensors of two axes or more decay, the rest does not.
    Frozen parameters are left out; one that goes by two names counts under the first.

    A group holds "params", "param_names", "weight_decay", and "lr" and "initial_lr" with the multiple
    applied, so that torch's own schedulers keep it too. Error names a wkv parameter without recipe.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    grouped: set[nn.Parameter] = set()
    for name, parameter, multiple, decay in _rules(module):
        if parameter in grouped or not parameter.requires_grad:
            continue
        grouped.add(parameter)
        own_lr, own_decay = lr * multiple, weight_decay if decay else 0.0
        group = groups.setdefault(
            (multiple, decay),
            {"params": [], "param_names": [], "lr": own_lr, "initial_lr": own_lr, "weight_decay": own_decay},
        )
        group["params"].append(parameter)
        group["param_names"].append(name)

    missed = {name for name, p in module.named_parameters() if p.requires_grad and p not in grouped}
    assert not missed, f"parameters in no group: {missed}"
    return list(groups.values())


def _rules(
    module: nn.Module, prefix: str = "", inside_wkv: bool = False
) -> Iterator[tuple[str, nn.Parameter, float, bool]]:
    """(name, parameter, multiple of the learning rate, decayed?) of `module` and all modules inside it."""
    recipes = getattr(module, "recipes", None)
    inside_wkv = inside_wkv or recipes is not None
    for name, parameter in module.named_parameters(recurse=False):
        recipe = (recipes or {}).get(name)
        if recipe is not None:
            yield prefix + name, parameter, recipe.lr, recipe.decay
        elif inside_wkv:
            raise Error(
                f"parameter {prefix + name} has no recipe, so it would be trained by guess",
                "a learning-rate multiple and a weight-decay choice beside each parameter",
                "wkv.models.recipe.parameter(...), or an entry in its module's `recipes`",
            )
        else:
            yield prefix + name, parameter, 1.0, parameter.ndim >= 2
    for name, child in module.named_children():
        yield from _rules(child, f"{prefix}{name}.", inside_wkv)


def adamw(
    module: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-18,
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, with the official betas and eps (RWKV-4's eps is 1e-8).

    So small an eps makes every parameter move at the full rate however small its gradient is, as the
    tiny initial values of the embedding need. It needs float32 parameters or float32 copies.
    """
    groups = parameter_groups(module, lr=lr, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)


def warmup_cosine(done: float, *, warmup: float, final: float) -> float:
    """The factor on the learning rate when the share `done` (0 to 1) of the budget is used.

    The budget may be tokens or time. During the share `warmup` the factor rises in a line from 0.01
    to 1; then it falls along half a cosine to `final`, and stays there.
    """
    if done < warmup:
        return 0.01 + 0.99 * done / warmup
    falling = min((done - warmup) / (1 - warmup), 1.0)
    return final + (1 - final) * (1 + math.cos(math.pi * falling)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give each group `factor` times its initial learning rate, its own multiple included."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["initial_lr"]
