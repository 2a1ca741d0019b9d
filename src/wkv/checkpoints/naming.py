"""How errors of this room speak: every message names the file, and no name from a file is printed raw."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..errors import CheckpointError, Error


def shown(name: str) -> str:
    """A name out of a file, quoted and cut to a readable length (it may hold escape codes or be huge)."""
    return repr(name) if len(name) <= 80 else repr(name[:77] + "...")


def several(items: Sequence[str], limit: int = 3) -> str:
    """The first few and how many there are besides: "a, b, c and 4 more"."""
    first = ", ".join(items[:limit])
    return first if len(items) <= limit else f"{first} and {len(items) - limit} more"


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Puts the file's name before every error raised inside; an OSError becomes a CheckpointError."""
    try:
        yield
    except Error as error:
        raise type(error)(f"{os.fspath(path)}: {error.got}", error.expected, error.advice) from error
    except OSError as error:
        raise CheckpointError(
            f"{os.fspath(path)}: {error.strerror or error}", "a file that can be read"
        ) from error
