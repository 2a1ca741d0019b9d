"""A tokenizer made for a text: byte-level BPE, so that every text can be encoded and comes back exactly.

make_tokenizer(["stdlib"], "tokenizer.json", vocab_size=2048, held_out=0.05, seed=0)
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from ...errors import InputError
from .pack import draw
from .sources import Skipped, Text, read

END_OF_TEXT = "<|endoftext|>"  # id 0
_LEAST = 257  # a token for each byte, and the end of text


def make_tokenizer(
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    vocab_size: int,
    held_out: float = 0.05,
    seed: int = 0,
    field: str = "text",
) -> Skipped:
    """Write a tokenizer.json of `vocab_size` entries, learnt from the documents that training will see.

    `held_out` and `seed` are those of `pack`: documents that it holds out are not looked at here either.
    Returns what was skipped. InputError for a vocabulary below 257 or sources without text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from ...checkpoints import atomic_write  # here, as it needs torch, which packing does without

    if vocab_size < _LEAST:
        raise InputError(
            f"vocab_size is {vocab_size}", f"at least {_LEAST}: a token for each byte, and the end"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    skipped = Skipped()
    texts = (
        document.text
        for document in read(sources, skipped=skipped, field=field)
        if isinstance(document, Text) and draw(document, seed) >= held_out
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise InputError(
            f"the text is enough for {tokenizer.get_vocab_size()} tokens",
            f"{vocab_size}",
            "a smaller --vocab-size",
        )
    with atomic_write(out) as file:
        file.write(tokenizer.to_str(pretty=True).encode())
    return skipped
