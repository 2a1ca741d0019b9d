"""`wkv convert`: the same model in another file format or dtype."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from .common import (
    MODEL_SUFFIXES,
    DtypeFlag,
    QuantizeFlag,
    UsageError,
    find_file,
    human_bytes,
    no_tokenizer,
    note,
    print_line,
    torch_dtype,
)

if TYPE_CHECKING:
    import torch

    from ..models import RWKV

CALIBRATION_ROWS, CALIBRATION_CONTEXT = 48, 512


def convert(
    source: str,
    target: str,
    /,
    *,
    dtype: DtypeFlag = None,
    quantize: QuantizeFlag = None,
    calibrate: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
) -> None:
    """Convert a checkpoint between .pth and .safetensors, or to another dtype.

    Without --dtype every number stays exactly as it is. An older TARGET is replaced only when the new file
    is complete.

    Examples:

        wkv convert model.pth model.safetensors
        wkv convert model.safetensors model.pth
        wkv convert model.pth small.safetensors --dtype bf16
        wkv convert model.pth small.safetensors --quantize int8
        wkv convert model.pth small.safetensors --quantize int4 --calibrate book.txt

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
    calibrate
        with int4: text like what the model will read, on which rounding then loses less; takes minutes
    """
    path = find_file(source, "a checkpoint, .pth or .safetensors")
    if not target.endswith(MODEL_SUFFIXES):
        raise UsageError(f"{target} has no known suffix", ".pth or .safetensors", f"{target}.safetensors")
    if calibrate and quantize != "int4":
        raise UsageError("--calibrate is given without --quantize int4", "both", "--quantize int4")
    from torch import promote_types, uint8

    from ..checkpoints import open_checkpoint
    from ..loading import load, save
    from ..models import build

    with open_checkpoint(path) as checkpoint:
        stored = set(checkpoint.dtypes.values())
    # A mixed file becomes its widest dtype throughout: that one holds the numbers of all the others.
    exact = functools.reduce(promote_types, stored - {uint8})  # bytes are those of a quantised file
    wanted = torch_dtype(dtype) or exact
    if calibrate:
        model = _calibrated(path, wanted, calibrate)
    else:
        model, _ = load(path, dtype=wanted, quantize=quantize)
    save(model, target)
    parameters = sum(weight.numel() for weight in build(model.config, device="meta").parameters())
    form = f"{model.quantization} and {_names({wanted})}" if model.quantization else _names({wanted})
    print_line(
        f"{target}: RWKV-{model.config.generation}, {parameters:,} parameters in {form} "
        f"(in {path}: {_names(stored)}), {human_bytes(Path(target).stat().st_size)}"
    )


def _calibrated(path: Path, dtype: torch.dtype, sources: tuple[str, ...]) -> RWKV:
    """In int4, by the first tokens of a text: in float32, whatever format the rest is to have."""
    import torch

    from ..loading import load
    from ..models.quantized import quantize
    from .reading import read_text

    model, tokenizer = load(path, dtype=torch.promote_types(dtype, torch.float32))
    if tokenizer is None:
        raise no_tokenizer(path, model.config.vocab_size, "the model's tokenizer.json in its folder")
    reading = read_text(sources, tokenizer, model.config.vocab_size, CALIBRATION_ROWS * CALIBRATION_CONTEXT)
    tokens = torch.tensor([token for document in reading.documents for token in document])
    width = min(len(tokens), CALIBRATION_CONTEXT)
    rows = tokens[: len(tokens) // width * width].view(-1, width)
    note(f"calibrating on {rows.numel():,} tokens")
    return quantize(model, "int4", rows).to(dtype)


def _names(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
