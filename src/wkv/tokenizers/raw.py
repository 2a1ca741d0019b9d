"""Raw bytes as tokens: 256 ids, and the id of a byte is its value."""

from __future__ import annotations

from .base import PieceTokenizer


class Bytes(PieceTokenizer):
    """Every byte of the UTF-8 text is a token. There is no end of text: all 256 ids are taken."""

    def __init__(self) -> None:
        super().__init__("bytes", 256, end_of_text=None)

    def _encode(self, text: str) -> list[int]:
        return list(text.encode())

    def _piece(self, token: int, previous: int | None) -> bytes:
        return bytes((token,))
