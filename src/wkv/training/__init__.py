"""Training, in parts that can be used alone, and as one `Trainer` that can be left alone.

    data = open_data("packed/")                     # what `wkv data pack` or `pack(...)` made
    config = TrainConfig(tokens=10_000_000, context=512, order="documents")
    Trainer(model, data, config, folder="runs/first").fit()

    config.py       the settings
    data/           from files to batches
    loss.py         cross-entropy with L2Wrap, without ever holding all logits
    optim.py        parameter groups, optimizers and schedules, as the official recipes want them
    trainer.py      the loop; snapshots.py and run_folder.py: what it leaves on the disk
    distributed.py  several processes; context_parallel.py: with a part of every row each
    validation.py   held-out documents
    callbacks.py    who listens

Names are imported when they are first used, so that the settings cost no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callbacks import Callback, TensorBoard
    from .config import DataSettings, ModelSettings, TrainConfig
    from .data import (
        Data,
        Document,
        TokenData,
        as_tokens,
        is_packed,
        open_data,
        pack,
        split,
        standard_library,
    )
    from .loss import cross_entropy, linear_cross_entropy
    from .optim import learning_rate, make_optimizers, parameter_groups, set_learning_rate
    from .trainer import Progress, Trainer
    from .validation import Validation, validate

_HOMES = {
    "Callback": "callbacks",
    "Data": "data",
    "DataSettings": "config",
    "Document": "data",
    "ModelSettings": "config",
    "Progress": "trainer",
    "TensorBoard": "callbacks",
    "TokenData": "data",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "Validation": "validation",
    "as_tokens": "data",
    "cross_entropy": "loss",
    "is_packed": "data",
    "learning_rate": "optim",
    "linear_cross_entropy": "loss",
    "make_optimizers": "optim",
    "open_data": "data",
    "pack": "data",
    "parameter_groups": "optim",
    "set_learning_rate": "optim",
    "split": "data",
    "standard_library": "data",
    "validate": "validation",
}

__all__ = [
    "Callback",
    "Data",
    "DataSettings",
    "Document",
    "ModelSettings",
    "Progress",
    "TensorBoard",
    "TokenData",
    "TrainConfig",
    "Trainer",
    "Validation",
    "as_tokens",
    "cross_entropy",
    "is_packed",
    "learning_rate",
    "linear_cross_entropy",
    "make_optimizers",
    "open_data",
    "pack",
    "parameter_groups",
    "set_learning_rate",
    "split",
    "standard_library",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value  # the next look-up does not come here
    return value
