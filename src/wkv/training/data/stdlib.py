"""Text to train on that every machine already has: Python's own standard library.

    documents = standard_library()                    # about 8.8 MB in 450 files on Python 3.11
    train, held_out = split(documents, seed=0)        # 5 % of the files are never trained on

Documents are raw bytes and one byte is one token, so nothing is decoded and nothing is lost.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import InputError

_LEFT_OUT = {
    # tests: ten times the library, and much of it data
    "test", "tests", "idle_test",
    # tables written as Python: a model that has learnt to count looks brilliant on them
    "encodings", "pydoc_data", "turtledemo",
    # applications that many distributions package apart: without them machines agree on the corpus
    "idlelib", "lib2to3",
    # other people's code
    "site-packages", "dist-packages",
}  # fmt: skip


class Document(NamedTuple):
    """One file: its path below the root, with forward slashes, and its bytes."""

    path: str
    text: bytes


def standard_library(root: Path | None = None) -> list[Document]:
    """The interpreter's own library modules, in path order; empty files are left out.

    `root` is the folder to read (default: where this interpreter keeps its library). Raises
    InputError when the folder holds fewer than 20 modules, as in a zipped or stripped installation.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        build_table = parts[-1].startswith("_sysconfigdata")  # how this interpreter was compiled
        if _LEFT_OUT.isdisjoint(parts[:-1]) and not build_table and (text := path.read_bytes()):
            documents.append(Document("/".join(parts), text))
    if len(documents) < 20:
        raise InputError(
            f"{root} holds {len(documents)} Python files",
            "the source code of the standard library",
            "an interpreter that keeps its library as .py files",
        )
    return sorted(documents)


def split(
    documents: Sequence[Document], *, seed: int, fraction: float = 0.05
) -> tuple[list[Document], list[Document]]:
    """Whole files held out, chosen by `seed`: (train, held out), each in the order of `documents`.

    Files, not a stretch at the end of the text: neighbours in a folder resemble each other, and the
    end of a library is whatever its alphabet ends with.
    """
    count = max(1, round(fraction * len(documents)))
    chosen = set(random.Random(seed).sample(range(len(documents)), count))
    train = [document for i, document in enumerate(documents) if i not in chosen]
    held_out = [document for i, document in enumerate(documents) if i in chosen]
    return train, held_out


def as_tokens(text: bytes) -> Tensor:
    """The bytes of `text` as int64 token ids (len(text),)."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
