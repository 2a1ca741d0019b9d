"""Any `tokenizer.json` of Hugging Face's `tokenizers`, among them the 20B tokenizer of the Pile models.

`tokenizers` encodes. Its `decode` replaces a part of a character by U+FFFD and so loses bytes; here the
bytes of each token are found instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import tokenizers

from ..errors import Error, InputError, TokenizerError
from .base import PieceTokenizer

_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # the file does not say which it is
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HuggingFaceTokenizer(PieceTokenizer):
    """The tokenizer that the bytes of a tokenizer.json describe. `name`: where they came from."""

    def __init__(self, data: bytes, name: str) -> None:
        with _failing_as(TokenizerError, f"{name!r} is not a tokenizer.json"):
            tokenizer = tokenizers.Tokenizer.from_buffer(data)
        # Both belong to batches of other models: a file may say that texts end after 512 tokens.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Nobody's text can spell a mark: "<|endoftext|>" in a text stays text, as it does in World.
        tokenizer.encode_special_tokens = True
        ids = tokenizer.get_vocab(with_added_tokens=True)
        if not ids:
            raise TokenizerError(f"{name!r} has no tokens", "a trained tokenizer")
        added = tokenizer.get_added_tokens_decoder()
        special = {token.content: number for number, token in added.items() if token.special}
        end_of_text = next((special[mark] for mark in _END_OF_TEXT if mark in special), None)
        super().__init__(name, max(ids.values()) + 1, end_of_text)
        self._tokenizer = tokenizer
        self._added = {number: token.content.encode() for number, token in added.items()}
        self._decoder = tokenizer.decoder
        kinds = tokenizer.decoder.__getstate__() if tokenizer.decoder else b""
        self._byte_level = b'"ByteLevel"' in kinds
        self._byte_fallback = b'"ByteFallback"' in kinds

    def _encode(self, text: str) -> list[int]:
        with _failing_as(InputError, f"the tokenizer {self.name!r} cannot encode the text"):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _piece(self, token: int, previous: int | None) -> bytes:
        spelling = self._spelling(token)
        if not spelling:
            return b""
        if self._byte_level:
            return self._added[token] if token in self._added else _spelt_bytes(spelling)
        if self._byte_fallback and (byte := _BYTE_TOKEN.fullmatch(spelling)):
            return bytes.fromhex(byte[1])
        if previous is None:
            return self._join([spelling]).encode()
        # A space before a token may depend on the token before it, and on that not being the first.
        before = ["x", self._spelling(previous)]
        return self._join([*before, spelling])[len(self._join(before)) :].encode()

    def _spelling(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or ""  # a vocabulary may have gaps

    def _join(self, spellings: list[str]) -> str:
        return self._decoder.decode(spellings) if self._decoder else " ".join(spellings)


@contextmanager
def _failing_as(kind: type[Error], got: str) -> Iterator[None]:
    """Whatever `tokenizers` raises becomes an error of ours, in one line."""
    try:
        yield
    except BaseException as error:
        # It raises Exception itself, and panics with a class that is neither one nor can be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).partition("\n")[0][:200]
        raise kind(f"{got}: {reason}", "what the package `tokenizers` understands") from None


def _byte_alphabet() -> dict[int, int]:
    """Byte-level vocabularies spell each byte as one printable character: the code point of each byte's.

    Printable Latin-1 stands for itself; the other bytes, in order, are the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {0x100 + i: byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _spelt_bytes(spelling: str) -> bytes:
    try:
        return bytes(_ALPHABET[ord(character)] for character in spelling)
    except KeyError:  # not spelt in the alphabet: plain text, as `tokenizers` reads it too
        return spelling.encode()
