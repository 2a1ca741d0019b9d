"""The optimizers and the learning rate: the groups come from the recipe that stands beside each parameter.

    optimizers = make_optimizers(model, lr=6e-4, weight_decay=0.1)
    ...
    factor = learning_rate("cosine", tokens_seen, total_tokens=10_000_000, warmup_tokens=50_000, final=0.1)
    for optimizer in optimizers:
        set_learning_rate(optimizer, factor)

A block inside somebody else's network keeps its recipe: `parameter_groups(network, ...)` finds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from ..errors import Error, InputError
from .config import Schedule


def parameter_groups(module: nn.Module, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups for all trainable parameters of `module`; each parameter is in exactly one.

    Parameters of wkv's layers follow their recipes: a multiple of the learning rate, decayed or not.
    Those of other modules follow the common rule: tensors of two axes or more decay, the rest does not.
    Frozen parameters are left out; one that goes by two names counts under the first.

    A group holds "params", "param_names", "weight_decay", and "lr" and "initial_lr" with the multiple
    applied, so that torch's own schedulers keep it too. Error names a wkv parameter without recipe.
    """
    return _groups(_trainable(module), lr, weight_decay)


class _Rule(NamedTuple):
    name: str
    parameter: nn.Parameter
    lr: float  # multiple of the learning rate
    decay: bool
    muon: bool


def _trainable(module: nn.Module) -> list[_Rule]:
    """The rule of each trainable parameter, once."""
    first: dict[nn.Parameter, _Rule] = {}
    for rule in _rules(module):
        if rule.parameter.requires_grad:
            first.setdefault(rule.parameter, rule)
    missed = {name for name, p in module.named_parameters() if p.requires_grad and p not in first}
    assert not missed, f"parameters in no group: {missed}"
    return list(first.values())


def _rules(module: nn.Module, prefix: str = "", inside_wkv: bool = False) -> Iterator[_Rule]:
    """Those of `module` and all modules inside it, frozen and repeated parameters included."""
    recipes = getattr(module, "recipes", None)
    inside_wkv = inside_wkv or recipes is not None
    for name, parameter in module.named_parameters(recurse=False):
        recipe = (recipes or {}).get(name)
        if recipe is not None:
            yield _Rule(prefix + name, parameter, recipe.lr, recipe.decay, recipe.muon)
        elif inside_wkv:
            raise Error(
                f"parameter {prefix + name} has no recipe, so it would be trained by guess",
                "a learning-rate multiple and a weight-decay choice beside each parameter",
                "wkv.models.recipe.parameter(...), or an entry in its module's `recipes`",
            )
        else:
            yield _Rule(prefix + name, parameter, lr=1.0, decay=parameter.ndim >= 2, muon=False)
    for name, child in module.named_children():
        yield from _rules(child, f"{prefix}{name}.", inside_wkv)


def _groups(rules: Iterable[_Rule], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter, multiple, decay, _ in rules:
        own_lr, own_decay = lr * multiple, weight_decay if decay else 0.0
        group = groups.setdefault(
            (multiple, decay),
            {"params": [], "param_names": [], "lr": own_lr, "initial_lr": own_lr, "weight_decay": own_decay},
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())


def make_optimizers(
    module: nn.Module,
    *,
    optimizer: Literal["adamw", "muon"] = "adamw",
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-18,
    muon_lr: float | None = None,
) -> list[torch.optim.Optimizer]:
    """One optimizer, or two whose steps go together; their groups are those of `parameter_groups`.

    "adamw"  AdamW for everything, with the official betas and eps (RWKV-4's eps is 1e-8). So small an eps
             makes every parameter move at the full rate however small its gradient is, as the tiny initial
             values of the embedding need. It needs float32 parameters
    "muon"   AdamW, and Muon for the matrices whose recipe says so: `.weight` matrices of time and channel
             mixes, not the embedding, the head or low-rank factors. Its steps are scaled to the size of
             AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training"), so that `lr` does for both;
             `muon_lr` sets it apart. It multiplies in bfloat16, which most CPUs are slow at

    InputError for another name, a module without trainable parameters, or Muon without such a matrix.
    """
    rules = _trainable(module)
    if optimizer not in ("adamw", "muon"):
        raise InputError(f"optimizer {optimizer!r}", "adamw or muon")
    if not rules:
        raise InputError("no parameter of the module is trainable", "at least one", "requires_grad_(True)")
    matrices = [rule for rule in rules if rule.muon and optimizer == "muon"]
    others = [rule for rule in rules if not (rule.muon and optimizer == "muon")]
    if optimizer == "muon" and not matrices:
        raise InputError("no parameter's recipe asks for Muon", "matrices inside wkv's blocks", "adamw")
    made: list[torch.optim.Optimizer] = []
    if others:
        made.append(_adamw(_groups(others, lr, weight_decay), betas, eps))
    if matrices:
        groups = _groups(matrices, lr if muon_lr is None else muon_lr, weight_decay)
        made.append(torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw"))
    return made


def _adamw(groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    try:
        optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
    except RuntimeError:  # a device without the fused kernel
        return torch.optim.AdamW(groups, betas=betas, eps=eps)
    # The fused step changes weights behind autograd's back; `RWKV.fingerprint` goes by their version.
    optimizer.register_step_post_hook(_count_change)
    return optimizer


def _count_change(optimizer: torch.optim.Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(group["params"])


def learning_rate(
    schedule: Schedule,
    tokens: float,
    *,
    total_tokens: float,
    warmup_tokens: float = 0,
    final: float = 0.1,
    warmup_start: float = 0.01,
    decay_share: float = 0.2,
) -> float:
    """The factor on the learning rate after `tokens` of `total_tokens`: 1 at the peak, `final` at the end.

    While tokens < warmup_tokens it rises in a line from `warmup_start` (officially 0.01, for RWKV-4 0.2)
    to 1. Then, with p going from 0 to 1 over the rest, it falls, and after the end stays `final`:

        cosine       final + (1 - final) (1 + cos(pi p)) / 2
        linear       1 + (final - 1) p
        exponential  final^p; linear where final is 0
        wsd          1, and over the last `decay_share` of all tokens in a line to final
        constant     1

    Cosine and exponential are those of BlinkDL/RWKV-LM. InputError for a schedule of another name.
    """
    if tokens < warmup_tokens:
        return warmup_start + (1 - warmup_start) * tokens / warmup_tokens
    p = _progress(tokens, warmup_tokens, total_tokens)
    if schedule == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * p)) / 2
    if schedule == "linear" or (schedule == "exponential" and final == 0):
        return 1 + (final - 1) * p
    if schedule == "exponential":
        return final**p
    if schedule == "wsd":
        stable = max((1 - decay_share) * total_tokens, warmup_tokens)
        return 1 + (final - 1) * _progress(tokens, stable, total_tokens)
    if schedule == "constant":
        return 1.0
    raise InputError(f"schedule {schedule!r}", f"one of {', '.join(get_args(Schedule))}")


def _progress(tokens: float, start: float, end: float) -> float:
    """0 up to `start`, 1 from `end` on; a line between them, or a step where they are one place."""
    if tokens >= end:
        return 1.0
    return max(tokens - start, 0) / (end - start)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give each group `factor` times its initial learning rate, its own multiple included."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["initial_lr"]
