"""What general compressors make of a text: the yardstick beside a model's bits per byte.

A compressor is a language model without training. `gzip -9` sees 32 kB back, `xz -9` the whole
text; `xz` primed with the training text has, like the model, read that text first.
"""

from __future__ import annotations

import gzip
import lzma
from dataclasses import dataclass

_XZ_9_DICTIONARY_BYTES = 64 << 20  # what `xz -9` remembers


@dataclass(frozen=True)
class Compression:
    """Bits per byte of a text under each compressor."""

    gzip: float
    xz: float
    xz_primed: float


def measure_compression(text: bytes, *, primer: bytes) -> Compression:
    """`text` under `gzip -9`, `xz -9`, and `xz -9` that has read `primer`; `text` must not be empty.

    Takes about a second per megabyte of primer, and up to 700 MB of memory (the tables of `xz -9`).
    """
    return Compression(
        gzip=gzip_bits_per_byte(text),
        xz=8 * _xz_size(text) / len(text),
        xz_primed=8 * (_xz_size(primer + text) - _xz_size(primer)) / len(text),
    )


def gzip_bits_per_byte(text: bytes) -> float:
    """`gzip -9` alone, which takes no time; `text` must not be empty."""
    return 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text)


def _xz_size(text: bytes) -> int:
    # `xz -9`, except that the dictionary always holds the whole text: a primer must not be forgotten
    dictionary_bytes = max(_XZ_9_DICTIONARY_BYTES, len(text))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary_bytes}]
    return len(lzma.compress(text, format=lzma.FORMAT_XZ, filters=filters))
