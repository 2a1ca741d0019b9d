"""Model files: from bytes to named tensors and a config, and back. No file can run code.

    with open_checkpoint("model.pth") as checkpoint:
        checkpoint.config, checkpoint.shapes, checkpoint.read("emb.weight")

official.py     what official names and shapes mean
pth.py          the archives of torch.save (pickled.py reads the pickle inside as data)
safetensors.py  the format that wkv itself writes
atomic.py       how every file is written
"""

from __future__ import annotations

import stat
from os import PathLike
from pathlib import Path

from ..errors import CheckpointError, CorruptFileError
from .atomic import atomic_write, make_folder, sync_folder
from .base import QUANTIZATIONS, Checkpoint
from .naming import naming, several, shown
from .official import differences, infer_config
from .pth import PthCheckpoint, write_pth
from .safetensors import SafetensorsCheckpoint, model_metadata, read_safetensors, write_safetensors

__all__ = [
    "QUANTIZATIONS",
    "Checkpoint",
    "atomic_write",
    "differences",
    "infer_config",
    "make_folder",
    "model_metadata",
    "naming",
    "open_checkpoint",
    "read_safetensors",
    "several",
    "shown",
    "sync_folder",
    "write_pth",
    "write_safetensors",
]

# First bytes of files that people hand over instead of a checkpoint -> what they are -> the way out.
_OTHER_FILES = [
    (
        b"\x80",
        "a legacy torch file or another bare pickle",
        "torch.save(torch.load(path, weights_only=True), new_path)",
    ),
    (b"GGUF", "a GGUF file of llama.cpp", "the .pth that it was made from"),
    (b"fmgg", "a file of rwkv.cpp", "the .pth that it was made from"),
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file itself",
        "`git lfs pull`, or a direct download",
    ),
    (b"<", "a web page", "the link that downloads the file itself"),
]


def open_checkpoint(path: str | PathLike[str]) -> Checkpoint:
    """Open a model file; its first bytes, not its suffix, tell the format.

    CheckpointError, UnsafeFileError or CorruptFileError, each naming the file, when it is not a model
    that wkv can read; ConfigError when its stored config is impossible.
    """
    path = Path(path)
    with naming(path):
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError("not a regular file", "a .pth or .safetensors file")
        with path.open("rb") as file:
            head = file.read(32)
        if head.startswith(b"PK\x03\x04"):
            return PthCheckpoint(path)
        if head[8:9] == b"{":
            return SafetensorsCheckpoint(path)
        for start, meaning, advice in _OTHER_FILES:
            if head.startswith(start):
                raise CheckpointError(f"it is {meaning}", "a .pth or .safetensors file", advice)
        if not head.strip(b"\0"):
            raise CorruptFileError(
                "it is empty" if not head else "it begins with zeros", "a model", "a fresh copy"
            )
        raise CheckpointError("its content is unknown", "a .pth or .safetensors file of an RWKV model")
