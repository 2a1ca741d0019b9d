"""Official names and shapes, and the config that they announce.

An official checkpoint is a bag of named tensors: no config, any order of keys. Its generation follows
from which names exist, its sizes from their shapes:

    RWKV-7     att.r_k (H, N), att.x_r ...     ranks: columns of w1, a1, g1, and of v1 in layer 1
    RWKV-6     att.time_maa_x ...              ranks: columns of time_maa_w1 / 5 and time_decay_w1
    RWKV-5.2   att.ln_x, att.gate, att.time_decay (H, N)
    RWKV-5.1   att.ln_x, att.gate, att.time_decay (H,)
    RWKV-5.0   att.ln_x, no gate,  att.time_decay (H,)
    RWKV-4     att.time_mix_k, none of the above

What wkv cannot run (experimental variants, adapters, converted files) is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..config import Config, RWKV4Config, RWKV5Config, RWKV6Config, RWKV7Config
from ..errors import CheckpointError
from .naming import shown

# DeepSpeed saves `_forward_module.emb.weight`, some fine-tuning tools `model.emb.weight`.
_WRAPPERS = re.compile(r"(_forward_module\.|model\.)+")

_BLOCK = re.compile(r"blocks\.(0|[1-9]\d{0,5})\.(.*)", re.DOTALL)


def official_names(stored: Iterable[str]) -> dict[str, str]:
    """Official name -> name in the file. Wrapper prefixes are dropped; CheckpointError on a clash."""
    names: dict[str, str] = {}
    for name in stored:
        wrapper = _WRAPPERS.match(name)
        official = name[wrapper.end() :] if wrapper else name
        if official in names:
            raise CheckpointError(
                f"{shown(names[official])} and {shown(name)} are the same tensor twice", "every tensor once"
            )
        names[official] = name
    return names


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> Config:
    """The config of the model that tensors of these names and shapes make, in any order.

    Only what the config needs is looked at; whether every tensor is there and fits is for the loader.
    CheckpointError when the names are no RWKV-4 ... RWKV-7, or those of a variant that wkv cannot run.
    """
    names = official_names(shapes)
    refuse_foreign(names)
    generation = generation_of(names)
    return _INFER[generation](_Shapes({official: shapes[stored] for official, stored in names.items()}))


# What official names and shapes do not tell; official code always uses the defaults.
UNTOLD = ("norm", "ffn_activation", "group_norm_eps")


def differences(config: Config, inferred: Config) -> dict[str, tuple[Any, Any]]:
    """Field -> (its value, the value that names and shapes tell), where two configs of one generation differ.

    The value rank of a model of one layer is left out: no tensor has it.
    """
    told = inferred.to_dict()
    return {
        field: (value, told[field])
        for field, value in config.to_dict().items()
        if value != told[field] and not (field == "value_rank" and config.n_layer == inferred.n_layer == 1)
    }


def generation_of(names: Iterable[str]) -> int:
    """4, 5, 6 or 7, from official names. Any one mark is enough, so that a missing tensor stays an
    error about that tensor; CheckpointError when there is no mark at all."""
    inside = {match[2] for name in names if (match := _BLOCK.fullmatch(name))}
    for generation, marks in _MARKS.items():
        if not inside.isdisjoint(marks):
            return generation
    raise CheckpointError(
        "its names are not those of an RWKV model",
        "official names, such as 'emb.weight' and 'blocks.0.att.key.weight'",
        "the .pth or .safetensors file as its authors published it",
    )


_MARKS = {
    7: {"att.r_k", "att.k_k", "att.k_a", "att.w0", "att.a0", "att.x_r", "att.x_k", "ffn.x_k"},
    6: {"att.time_maa_x", "att.time_maa_w1", "att.time_maa_w2", "att.time_maa_k", "ffn.time_maa_k"},
    5: {"att.ln_x.weight", "att.ln_x.bias", "att.gate.weight", "att.time_mix_g"},
    4: {"att.time_mix_k", "att.time_mix_v", "att.time_mix_r"},
}


def count_layers(names: Iterable[str]) -> int:
    """The number of blocks; CheckpointError when their numbers have a gap."""
    blocks = {int(match[1]) for name in names if (match := _BLOCK.fullmatch(name))}
    absent = next(i for i in range(len(blocks) + 1) if i not in blocks)
    if absent < len(blocks):
        raise CheckpointError(
            f"block {absent} is missing, yet there is a block {max(blocks)}", "blocks without a gap"
        )
    return len(blocks)


class _Shapes:
    """Shapes by official name, read as so many axes: [1, 1, C] is also the vector [C]."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def of(self, name: str, axes: int) -> tuple[int, ...]:
        if name not in self.shapes:
            raise CheckpointError(f"tensor {name!r} is missing", "every tensor of the model")
        shape = self.shapes[name]
        while len(shape) > axes and shape[0] == 1:
            shape = shape[1:]
        if len(shape) != axes:
            raise CheckpointError(f"tensor {name!r} has the shape {list(self.shapes[name])}", f"{axes} axes")
        return shape

    def anywhere(self, suffix: str) -> bool:
        return any(name.endswith(suffix) for name in self.shapes)

    def common(self) -> dict[str, Any]:
        vocab_size, n_embd = self.of("emb.weight", 2)
        return {
            "vocab_size": vocab_size,
            "n_embd": n_embd,
            "n_layer": count_layers(self.shapes),
            "dim_att": self.of("blocks.0.att.key.weight", 2)[0],
            "dim_ffn": self.of("blocks.0.ffn.key.weight", 2)[0],
        }


def _infer_4(shapes: _Shapes) -> Config:
    return RWKV4Config(**shapes.common())


def _infer_5(shapes: _Shapes) -> Config:
    common = shapes.common()
    log_bonus, plain_bonus = shapes.anywhere(".att.time_first"), shapes.anywhere(".att.time_faaaa")
    if log_bonus and plain_bonus:
        raise CheckpointError(
            "both 'att.time_first' and 'att.time_faaaa' are there", "one name for the bonus"
        )
    decay = shapes.shapes.get("blocks.0.att.time_decay", ())
    while len(decay) > 1 and decay[-1] == 1:
        decay = decay[:-1]
    per_channel = len(decay) > 1
    if per_channel:
        head_size = shapes.of("blocks.0.att.time_decay", 2)[1]
        if log_bonus:
            raise CheckpointError(
                "a decay per channel (RWKV-5.2) beside 'att.time_first', which means log u in official "
                "files and u in converted ones",
                "'att.time_faaaa', the bonus of RWKV-5.2",
                "the .pth file that this one was converted from",
            )
    else:
        heads = (decay or shapes.of("blocks.0.att.time_decay", 1))[0]
        if heads == 0 or common["dim_att"] % heads:
            raise CheckpointError(
                f"'blocks.0.att.key.weight' has {common['dim_att']} rows for {heads} heads", "whole heads"
            )
        head_size = common["dim_att"] // heads
    gated = shapes.anywhere(".att.gate.weight") or shapes.anywhere(".att.time_mix_g")
    if per_channel and not gated:
        raise CheckpointError("a decay per channel, but no 'att.gate.weight'", "the gate of RWKV-5.2")
    return RWKV5Config(
        **common,
        head_size=head_size,
        minor=2 if per_channel else 1 if gated else 0,
        bonus="time_first" if log_bonus else "time_faaaa",
        time_state=shapes.anywhere(".att.time_state"),
    )


def _infer_6(shapes: _Shapes) -> Config:
    return RWKV6Config(
        **shapes.common(),
        head_size=shapes.of("blocks.0.att.time_faaaa", 2)[1],
        mix_rank=shapes.of("blocks.0.att.time_maa_w1", 2)[1] // 5,
        decay_rank=shapes.of("blocks.0.att.time_decay_w1", 2)[1],
        time_state=shapes.anywhere(".att.time_state"),
    )


def _infer_7(shapes: _Shapes) -> Config:
    common = shapes.common()
    # Layer 0 has no use for v0, v1, v2: files carry them or not, at a rank of their own or not.
    first = shapes.of("blocks.0.att.v1", 2)[1] if "blocks.0.att.v1" in shapes else 0
    value_rank: dict[str, Any] = (
        {"value_rank": shapes.of("blocks.1.att.v1", 2)[1]} if common["n_layer"] > 1 else {}
    )
    return RWKV7Config(
        **common,
        **value_rank,
        head_size=shapes.of("blocks.0.att.r_k", 2)[1],
        decay_rank=shapes.of("blocks.0.att.w1", 2)[1],
        rate_rank=shapes.of("blocks.0.att.a1", 2)[1],
        gate_rank=shapes.of("blocks.0.att.g1", 2)[1],
        first_value_rank=first,
        time_state=shapes.anywhere(".att.time_state"),
    )


_INFER = {4: _infer_4, 5: _infer_5, 6: _infer_6, 7: _infer_7}

_ORIGINAL = "the official .pth that it was made from"
_PLAIN_MODEL = "a published RWKV-4, 5, 6 or 7 model without this extension"

# Names (official, or what remains of a name without its wrapper) -> what they mean -> the way out.
_FOREIGN = [
    (
        r"_strategy|_version|_rescale_layer",
        "a file that the `rwkv` package converted for one strategy (transposed and rescaled)",
        _ORIGINAL,
    ),
    (r".*\.weight_(mx|rx|my|ry)|.*_(mx|rx|my|ry)", "8-bit weights (mm8) of the `rwkv` package", _ORIGINAL),
    (
        r".*\.(lora_[AB]|lora\.[01]|init_lora_[AB]|disha|bone)(\..*)?",
        "an adapter (LoRA, PiSSA, Bone), which is not a whole model",
        "merging it into its base model first",
    ),
    (
        r"layers\..*|embeddings\..*|lm_head\..*|norm\..*",
        "the Hugging Face layout of flash-linear-attention",
        _ORIGINAL,
    ),
    (r"rwkv\.(blocks|embeddings|ln_out)\..*", "the Hugging Face layout", _ORIGINAL),
    (r"(blocks\.\d+\.)?pos_emb(_[xy])?", "a position embedding (pos_emb)", _PLAIN_MODEL),
    (r"blocks\.\d+\.ffnPre\..*", "a channel mix before the first time mix (ffnPre)", _PLAIN_MODEL),
    (r"(blocks\.\d+\.)?tiny_.*", "tiny attention (tiny_ln, tiny_q, tiny_k, tiny_v)", _PLAIN_MODEL),
    (r"head_[qk]\..*|copy_mask", "the head-QK copy attention", _PLAIN_MODEL),
    (r"blocks\.\d+\.ffn\.(aa|bb)\..*", "the MishGLU channel mix", _PLAIN_MODEL),
    (r"blocks\.\d+\.att\.(qq|kk|vv|oo)\..*", "RWKV-4a, with attention beside the time mix", _PLAIN_MODEL),
    (r"blocks\.\d+\.att\.gate_w[12]", "the experimental RWKV-6 x060a", _PLAIN_MODEL),
    (r"blocks\.\d+\.att\.time_maa_rkvw_w[12]", "the experimental RWKV-6 x060b or x060c", _PLAIN_MODEL),
    (r"blocks\.\d+\.qkv\..*", "RWKV-7b (DeepEmbed attention) or the RWKV-8 hybrid", _PLAIN_MODEL),
    (r"blocks\.\d+\.ffn\.enn\..*", "the RWKV-8 preview", _PLAIN_MODEL),
    (r"blocks\.\d+\.ffn\.s(_emb.*|[012])", "RWKV-7a (DeepEmbed)", _PLAIN_MODEL),
    (
        r"blocks\.\d+\.att\.time_mix_([xw]|w[12])",
        "the layout of web-rwkv (renamed and transposed)",
        _ORIGINAL,
    ),
]


def refuse_foreign(names: Iterable[str]) -> None:
    """CheckpointError when a name belongs to something that wkv knows and cannot run."""
    names = list(names)
    for pattern, meaning, advice in _FOREIGN:
        compiled = re.compile(pattern, re.DOTALL)
        for name in names:
            if compiled.fullmatch(name):
                raise CheckpointError(
                    f"{shown(name)} is a mark of {meaning}", "a plain RWKV-4, 5, 6 or 7", advice
                )
    if names and all(name.endswith(".att.time_state") for name in names):
        raise CheckpointError(
            "it holds only 'att.time_state' tensors: a tuned initial state without its model",
            "a whole model",
            "merging it into the model that it was tuned for",
        )
