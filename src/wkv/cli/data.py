"""`wkv data`: text into token files, and what such files hold."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from .common import UsageError, human_bytes, print_line

if TYPE_CHECKING:
    from ..training.data import Data, TokenData
    from ..training.data.pack import Progress

CONTEXTS = (512, 1024, 4096)  # for which `info` gives the magic prime, as official launch lines want it

_EPILOGUE = "Every command takes --help, and --debug to show tracebacks."

data = App(
    name="data",
    usage="wkv data COMMAND",
    help="Pack text into tokens, or look into a pack.",
    help_epilogue=f"""Examples:

    wkv data pack notes/ --tokenizer world --out packed
    wkv data info packed

{_EPILOGUE}""",
    version_flags=(),
)


@data.command(usage="wkv data pack SRC... --tokenizer T --out DIR [OPTIONS]", help_epilogue=_EPILOGUE)
def pack(
    *sources: str,
    tokenizer: str,
    out: str,
    held_out: float = 0.05,
    seed: int = 0,
    field: str = "text",
    workers: int | None = None,
) -> None:
    """Encode text once, into a folder that wkv train reads.

    Reads text files, folders, "patterns/**/*.txt", .jsonl, .npy, .bin/.idx,
    or the word stdlib. Prints documents, tokens, bytes per token, and what
    was skipped and why.

    Examples:

        wkv data pack stdlib --tokenizer bytes --out packed
        wkv data pack notes/ "books/**/*.txt" --tokenizer world --out packed
        wkv data pack chats.jsonl --tokenizer tokenizer.json --out packed

    Parameters
    ----------
    sources
        what to read
    tokenizer
        world, bytes or a tokenizer.json
    out
        the folder to write; it is new, or empty
    held_out
        share of the documents for validation
    seed
        of their choice
    field
        where the text is in a JSONL line
    workers
        processes; without it, one per core
    """
    if not sources:
        raise UsageError(
            "there is nothing to pack",
            "files or folders",
            "wkv data pack stdlib --tokenizer bytes --out packed",
        )
    from ..tokenizers import named
    from ..training.data import pack as pack_files

    with show_packing() as show:
        report = pack_files(
            sources,
            named(tokenizer),
            out,
            held_out=held_out,
            seed=seed,
            field=field,
            workers=(os.cpu_count() or 1) if workers is None else workers,
            progress=show,
        )
    for line in str(report).splitlines():
        print_line(line)


@data.command(usage="wkv data tokenizer SRC... --vocab-size N --out FILE [OPTIONS]", help_epilogue=_EPILOGUE)
def tokenizer(
    *sources: str,
    vocab_size: int,
    out: str,
    held_out: float = 0.05,
    seed: int = 0,
    field: str = "text",
) -> None:
    """Make a tokenizer for a text: byte-level BPE, in a tokenizer.json.

    Documents that wkv data pack would hold out, with the same --held-out
    and --seed, are not looked at.

    Examples:

        wkv data tokenizer notes/ --vocab-size 4096 --out tokenizer.json
        wkv data pack notes/ --tokenizer tokenizer.json --out packed

    Parameters
    ----------
    sources
        what to read, as for wkv data pack
    vocab_size
        how many tokens; at least 257
    out
        the file to write
    held_out
        share of the documents for validation
    seed
        of their choice
    field
        where the text is in a JSONL line
    """
    if not sources:
        raise UsageError("there is nothing to read", "files or folders", "wkv data tokenizer stdlib ...")
    from ..training.data import make_tokenizer

    skipped = make_tokenizer(sources, out, vocab_size=vocab_size, held_out=held_out, seed=seed, field=field)
    left_out = f", {skipped.counts.total():,} files or lines skipped" if skipped.counts else ""
    print_line(f"{out}: {vocab_size:,} tokens{left_out}")


@contextlib.contextmanager
def show_packing() -> Iterator[Progress]:
    """What `pack` calls, with the documents, bytes, tokens and share of the sources so far."""
    from .progress import ProgressLine

    line, started = ProgressLine(), time.monotonic()

    def show(documents: int, n_bytes: int, tokens: int, share: float) -> None:
        rate = tokens / max(time.monotonic() - started, 1e-3)
        text = (
            f"packed {documents:,} documents, {human_bytes(n_bytes)}, {tokens:,} tokens, {rate:,.0f} tokens/s"
        )
        line.show(share, text)

    try:
        yield show
    finally:
        line.close()


@data.command(usage="wkv data info PATH [OPTIONS]", help_epilogue=_EPILOGUE)
def info(path: str, /, *, as_json: Annotated[bool, Parameter(name="--json")] = False) -> None:
    """Say what a packed folder or a token file holds.

    The magic primes are those that the official trainer wants to be told.

    Examples:

        wkv data info packed
        wkv data info corpus.bin --json

    Parameters
    ----------
    path
        a folder of wkv data pack, a .bin/.idx pair or a .npy file
    as_json
        print one JSON object instead
    """
    from ..training.data import open_data

    data = open_data(path)
    facts = {"path": path, **_facts(data)}
    if as_json:
        print(json.dumps(facts))
        return
    vocabulary = f", vocabulary {data.vocab_size:,}" if data.vocab_size else ""
    print_line(
        f"{path}: tokenizer {facts['tokenizer'] or 'not known'}{vocabulary}, separator {data.separator}"
    )
    for name, split in facts["splits"].items():
        _print_split(name, split)


def _facts(data: Data) -> dict[str, Any]:
    parts = {"train": (data.train, data.train_bytes), "val": (data.validation, data.validation_bytes)}
    return {
        "tokenizer": data.tokenizer,
        "vocab_size": data.vocab_size,
        "separator": data.separator,
        "splits": {
            name: _split_facts(part, n_bytes) for name, (part, n_bytes) in parts.items() if part is not None
        },
    }


def _split_facts(data: TokenData, n_bytes: int | None) -> dict[str, Any]:
    import numpy as np

    from ..errors import InputError
    from ..training.data import magic_prime

    primes = {}
    for context in CONTEXTS:
        with contextlib.suppress(InputError):  # too few tokens for this context
            primes[str(context)] = magic_prime(data.n_tokens, context)
    lengths = np.diff(data.ends, prepend=0)
    return {
        "file": str(data.path),
        "documents": data.n_documents,
        "tokens": data.n_tokens,
        "bytes": n_bytes,
        "dtype": data.tokens.dtype.name,
        "median_document": int(np.median(lengths)),
        "longest_document": int(lengths.max()),
        "fingerprint": data.fingerprint(),
        "magic_primes": primes,
    }


def _print_split(name: str, facts: dict[str, Any]) -> None:
    n_bytes, tokens = facts["bytes"], facts["tokens"]
    primes = [f"{prime} (context {context})" for context, prime in facts["magic_primes"].items()]
    rows = {
        "documents": f"{facts['documents']:,}: median {facts['median_document']:,} tokens, "
        f"longest {facts['longest_document']:,}",
        "tokens": f"{tokens:,} as {facts['dtype']}",
        "text": f"{human_bytes(n_bytes)}, {n_bytes / tokens:.3f} bytes per token" if n_bytes else "not known",
        "magic prime": ", ".join(primes) or f"none: fewer than {3 * CONTEXTS[0]:,} tokens",
        "fingerprint": facts["fingerprint"],
    }
    print_line(f"  {name}: {facts['file']}")
    for label, value in rows.items():
        print_line(f"    {label:<13}{value}")
