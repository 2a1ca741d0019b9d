"""What training reads: documents out of files, token files, and the order in which they are read.

    sources.py  documents out of text files, folders, JSONL and token files
    pack.py     documents encoded once, in a folder that says what it is
    vocabulary.py  a tokenizer made for a text
    binidx.py   token files
    batches.py  batches out of them, in several orders
    stdlib.py   the text of the demo

The last two need torch and are imported when first used: packing does without it, in every process.
"""

from typing import TYPE_CHECKING, Any

from .binidx import TokenData, TokenWriter, open_tokens
from .pack import Data, PackReport, is_packed, open_data, pack
from .sources import Skipped, read
from .vocabulary import make_tokenizer

if TYPE_CHECKING:
    from .batches import IGNORE, Batch, Batches, magic_prime, make_batches
    from .stdlib import Document, as_tokens, split, standard_library

__all__ = [
    "IGNORE",
    "Batch",
    "Batches",
    "Data",
    "Document",
    "PackReport",
    "Skipped",
    "TokenData",
    "TokenWriter",
    "as_tokens",
    "is_packed",
    "magic_prime",
    "make_batches",
    "make_tokenizer",
    "open_data",
    "open_tokens",
    "pack",
    "read",
    "split",
    "standard_library",
]


def __getattr__(name: str) -> Any:
    if name in ("IGNORE", "Batch", "Batches", "magic_prime", "make_batches"):
        from . import batches

        return getattr(batches, name)
    if name in ("Document", "as_tokens", "split", "standard_library"):
        from . import stdlib

        return getattr(stdlib, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
