"""The settings of a training run: frozen, strict, and written back as TOML beside what they made.

    config = TrainConfig(tokens=50_000_000, context=1024, learning_rate=6e-4)
    text = to_toml({"training": config})
    assert TrainConfig.from_dict(tomllib.loads(text)["training"]) == config

A misspelt name is an error that names the nearest; a value out of range says what the range is.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from ..config import Config, Recompute, RWKV4Config, RWKV5Config, RWKV6Config, RWKV7Config
from ..errors import ConfigError

Order = Literal["magic", "shuffled", "documents", "streams"]
Schedule = Literal["cosine", "linear", "exponential", "wsd", "constant"]


def between(default: Any, low: float, high: float = math.inf) -> Any:
    """A field whose value lies from `low` to `high`, both included."""
    return dataclasses.field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A dataclass whose types and ranges are enforced, made from plain values without guessing."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind, optional = _without_none(hints[field.name])
            if value is None and optional:
                continue
            if problem := _problem(value, kind, field.metadata.get("range")):
                got = f"{field.name} is {value!r}"
                raise ConfigError(got, problem + (", or leaving it out" if optional else ""))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From a table of a TOML file. ConfigError for an unknown name, with the nearest known one."""
        known = {field.name for field in dataclasses.fields(cls)}
        check_names(values, known)
        hints = get_type_hints(cls)
        # TOML has arrays, a frozen dataclass has tuples.
        exact = {
            name: tuple(value)
            if isinstance(value, list) and get_origin(_without_none(hints[name])[0]) is tuple
            else value
            for name, value in values.items()
        }
        return cls(**exact)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; settings that are None are left out, as TOML has no word for them."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """How a model is trained. The learning rates of published sizes are in docs/training.md.

    Parameters
    ----------
    order
        magic (official windows), shuffled (windows), documents (whole, packed), streams (state carried on)
    batch_size
        rows per step, over all processes
    context
        tokens per row
    tokens
        how many to learn from in all
    minutes
        end earlier, after this much training time; the learning rate follows
    optimizer
        adamw, or muon for the matrices
    learning_rate
        the highest; each parameter has its own multiple of it
    schedule
        how the rate falls: cosine, linear, exponential, wsd or constant
    final
        the last rate, as a share of the highest
    warmup_tokens
        the rate rises during the first so many tokens
    weight_decay
        of the matrices
    beta1
        memory of Adam's mean
    beta2
        memory of Adam's variance
    adam_eps
        without it, the official one of the generation
    clip
        largest norm of all gradients together
    l2wrap
        pull of the largest logit towards zero
    micro_batch
        rows at a time, to save memory; the result is that of all rows together
    precision
        float32, or bfloat16 for the products (weights and sums stay float32)
    recompute
        what is computed again for the gradients, to save memory: nothing, what a single pass gives (cheap),
        or whole blocks, which saves most and costs a forward pass
    compile
        let torch.compile fuse operations; needs a C++ compiler
    parallel
        what the processes of torchrun divide: rows of the batch (replicate), besides them the model
        (shard), or each row's tokens (context)
    shard_over
        so many processes share one copy of the model, those of one machine for instance; without it, all
    seed
        of the first weights and of the order of reading
    validate_every
        steps between validations
    validation_tokens
        at most so many tokens of held-out documents each time
    patience
        stop after so many validations without a better one
    save_every
        steps between checkpoints
    keep_last
        so many checkpoints stay, the one to go back to, and the one with the best validation
    explosion
        a gradient so many times the usual norm is not learnt from
    skips
        so many bad steps within 100 are passed over; one more, and the last checkpoint is loaded
    rollbacks
        so many times; then the run stops
    slower
        the learning rate is multiplied by this at each return to a checkpoint
    """

    order: Order = "shuffled"
    batch_size: int = between(8, 1)
    context: int = between(512, 1)
    tokens: int = between(10_000_000, 1)
    minutes: float | None = between(None, 1e-3)
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = between(6e-4, 0)
    schedule: Schedule = "cosine"
    final: float = between(0.1, 0, 1)
    warmup_tokens: int = between(65_536, 0)
    weight_decay: float = between(0.1, 0)
    beta1: float = between(0.9, 0, 1 - 1e-9)
    beta2: float = between(0.99, 0, 1 - 1e-9)
    adam_eps: float | None = between(None, 0)
    clip: float = between(1.0, 1e-9)
    l2wrap: float = between(1e-4, 0)
    micro_batch: int | None = between(None, 1)
    precision: Literal["float32", "bfloat16"] = "float32"
    recompute: Recompute = "cheap"
    compile: bool = False
    parallel: Literal["replicate", "shard", "context"] = "replicate"
    shard_over: int | None = between(None, 1)
    seed: int = between(0, 0, 2**63 - 1)
    validate_every: int = between(250, 1)
    validation_tokens: int = between(200_000, 1)
    patience: int | None = between(None, 1)
    save_every: int = between(250, 1)
    keep_last: int = between(2, 1)
    explosion: float = between(100.0, 1)
    skips: int = between(3, 0)
    rollbacks: int = between(2, 0)
    slower: float = between(0.5, 0, 1)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """Which model is trained: one from a file, one of a published size, or one of any size.

    Parameters
    ----------
    init
        go on from this checkpoint, .pth or .safetensors
    arch
        the generation of a new model: rwkv4, rwkv5, rwkv6 or rwkv7
    size
        a published size, such as 0.1B; without it, the three below
    n_layer
        blocks
    n_embd
        width
    dim_ffn
        width of the channel mix; without it, the usual multiple of n_embd
    head_size
        channels per head, from generation 5 on
    """

    init: str | None = None
    arch: Literal["rwkv4", "rwkv5", "rwkv6", "rwkv7"] = "rwkv7"
    size: str | None = None
    n_layer: int = between(6, 1)
    n_embd: int = between(256, 1)
    dim_ffn: int | None = between(None, 1)
    head_size: int = between(64, 1)

    def config(self, vocab_size: int) -> Config:
        """Of a new model. ConfigError for sizes that make none."""
        generations: dict[str, type[Config]] = {
            "rwkv4": RWKV4Config, "rwkv5": RWKV5Config, "rwkv6": RWKV6Config, "rwkv7": RWKV7Config,
        }  # fmt: skip
        kind = generations[self.arch]
        if self.size is not None:
            return kind.named(self.size, vocab_size=vocab_size)
        chosen = {"dim_ffn": self.dim_ffn, "head_size": None if self.arch == "rwkv4" else self.head_size}
        given = {name: value for name, value in chosen.items() if value is not None}
        return kind.of_size(vocab_size=vocab_size, n_layer=self.n_layer, n_embd=self.n_embd, **given)


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """What a model learns from.

    Parameters
    ----------
    data
        text files, folders, .jsonl, token files, a folder of wkv data pack, or the word stdlib
    tokenizer
        world, bytes, or a tokenizer.json; packed data and --init know theirs
    field
        where the text of a JSONL line is
    held_out
        the share of the documents that is kept for validation
    """

    data: tuple[str, ...] = ()
    tokenizer: str | None = None
    field: str = "text"
    held_out: float = between(0.05, 0, 0.9)


def check_names(values: Mapping[str, Any], known: set[str], what: str = "setting") -> None:
    """ConfigError, with the nearest known name, unless every key of `values` is known."""
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(f"no {what} is named {name!r}", f"one of {', '.join(sorted(known))}", *near)


def to_toml(tables: Mapping[str, Settings]) -> str:
    """The settings as a TOML document, one table each: what `tomllib` reads back."""
    parts = []
    for name, settings in tables.items():
        lines = [f"{key} = {_toml_value(value)}" for key, value in settings.to_dict().items()]
        parts.append("\n".join([f"[{name}]", *lines]) + "\n")
    return "\n".join(parts)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, str):
        # TOML's basic strings have JSON's escapes, and forbid one character more.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _without_none(hint: Any) -> tuple[Any, bool]:
    """(the type, whether None is allowed too)."""
    if get_origin(hint) in (types.UnionType, Union):
        (kind,) = [part for part in get_args(hint) if part is not type(None)]
        return kind, True
    return hint, False


def _problem(value: object, kind: Any, limits: tuple[float, float] | None) -> str:
    """What was expected instead of `value`, or nothing when it is right."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return "" if value in choices else f"one of {', '.join(map(repr, choices))}"
    if get_origin(kind) is tuple:
        right = isinstance(value, tuple) and all(isinstance(item, get_args(kind)[0]) for item in value)
        return "" if right else "a list of texts"
    if kind in (bool, str):
        return "" if isinstance(value, kind) else {bool: "true or false", str: "a text"}[kind]
    low, high = limits or (-math.inf, math.inf)
    number = int if kind is int else int | float
    right = isinstance(value, number) and not isinstance(value, bool)
    if right and math.isfinite(value) and low <= value <= high:  # type: ignore[arg-type,operator]
        return ""
    noun = "a whole number" if kind is int else "a number"
    return noun + (f" from {low:g}" if low > -math.inf else "") + (f" to {high:g}" if high < math.inf else "")
