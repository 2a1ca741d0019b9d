"""What every tokenizer shares: checked input, text out of the bytes of tokens, and the same as a stream.

A tokenizer says which bytes one token stands for. The text of a sequence is the concatenation of these
bytes read as UTF-8, where bytes that are not UTF-8 become U+FFFD.
"""

from __future__ import annotations

import codecs
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import chain

from ..errors import InputError


def padded(vocab_size: int) -> int:
    """The largest vocabulary that a model may have for this tokenizer: the next multiple of 128.

    Models round their vocabulary up for the hardware (World 65530 to 65536, Pile 50277 to 50304), so a
    model can emit ids that no token has. They are valid and decode to nothing.
    """
    return -(-vocab_size // 128) * 128


class StreamDecoder:
    """Text out of tokens that arrive one at a time.

    Never half a character: bytes wait until their character is whole or can no longer become one.
    The results of every `push` and of `finish`, joined, are exactly `decode` of all the tokens.
    """

    def __init__(self, bytes_of: Callable[[int, int | None], bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._previous: int | None = None

    def push(self, token: int) -> str:
        """The text that `token` completes, often none. InputError on an id out of range."""
        new = self._bytes_of(token, self._previous)
        self._previous = token
        return self._utf8.decode(new)

    def finish(self) -> str:
        """What the waiting bytes amount to; after it the decoder is as new."""
        self._previous = None
        return self._utf8.decode(b"", final=True)


class PieceTokenizer(ABC):
    """A tokenizer that decodes token by token.

    `end_of_text` is a mark between texts: it decodes to nothing, and the token after it begins a text.
    """

    def __init__(self, name: str, vocab_size: int, end_of_text: int | None) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self.end_of_text = end_of_text

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """The ids of a text that is valid Unicode."""

    @abstractmethod
    def _piece(self, token: int, previous: int | None) -> bytes:
        """The bytes of a token below `vocab_size`. `previous` is None where a text begins."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; no mark is added. InputError when it is not a str of valid Unicode."""
        _check_text(text)
        return self._encode(text)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The exact bytes that `ids` stand for. InputError on an id out of range."""
        return b"".join(map(self._bytes_of, ids, chain([None], ids)))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. InputError on an id out of range."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream_decoder(self) -> StreamDecoder:
        return StreamDecoder(self._bytes_of)

    def _bytes_of(self, token: int, previous: int | None) -> bytes:
        try:
            number = operator.index(token)
        except TypeError:
            number = -1
        if not 0 <= number < padded(self.vocab_size):
            raise InputError(
                f"token id {token!r} is not an id of the tokenizer {self.name!r}",
                f"a whole number from 0 to {padded(self.vocab_size) - 1}",
            )
        if number >= self.vocab_size or number == self.end_of_text:
            return b""
        return self._piece(number, None if previous == self.end_of_text else previous)


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise InputError(f"the text is of type {type(text).__name__}", "str", "bytes.decode")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text is not valid Unicode: {text[error.start]!r} at character {error.start}",
            "text without lone surrogates",
            "UTF-8 input; bytes that are not UTF-8 turn into such characters when Python reads them",
        ) from None
