"""RWKV language models, generations 4 to 7: load, generate, train, prove.

    import wkv

    model, tokenizer = wkv.load("model.pth")
    print(wkv.generate(model, tokenizer, "def main():", max_tokens=80))

    session = wkv.Session(model, tokenizer)
    session.feed("Once upon a time")
    for piece in session.stream(max_tokens=100):
        print(piece, end="", flush=True)

Names are imported when they are first used: `import wkv` costs milliseconds and does not load torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops
    from .config import RWKV4Config, RWKV5Config, RWKV6Config, RWKV7Config
    from .errors import Error
    from .inference import Engine, Sampling, Session, generate
    from .loading import load, save
    from .models import build
    from .state import State
    from .training import TrainConfig, Trainer, parameter_groups

__all__ = [
    "Engine",
    "Error",
    "RWKV4Config",
    "RWKV5Config",
    "RWKV6Config",
    "RWKV7Config",
    "Sampling",
    "Session",
    "State",
    "TrainConfig",
    "Trainer",
    "__version__",
    "build",
    "generate",
    "load",
    "ops",
    "parameter_groups",
    "save",
]

_HOMES = {
    "Engine": "inference",
    "Error": "errors",
    "RWKV4Config": "config",
    "RWKV5Config": "config",
    "RWKV6Config": "config",
    "RWKV7Config": "config",
    "Sampling": "inference",
    "Session": "inference",
    "State": "state",
    "TrainConfig": "training",
    "Trainer": "training",
    "build": "models",
    "generate": "inference",
    "load": "loading",
    "parameter_groups": "training",
    "save": "loading",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("wkv")
    elif name == "ops":
        value = importlib.import_module(".ops", __name__)
    elif name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return __all__
