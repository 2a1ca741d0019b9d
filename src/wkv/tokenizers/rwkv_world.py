"""The World tokenizer: 65529 byte strings, and at each position of a text the longest that matches.

The vocabulary file has one line per token, `<id> <Python literal> <length in bytes>`. A str literal
stands for its UTF-8 bytes; a bytes literal spells a part of a character. Every single byte is a token, so
every text can be encoded. Id 0 is not in the file: it is the end of a text.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import TokenizerError
from .base import PieceTokenizer

if TYPE_CHECKING:
    from pyrwkv_tokenizer import RWKVTokenizer

VOCABULARY_FILE = "rwkv_vocab_v20230424.txt"
VOCAB_SIZE = 65530  # ids 0 to 65529
_SHA256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"  # with LF line ends


class World(PieceTokenizer):
    """`pyrwkv_tokenizer` encodes. It cannot decode for us: it panics on a part of a character."""

    def __init__(self, pieces: list[bytes]) -> None:
        super().__init__("world", len(pieces), end_of_text=0)
        self._pieces = pieces

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._encoder.encode(text)
        return ids

    def _piece(self, token: int, previous: int | None) -> bytes:
        return self._pieces[token]

    @functools.cached_property
    def _encoder(self) -> RWKVTokenizer:
        # Made when first needed: its tables take 250 MB and 0.25 s, and decoding needs neither.
        from pyrwkv_tokenizer import RWKVTokenizer

        return RWKVTokenizer()


@functools.cache
def world() -> World:
    """The World tokenizer, made once. TokenizerError when the installed vocabulary is missing or changed."""
    package = importlib.util.find_spec("pyrwkv_tokenizer")
    if package is None or package.origin is None:
        raise TokenizerError(
            "the package pyrwkv-tokenizer is not installed",
            "the World vocabulary, which it carries",
            "pip install pyrwkv-tokenizer",
        )
    path = Path(package.origin).with_name(VOCABULARY_FILE)
    data = path.read_bytes() if path.is_file() else b""
    if not is_world_vocabulary(data):
        raise TokenizerError(
            f"{str(path)!r} is not the World vocabulary as published",
            f"SHA-256 {_SHA256}",
            "pip install --force-reinstall pyrwkv-tokenizer",
        )
    return World([b"", *_parse(data)])


def is_world_vocabulary(data: bytes) -> bool:
    """Whether these are the bytes of the published file, with LF or CRLF line ends."""
    return hashlib.sha256(data.replace(b"\r\n", b"\n")).hexdigest() == _SHA256


def _parse(data: bytes) -> list[bytes]:
    """The tokens of the published file, from id 1 on: its lines are in order of their ids."""
    lines = data.decode().splitlines()
    literals = [line.partition(" ")[2].rpartition(" ")[0] for line in lines]
    tokens: list[bytes] = []
    # Hundreds of literals per call take a third of the time of one each; all at once would take 40 MB.
    for start in range(0, len(literals), 256):
        values = ast.literal_eval(f"[{','.join(literals[start : start + 256])}]")
        tokens += [value.encode() if isinstance(value, str) else value for value in values]
    return tokens
