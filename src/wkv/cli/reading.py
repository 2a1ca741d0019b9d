"""Texts for the commands that let a model read one: so many tokens of files, as documents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from ..tokenizers import Tokenizer


@dataclass(frozen=True)
class Reading:
    """What is read."""

    description: str
    documents: list[list[int]]
    separator: int = 0
    n_bytes: int | None = None  # None: the tokens are no text

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.documents))


def random_tokens(vocab_size: int, n_tokens: int) -> Reading:
    """One document of tokens drawn by lot, always the same."""
    import torch

    drawn = torch.randint(vocab_size, (n_tokens,), generator=torch.Generator().manual_seed(0))
    return Reading("random tokens, which are no text and have no bits per byte", [drawn.tolist()])


def read_text(sources: tuple[str, ...], tokenizer: Tokenizer, vocab_size: int, n_tokens: int) -> Reading:
    """The first tokens of these sources, or of the files that the model of wkv never saw.

    InputError where there is no text.
    """
    from ..pretrained import held_out_files
    from ..training.data import Skipped, read, standard_library
    from ..training.data.sources import Encoded

    separator, skipped = tokenizer.end_of_text or 0, Skipped()
    texts: Iterable[str | list[int]]
    if sources:
        found = read(sources, skipped=skipped, separator=separator, vocab_size=vocab_size)
        texts = (each.tokens.tolist() if isinstance(each, Encoded) else each.text for each in found)
        description = " ".join(sources)
    else:
        unseen = held_out_files()
        texts = (file.text.decode() for file in standard_library() if file.path in unseen)
        description = "files of Python's standard library that the model of wkv never saw"
    documents: list[list[int]] = []
    n_bytes, missing = 0, n_tokens
    for each in texts:
        ids = tokenizer.encode(each) if isinstance(each, str) else each
        ids = (ids if ids[-1:] == [separator] else [*ids, separator])[:missing]  # as a pack has it
        n_bytes += len(tokenizer.decode_bytes(ids[:-1] if ids[-1] == separator else ids))
        documents.append(ids)
        missing -= len(ids)
        if not missing:
            break
    if not n_bytes:
        reasons = f" (left out: {', '.join(skipped.counts)})" if skipped.counts else ""
        raise InputError(f"{description}: there is no text{reasons}", "text to read", "another file")
    return Reading(description, documents, separator, n_bytes)
