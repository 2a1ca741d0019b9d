"""Text to token ids and back: World, raw bytes, and any tokenizer.json.

    tokenizer = named("world")            # or "bytes", or the path of a tokenizer.json
    ids = tokenizer.encode("Grüße")
    stream = tokenizer.stream_decoder()   # never half a character
    text = "".join(map(stream.push, ids)) + stream.finish()

All text is plain text: no tokenizer adds marks to it or reads "<|endoftext|>" as one; marks are given by
id. Join pieces of text before encoding them: in general encode(a + b) is not encode(a) + encode(b).
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from ..errors import TokenizerError
from .base import StreamDecoder, padded
from .raw import Bytes
from .rwkv_world import VOCAB_SIZE, VOCABULARY_FILE, World, is_world_vocabulary, world

__all__ = [
    "StreamDecoder",
    "Tokenizer",
    "World",
    "bytes_",
    "check_fits",
    "for_checkpoint",
    "from_file",
    "named",
    "world",
]

_LARGEST_FILE = 64 * 2**20  # the largest in use, of 250 000 tokens, are a quarter of it


class Tokenizer(Protocol):
    """What the rest of wkv needs of a tokenizer."""

    @property
    def name(self) -> str:
        """`named(name)` gives this tokenizer again."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that `encode` can give."""

    @property
    def end_of_text(self) -> int | None:
        """The id that stands between texts, decoded to nothing; None where there is none."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. InputError when it is not a str of valid Unicode."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The exact bytes that `ids` stand for. InputError on an id out of range."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. InputError on an id out of range."""

    def stream_decoder(self) -> StreamDecoder:
        """A new decoder for tokens that arrive one at a time."""


def bytes_() -> Tokenizer:
    """Raw bytes: 256 ids, the id of a byte is its value, no end of text."""
    return Bytes()


def from_file(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a tokenizer.json or of the World vocabulary file, told apart by content.

    TokenizerError when the file is missing, damaged, larger than 64 MB or something else.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        kind = "is a folder" if os.path.isdir(name) else "is not there"
        raise TokenizerError(f"{name!r} {kind}", "the path of a tokenizer.json")
    try:
        with open(name, "rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise TokenizerError(f"{name!r} cannot be read: {error.strerror}", "a readable file") from None
    if len(data) > _LARGEST_FILE:
        raise TokenizerError(f"{name!r} is larger than 64 MB", "a tokenizer.json of a few MB")
    if is_world_vocabulary(data):
        return world()
    # Here, because importing `tokenizers` takes longer than everything else that `wkv --help` does.
    from .huggingface import HuggingFaceTokenizer

    return HuggingFaceTokenizer(data, name)


def named(name_or_path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer "world", "bytes", or that of a file. TokenizerError names the nearest name."""
    name = os.fspath(name_or_path)
    known: dict[str, Callable[[], Tokenizer]] = {"world": world, "bytes": bytes_}
    if name.lower() in known:
        return known[name.lower()]()
    if os.path.exists(name) or os.path.basename(name) != name or name.endswith(".json"):
        return from_file(name)
    near = difflib.get_close_matches(name.lower(), known, n=1)
    raise TokenizerError(
        f"no tokenizer is named {name!r}",
        "'world', 'bytes' or the path of a tokenizer.json",
        *map(repr, near),
    )


def for_checkpoint(path: str | os.PathLike[str], vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a model: from a file beside its checkpoint, else by its vocabulary size.

    A file whose tokenizer does not fit the vocabulary is passed over; one that cannot be read raises
    TokenizerError. None when nothing fits.
    """
    folder = Path(path).parent
    # tokenizer.json belongs to the model that shares its folder. The other two are often left in a folder
    # of many models, where 20B's ids would pass as ids of World: they must have the right size as well.
    for filename, exact in (("tokenizer.json", False), ("20B_tokenizer.json", True), (VOCABULARY_FILE, True)):
        if (folder / filename).exists():
            tokenizer = from_file(folder / filename)
            largest = padded(tokenizer.vocab_size) if exact else math.inf
            if tokenizer.vocab_size <= vocab_size <= largest:
                return tokenizer
    for size, make in ((VOCAB_SIZE, world), (256, bytes_)):
        if size <= vocab_size <= padded(size):
            return make()
    return None


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """TokenizerError when `tokenizer` can give ids that a model of `vocab_size` entries does not have."""
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"the tokenizer {tokenizer.name!r} has ids up to {tokenizer.vocab_size - 1}, "
            f"the model a vocabulary of {vocab_size}",
            f"ids below {vocab_size}",
            "the tokenizer that the model was trained with",
        )
