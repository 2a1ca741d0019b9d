"""The sizes and switches of a model, one frozen class per generation.

A config is all that separates two models of one generation: it is stored in every file that wkv
writes and inferred from names and shapes when an official checkpoint is read. Field names are the
official ones (`n_layer`, `n_embd`, `dim_att`, `dim_ffn`); ranks are the widths of low-rank pairs.

Published sizes are known by name: `RWKV7Config.named("0.1B")`, `RWKV4Config.named("169M")`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args, get_type_hints

from .errors import ConfigError

PILE_VOCABULARY = 50277  # the 20B tokenizer of the Pile models
WORLD_VOCABULARY = 65536  # 65529 World tokens, id 0, and padding

Recompute = Literal["nothing", "cheap", "blocks"]  # for the gradients: see RWKV.run_block

_LARGEST = 2**31 - 1  # no published size comes near; keeps products of two sizes inside 64 bits


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every generation shares. Use one of RWKV4Config ... RWKV7Config."""

    generation: ClassVar[int]
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]]  # published names -> the fields that differ

    vocab_size: int
    n_layer: int
    n_embd: int
    dim_att: int
    dim_ffn: int
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    ffn_activation: Literal["relu2", "relu"] = "relu2"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            _check_field(type(self).__name__, field.name, hints[field.name], getattr(self, field.name))

    @classmethod
    def named(cls, name: str, **overrides: Any) -> Self:
        """The published size `name`, e.g. "169M" or "0.1B"; keyword arguments replace fields."""
        for known, fields in cls.sizes.items():
            if known.lower() == name.lower():
                return cls(**{**fields, **overrides})
        raise ConfigError(
            f"RWKV-{cls.generation} has no size named {name!r}",
            f"one of {', '.join(cls.sizes)}",
            f"{cls.__name__}(n_layer=..., n_embd=..., ...) for a size of your own",
        )

    @classmethod
    def of_size(cls, *, vocab_size: int, n_layer: int, n_embd: int, **overrides: Any) -> Self:
        """A new model of any size, in the official proportions; keyword arguments replace fields."""
        sizes = {"vocab_size": vocab_size, "n_layer": n_layer, "n_embd": n_embd, "dim_att": n_embd}
        return cls(**{**sizes, **cls._proportions(n_embd), **overrides})

    @classmethod
    def _proportions(cls, n_embd: int) -> dict[str, int]:
        return {"dim_ffn": 4 * n_embd}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the generation; `config_from_dict` is the inverse."""
        return {"generation": self.generation, **dataclasses.asdict(self)}

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class RWKV4Config(Config):
    """RWKV-4 ("Dove"): a per-channel exponential average (Peng et al. 2023)."""

    generation: ClassVar[int] = 4
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Peng et al. 2023, table 2. The World models of the same shapes: vocab_size=65536.
        name: dict(
            vocab_size=PILE_VOCABULARY, n_layer=n_layer, n_embd=width, dim_att=width, dim_ffn=4 * width,
        )
        for name, n_layer, width in [
            ("169M", 12, 768), ("430M", 24, 1024), ("1.5B", 24, 2048),
            ("3B", 32, 2560), ("7B", 32, 4096), ("14B", 40, 5120),
        ]
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HeadsConfig(Config):
    """Generations 5 to 7 split the width into heads, each with a matrix for a memory. Use RWKV5Config ..."""

    head_size: int = 64
    group_norm_eps: float = 64e-5  # official: 1e-5 x 8^2, whatever the head size
    time_state: bool = False  # `att.time_state`: a learned initial state (state tuning)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim_att % self.head_size:
            raise ConfigError(
                f"dim_att={self.dim_att} is not a multiple of head_size={self.head_size}",
                "whole heads",
                "a head_size that divides dim_att",
            )

    @property
    def n_head(self) -> int:
        return self.dim_att // self.head_size


def _three_and_a_half(width: int) -> int:
    return int(3.5 * width) // 32 * 32


@dataclass(frozen=True, kw_only=True)
class RWKV5Config(HeadsConfig):
    """RWKV-5 ("Eagle"): a matrix per head with a fixed decay (Peng et al. 2024).

    `minor`: 0 one decay per head, no gate; 1 adds the gate; 2 one decay per channel (all World models).
    `bonus`: the name decides the meaning. "time_faaaa" is u itself, "time_first" is log u (5.0 and 5.1).
    """

    generation: ClassVar[int] = 5
    minor: Literal[0, 1, 2] = 2
    bonus: Literal["time_faaaa", "time_first"] = "time_faaaa"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minor == 2 and self.bonus == "time_first":
            raise ConfigError(
                "RWKV-5.2 with bonus='time_first' is ambiguous: programs disagree whether it is u or log u",
                "bonus='time_faaaa'",
            )

    @classmethod
    def _proportions(cls, n_embd: int) -> dict[str, int]:
        return {"dim_ffn": _three_and_a_half(n_embd)}

    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: dict(
            vocab_size=WORLD_VOCABULARY, n_layer=n_layer, n_embd=width, dim_att=width,
            dim_ffn=_three_and_a_half(width),
        )
        for name, n_layer, width in [
            ("0.1B", 12, 768), ("0.4B", 24, 1024), ("1.5B", 24, 2048), ("3B", 32, 2560), ("7B", 32, 4096),
        ]
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RWKV6Config(HeadsConfig):
    """RWKV-6 ("Finch", x060): token shift and decay depend on the data (Peng et al. 2024)."""

    generation: ClassVar[int] = 6
    mix_rank: int = 32
    decay_rank: int = 64

    @classmethod
    def _proportions(cls, n_embd: int) -> dict[str, int]:
        return {"dim_ffn": _three_and_a_half(n_embd)}

    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: dict(
            vocab_size=WORLD_VOCABULARY, n_layer=n_layer, n_embd=width, dim_att=width,
            dim_ffn=_three_and_a_half(width),
            mix_rank=64 if width == 4096 else 32, decay_rank=128 if width == 4096 else 64,
        )
        for name, n_layer, width in [
            ("0.1B", 12, 768), ("0.4B", 24, 1024), ("1.6B", 24, 2048),
            ("3B", 32, 2560), ("7B", 32, 4096), ("14B", 61, 4096),
        ]
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RWKV7Config(HeadsConfig):
    """RWKV-7 ("Goose", x070): the memory is erased and rewritten by a delta rule (Peng et al. 2025).

    Layer 0 has no earlier value to mix in, yet many official files carry
    `blocks.0.att.v0..v2`. They are kept, unused, so that such a file can be written back unchanged:
    `first_value_rank` is their rank, which need not be that of the other layers (0: absent).
    """

    generation: ClassVar[int] = 7
    decay_rank: int = 64  # w1, w2
    rate_rank: int = 64  # a1, a2: the in-context learning rate
    value_rank: int = 32  # v1, v2: the value residual
    gate_rank: int = 128  # g1, g2
    first_value_rank: int = 0  # rank of the unused blocks.0.att.v1, v2; 0: the file has none

    @classmethod
    def _proportions(cls, n_embd: int) -> dict[str, int]:
        def rank(factor: float) -> int:  # a multiple of 32 that grows with the root of the width
            return max(32, 32 * round(factor * n_embd**0.5 / 32))

        ranks = {
            "decay_rank": rank(2.5),
            "rate_rank": rank(2.5),
            "value_rank": rank(1.7),
            "gate_rank": rank(5),
        }
        return {"dim_ffn": 4 * n_embd, **ranks}

    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: dict(
            vocab_size=WORLD_VOCABULARY, n_layer=n_layer, n_embd=width, dim_att=width, dim_ffn=4 * width,
            decay_rank=ranks[0], rate_rank=ranks[1], value_rank=ranks[2], gate_rank=ranks[3],
        )
        for name, n_layer, width, ranks in [
            ("0.1B", 12, 768, (64, 64, 32, 128)), ("0.4B", 24, 1024, (64, 64, 32, 128)),
            ("1.5B", 24, 2048, (96, 96, 64, 256)), ("2.9B", 32, 2560, (96, 96, 64, 320)),
            ("7.2B", 32, 4096, (128, 128, 96, 480)), ("13.3B", 61, 4096, (192, 192, 128, 384)),
        ]
    }  # fmt: skip


CONFIGS: dict[int, type[Config]] = {
    c.generation: c for c in (RWKV4Config, RWKV5Config, RWKV6Config, RWKV7Config)
}


def config_from_dict(fields: Mapping[str, Any]) -> Config:
    """The config that `to_dict` wrote. An unknown key raises ConfigError and names the nearest field."""
    fields = dict(fields)
    generation = fields.pop("generation", None)
    if not isinstance(generation, int) or generation not in CONFIGS:
        raise ConfigError(f"generation is {generation!r}", f"one of {list(CONFIGS)}")
    cls = CONFIGS[generation]
    known = {field.name: field for field in dataclasses.fields(cls)}
    for key in fields:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ConfigError(f"{cls.__name__} has no field {key!r}", f"one of {', '.join(known)}", near[0])
    missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in fields]
    if missing:
        raise ConfigError(f"{cls.__name__} lacks {', '.join(missing)}", "every size")
    return cls(**fields)


def _check_field(owner: str, name: str, kind: Any, value: Any) -> None:
    choices = get_args(kind)
    if choices:
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            raise ConfigError(f"{owner}.{name} is {value!r}", f"one of {', '.join(map(repr, choices))}")
    elif kind is bool or kind is str:
        if not isinstance(value, kind):
            raise ConfigError(f"{owner}.{name} is {value!r}", kind.__name__)
    elif kind is int:
        smallest = 0 if name == "first_value_rank" else 1
        if not isinstance(value, int) or isinstance(value, bool) or not smallest <= value <= _LARGEST:
            raise ConfigError(f"{owner}.{name} is {value!r}", f"a whole number from {smallest} to {_LARGEST}")
    elif kind is float and not (isinstance(value, int | float) and 0 < value < 1):
        raise ConfigError(f"{owner}.{name} is {value!r}", "a number between 0 and 1")
