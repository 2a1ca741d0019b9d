"""The one place where files become models, and models files.

    model, tokenizer = load("RWKV-x070-World-0.1B.pth")
    model, tokenizer = load()                            # the small one that comes with wkv
    save(model, "model.safetensors")

A model is first built without memory; then one tensor after the other is read, checked, and copied once
into memory of its own, in the dtype and on the device where it will be used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from . import tokenizers
from .checkpoints import (
    Checkpoint,
    differences,
    infer_config,
    model_metadata,
    naming,
    open_checkpoint,
    several,
    shown,
    write_pth,
    write_safetensors,
)
from .config import Config
from .errors import CheckpointError
from .models import RWKV, build
from .models.arena import Arena
from .models.quantized import QuantizedLinear
from .models.quantized import quantize as to_bits
from .models.quantized import stored as in_bits
from .pretrained import MODEL
from .tokenizers import Tokenizer

Shapes = Mapping[str, tuple[int, ...]]


def load(
    path: str | PathLike[str] = MODEL,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | str | PathLike[str] | None = None,
    quantize: str | None = None,
    verify: bool = True,
) -> tuple[RWKV, Tokenizer | None]:
    """The model in a file, in eval mode, and its tokenizer.

    path       an official .pth, a plain .safetensors with official names, or what `save` wrote; the
               content tells which. Without it, the small model that comes with wkv and writes Python
    dtype      of the weights; None keeps the file's (in a mixed file, the one of most of its numbers)
    tokenizer  a Tokenizer, a name ("world", "bytes") or the path of a tokenizer.json; None looks for a
               file beside the checkpoint, then goes by the vocabulary size, and may find none (None)
    quantize   "int8" or "int4": the matrices get 8 or 4 bits, for inference, one after the other. A file that
               has been quantised needs no word, and its original is not looked for
    verify     compare every tensor with the checksum in the file, and refuse values that are not finite

    Memory grows by the weights in their target dtype, and little more. On the CPU the embedding of a
    .safetensors stays in the file where it has that dtype, mapped: replace such a file while it is in use, as
    `save` does, but do not write into it. CheckpointError, CorruptFileError
    or UnsafeFileError when the file is no model, is damaged, lacks a tensor, has one too many or one of
    another shape, or tries more than to hold tensors; TokenizerError when the tokenizer does not fit.
    """
    with open_checkpoint(path) as checkpoint:
        dtype = dtype or _prevailing_dtype(checkpoint)
        model = build(checkpoint.config, device="meta", dtype=dtype)
        if checkpoint.quantization is not None:
            to_bits(model, checkpoint.quantization)
        blank = model.state_dict()  # on the meta device: shapes, dtype and memory layout, no memory
        shapes = {name: tuple(weight.shape) for name, weight in blank.items()}
        if quantize is not None and checkpoint.quantization is None:
            to_bits(model, quantize)
        elif quantize != checkpoint.quantization and quantize is not None:
            raise CheckpointError(
                f"{path} is in {checkpoint.quantization}, not in {quantize}",
                "weights in full",
                "its original file",
            )
        with naming(path):
            _check_names(checkpoint.config, expected=shapes, found=checkpoint.shapes)
        tokenizer = _tokenizer(tokenizer, path, checkpoint.config.vocab_size)
        weights: dict[str, Tensor] = {}
        stays = _stays_on_disk(checkpoint, dtype, device)
        empty_like = _allocator(model, device, without=stays)
        for name in checkpoint.names:
            stored = checkpoint.read(name, verify=verify)
            if verify:
                with naming(path):
                    _check_values(name, stored, dtype)
            stored = stored.reshape(shapes[name])
            place = name.rpartition(".")[0]
            module = model.get_submodule(place)
            if isinstance(module, QuantizedLinear) and checkpoint.quantization is None:
                for kind, buffer in in_bits(module, stored.to(device)).items():
                    weights[f"{place}.{kind}"] = empty_like(buffer).copy_(buffer)
            elif (stored.dtype == torch.uint8) != (blank[name].dtype == torch.uint8):
                raise CheckpointError(
                    f"{path}: tensor {shown(name)} holds {stored.dtype}", str(blank[name].dtype)
                )
            elif name == stays:
                weights[name] = _apart(stored)
            else:
                weights[name] = empty_like(blank[name]).copy_(stored)
    model.load_state_dict(weights, assign=True)
    return model.eval(), tokenizer


def _stays_on_disk(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str) -> str | None:
    """The embedding's name, if it may: it is read a row at a time."""
    name = "emb.weight"
    is_mapped = checkpoint.format == "safetensors" and torch.device(device).type == "cpu"
    return name if is_mapped and checkpoint.dtypes[name] == dtype else None


def _allocator(model: RWKV, device: torch.device | str, *, without: str | None) -> Callable[[Tensor], Tensor]:
    """Like torch.empty_like, for all weights of the model but that one."""
    if torch.device(device).type != "cpu":
        return partial(torch.empty_like, device=device)
    return Arena.like(*(x for name, x in model.state_dict().items() if name != without)).empty_like


def _apart(mapped: Tensor) -> Tensor:
    """The same numbers in the file, in a storage that ends where they do."""
    if mapped.data_ptr() % mapped.itemsize:
        return mapped.clone()
    return torch.from_numpy(mapped.view(torch.uint8).numpy()).view(mapped.dtype).view(mapped.shape)


def save(model: RWKV, path: str | PathLike[str]) -> None:
    """Write a model, atomically: `.pth` gives an official file, any other suffix safetensors.

    Both carry a SHA-256 per tensor; safetensors also the config. CheckpointError when the file cannot be
    written (a file of that name is then as it was), or when an official file cannot say what the model is.
    """
    weights = model.state_dict()
    if Path(path).suffix == ".pth":
        if model.quantization is not None:
            raise CheckpointError(
                f"a .pth file cannot hold a model in {model.quantization}",
                "weights in full",
                "the suffix .safetensors",
            )
        _check_official(model.config, {name: tuple(weight.shape) for name, weight in weights.items()})
        write_pth(path, weights)
    else:
        write_safetensors(path, weights, model_metadata(model.config, model.quantization))


def _prevailing_dtype(checkpoint: Checkpoint) -> torch.dtype:
    if checkpoint.quantization is not None:  # the bytes of its matrices say nothing
        return checkpoint.dtypes.get("emb.weight", torch.float32)
    numbers: Counter[torch.dtype] = Counter()
    for name, shape in checkpoint.shapes.items():
        numbers[checkpoint.dtypes[name]] += torch.Size(shape).numel()
    return numbers.most_common(1)[0][0]


def _tokenizer(
    choice: Tokenizer | str | PathLike[str] | None, path: str | PathLike[str], vocab_size: int
) -> Tokenizer | None:
    if choice is None:
        return tokenizers.for_checkpoint(path, vocab_size)
    chosen = tokenizers.named(choice) if isinstance(choice, str | PathLike) else choice
    tokenizers.check_fits(chosen, vocab_size)
    return chosen


def _check_names(config: Config, *, expected: Shapes, found: Shapes) -> None:
    """All tensors at once: each there, none besides, each of its shape (axes of length 1 do not count)."""
    missing = [shown(name) for name in expected if name not in found]
    extra = [shown(name) for name in found if name not in expected]
    misshapen = [
        f"{shown(name)} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and _without_ones(found[name]) != _without_ones(shape)
    ]
    wrong = [
        f"{len(names)} {problem} ({several(names)})"
        for problem, names in [("missing", missing), ("unknown", extra), ("misshapen", misshapen)]
        if names
    ]
    if wrong:
        raise CheckpointError(
            f"its tensors do not make the RWKV-{config.generation} that they announce: {'; '.join(wrong)}",
            f"the {len(expected)} tensors of {config.n_layer} layers",
            "the original file, complete",
        )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _check_values(name: str, stored: Tensor, dtype: torch.dtype) -> None:
    """Finite in the file and in the target dtype: two extremes tell, without a mask of the tensor's size."""
    extremes = torch.stack(torch.aminmax(stored))
    if not extremes.isfinite().all():
        raise CheckpointError(
            f"tensor {shown(name)} has values that are not finite",
            "finite weights",
            "an earlier checkpoint, or verify=False to load it all the same",
        )
    if not extremes.to(dtype).isfinite().all():
        raise CheckpointError(
            f"tensor {shown(name)} reaches {extremes.abs().max():.3g}, which {str(dtype)[6:]} cannot hold",
            f"values up to {torch.finfo(dtype).max:.3g}",
            "bfloat16 or float32",
        )


def _check_official(config: Config, shapes: Shapes) -> None:
    """An official file holds no config: whoever reads it takes what names and shapes tell."""
    for field, (value, told) in differences(config, infer_config(shapes)).items():
        raise CheckpointError(
            f"a .pth file cannot say that {field} is {value!r}: official code would run it with {told!r}",
            f"{field}={told!r}",
            "the suffix .safetensors, which keeps the config",
        )
