"""An RWKV-7 with official names as a GGUF file: names, layouts and formats are those that llama.cpp reads.

    converted(weights)            official names -> (GGUF name, numbers), one tensor after the other
    write_gguf(path, weights)     the file, in f16; llama.cpp itself makes the shorter formats out of it

Runs where `gguf` and numpy are, without torch and wkv. The file has no vocabulary: tokens are numbers.

Source: ggml-org/llama.cpp, src/models/rwkv7.cpp (names and shapes), conversion/ (which tensors stay float32).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_WHOLE = {"emb": "token_embd", "blocks.0.ln0": "token_embd_norm", "ln_out": "output_norm", "head": "output"}
_PARTS = {
    "ln1": "attn_norm",
    "ln2": "attn_norm_2",
    "att.ln_x": "time_mix_ln",
    "ffn.x_k": "channel_mix_lerp_k",
    "ffn.key": "channel_mix_key",
    "ffn.value": "channel_mix_value",
}
_MIXES = "rwkvag"  # the order of the token mixes in time_mix_lerp_fused
_UNUSED = re.compile(r"blocks\.0\.att\.v[012]")  # layer 0 has no earlier value to mix in
_LOW_RANK = re.compile(r"att\.[wavg][12]$")
_ALWAYS_FLOAT32 = re.compile(r"time_mix_(w[12]|lerp_fused)\.weight$")


def gguf_name(official: str) -> str:
    """`blocks.3.att.key.weight` -> `blk.3.time_mix_key.weight`."""
    place, _, kind = official.rpartition(".")
    if kind not in ("weight", "bias"):
        place, kind = official, "weight"
    if place in _WHOLE:
        return f"{_WHOLE[place]}.{kind}"
    _, layer, part = place.split(".", 2)
    return f"blk.{layer}.{_PARTS.get(part) or part.replace('att.', 'time_mix_')}.{kind}"


def converted(weights: Mapping[str, NDArray]) -> Iterator[tuple[str, NDArray]]:
    """Every tensor of the GGUF file: (name, float16 or float32).

    Matrices are (out, in), the low-rank pairs too, which official files hold transposed. Vectors have one
    axis; the six token mixes of a layer are one tensor (6, 1, 1, D). Layer 0 gets a copy of a0, a1, a2 where
    llama.cpp expects a v0, v1, v2 that it never uses.
    """
    for official in weights:
        if _UNUSED.match(official) or re.search(r"att\.x_[^r]$", official):
            continue
        if official.endswith("att.x_r"):
            place = official.removesuffix("x_r")
            mixes = [weights[f"{place}x_{c}"].reshape(1, 1, -1) for c in _MIXES]
            yield gguf_name(f"{place}lerp_fused"), np.stack(mixes).astype(np.float32)
            continue
        name, value = gguf_name(official), _laid_out(official, weights[official])
        short = value.ndim == 2 and not _ALWAYS_FLOAT32.search(name)
        value = np.ascontiguousarray(value, np.float16 if short else np.float32)
        yield name, value
        if re.match(r"blocks\.0\.att\.a[012]", official):
            yield name.replace("time_mix_a", "time_mix_v"), value


def _laid_out(official: str, value: NDArray) -> NDArray:
    if _LOW_RANK.search(official):
        return value.T
    is_matrix = official.endswith(".weight") and value.ndim == 2
    return value if is_matrix else value.reshape(-1)


def write_gguf(path: Path, weights: Mapping[str, NDArray]) -> None:
    """Write the whole file. weights: float32, official names, all layers."""
    import gguf

    vocabulary, width = weights["emb.weight"].shape
    rank = {c: weights[f"blocks.1.att.{c}1"].shape[1] for c in "wavg"}
    writer = gguf.GGUFWriter(path, "rwkv7")
    writer.add_context_length(2**20)  # no limit: the state has one size
    writer.add_embedding_length(width)
    writer.add_block_count(sum(name.endswith("ln1.weight") for name in weights))
    writer.add_layer_norm_eps(1e-5)
    writer.add_wkv_head_size(weights["blocks.0.att.r_k"].shape[1])
    writer.add_feed_forward_length(len(weights["blocks.0.ffn.key.weight"]))
    writer.add_decay_lora_rank(rank["w"])
    writer.add_iclr_lora_rank(rank["a"])
    writer.add_value_residual_mix_lora_rank(rank["v"])
    writer.add_gate_lora_rank(rank["g"])
    writer.add_head_count(0)  # wanted, not used
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(vocabulary)
    for name, value in converted(weights):
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
