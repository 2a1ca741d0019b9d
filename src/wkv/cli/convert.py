"""`wkv convert`: the same model in another file format or dtype."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from .common import (
    MODEL_SUFFIXES,
    DtypeFlag,
    QuantizeFlag,
    UsageError,
    find_file,
    human_bytes,
    print_line,
    torch_dtype,
)

if TYPE_CHECKING:
    import torch


def convert(
    source: str,
    target: str,
    /,
    *,
    dtype: DtypeFlag = None,
    quantize: QuantizeFlag = None,
) -> None:
    """Convert a checkpoint between .pth and .safetensors, or to another dtype.

    Without --dtype every number stays exactly as it is. An older TARGET is replaced only when the new file
    is complete.

    Examples:

        wkv convert model.pth model.safetensors
        wkv convert model.safetensors model.pth
        wkv convert model.pth small.safetensors --dtype bf16
        wkv convert model.pth small.safetensors --quantize int8

    Parameters
    ----------
    source
        a checkpoint, .pth or .safetensors, official or from wkv
    target
        the file to write; its suffix chooses the format
    dtype
        fp32, bf16, fp16 or fp64; without it, the file's own
    quantize
        int8 or int4: the matrices get 8 or 4 bits; TARGET is then a .safetensors file
    """
    path = find_file(source, "a checkpoint, .pth or .safetensors")
    if not target.endswith(MODEL_SUFFIXES):
        raise UsageError(f"{target} has no known suffix", ".pth or .safetensors", f"{target}.safetensors")
    from torch import promote_types, uint8

    from ..checkpoints import open_checkpoint
    from ..loading import load, save
    from ..models import build

    with open_checkpoint(path) as checkpoint:
        stored = set(checkpoint.dtypes.values())
    # A mixed file becomes its widest dtype throughout: that one holds the numbers of all the others.
    exact = functools.reduce(promote_types, stored - {uint8})  # bytes are those of a quantised file
    wanted = torch_dtype(dtype) or exact
    model, _ = load(path, dtype=wanted, quantize=quantize)
    save(model, target)
    parameters = sum(weight.numel() for weight in build(model.config, device="meta").parameters())
    form = f"{model.quantization} and {_names({wanted})}" if model.quantization else _names({wanted})
    print_line(
        f"{target}: RWKV-{model.config.generation}, {parameters:,} parameters in {form} "
        f"(in {path}: {_names(stored)}), {human_bytes(Path(target).stat().st_size)}"
    )


def _names(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
