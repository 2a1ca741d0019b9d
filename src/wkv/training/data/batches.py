"""In which order a token file is read: four orders, each endless, and each able to go on from any place.

    batches = make_batches(data, order="documents", batch_size=8, context=512, seed=0, separator=0)
    batch = batches.next()            # tokens, targets, starts: (8, 512) each
    place = batches.position()        # a few numbers, ready for JSON
    batches.seek(place)               # the batches after this place once more, the very same

    magic      windows of the whole file as one stream of tokens, in the order of the official trainer
    shuffled   such windows, each epoch cut at another place and in an order of its own
    documents  whole documents, as many as fit, in every row; each starts from a fresh state
    streams    every row reads documents from end to end, batch after batch, and its state is handed over

The first two know nothing of documents. The last two read a document as [separator] + document[:-1] and
learn document: the separator, after which the state is fresh, predicts the first token, and every token is
learnt once per epoch, the separator that ends the document included.

Nothing is kept in memory but the place: a random order is a function of (seed, epoch, number), not a list.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from .binidx import TokenData

IGNORE = -100  # a target from which nothing is learnt

_LOOK_AHEAD = 64  # pieces of documents among which the packing chooses


class Batch(NamedTuple):
    """What one step learns from: B rows of T tokens.

    tokens   (B, T) int64
    targets  (B, T) int64, the token after each; IGNORE where nothing is to be learnt
    starts   (B, T) bool, True where the state before the token is fresh; None for nowhere within a row
    carried  row b goes on where row b of the batch before ended: hand its state over
    """

    tokens: Tensor
    targets: Tensor
    starts: Tensor | None
    carried: bool


class Batches(Protocol):
    """Batches without end, from any place."""

    @property
    def epoch(self) -> int:
        """How often the data was read to its end before what the next batch begins with."""

    def next(self) -> Batch:
        """The batch at this place, which moves on."""

    def position(self) -> dict[str, Any]:
        """The place, as plain numbers and lists."""

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go to a place. InputError for the place of another order or, in streams, batch size.

        Streams: whoever goes back to a place also hands over the state that belongs to it.
        """


def make_batches(
    data: TokenData, *, order: str, batch_size: int, context: int, seed: int = 0, separator: int = 0
) -> Batches:
    """Batches of `batch_size` rows of `context` tokens out of `data`.

    order      "magic", "shuffled", "documents" or "streams"
    seed       of the order; "magic" has only one
    separator  the token that stands before every document

    InputError for an unknown order, a size below 1, no documents, or a context longer than the data
    ("magic" wants three times the context).
    """
    for name, value in (("batch_size", batch_size), ("context", context)):
        if value < 1:
            raise InputError(f"{name} is {value}", "at least 1")
    if separator < 0:
        raise InputError(f"separator is {separator}", "a token id, 0 or above")
    if not data.n_documents or not data.n_tokens:
        raise InputError(f"the data holds {data.n_documents} documents and {data.n_tokens} tokens", "some")
    if context >= data.n_tokens:
        raise InputError(
            f"the context of {context} tokens is longer than the data, which has {data.n_tokens}",
            f"at most {data.n_tokens - 1}",
            "more data or a shorter context",
        )
    match order:
        case "magic":
            return _Windows(order, data, batch_size, context, *_magic(data.n_tokens, context))
        case "shuffled":
            return _Windows(order, data, batch_size, context, *_shuffled(data.n_tokens, context, seed))
        case "documents":
            return _Documents(data, batch_size, context, seed, separator)
        case "streams":
            return _Streams(data, batch_size, context, seed, separator)
    raise InputError(f"no order {order!r}", "magic, shuffled, documents or streams")


def n_longer_documents(data: TokenData, context: int) -> int:
    """How many documents the order "documents" cuts: those of more than `context` tokens."""
    return int(np.count_nonzero(np.diff(data.ends, prepend=0) > context))


def magic_prime(n_tokens: int, context: int) -> int:
    """The prime of the official order: the largest p = 2 modulo 3 of at most n_tokens // context - 1.

    Cubing permutes the numbers modulo such a prime. InputError below 3 * context tokens, where there is none.
    """
    for p in range(n_tokens // context - 1, 1, -1):
        if p % 3 == 2 and all(p % divisor for divisor in range(2, math.isqrt(p) + 1)):
            return p
    raise InputError(
        f"{n_tokens} tokens are too few for the official order: the context of {context} tokens is longer "
        "than a third of the data",
        f"at least {3 * context} tokens",
        "order shuffled, or a shorter context",
    )


def permuted(i: int, n: int, key: str) -> int:
    """Entry i of a pseudo-random order of 0 ... n - 1, one order per `key`.

    A Feistel network permutes the numbers of an even number of bits, whatever its round function is; a
    number that falls outside 0 ... n - 1 is sent through again until it comes back inside, which it does,
    since it walks along a cycle that it entered from inside. Constant memory, 2 walks on average.
    """
    half = max(1, -(-(n - 1).bit_length() // 2))
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for number in range(6):
            digest = blake2b(f"{key} {number} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(digest, "little") & mask
        i = left << half | right
        if i < n:
            return i


Start = Callable[
    [int], int
]  # number of a window, counted from 0 without end -> where it starts in the tokens


def _magic(n_tokens: int, context: int) -> tuple[Start, int]:
    """The official order and the samples in its epoch.

    Sample k, counted from 1, starts at ((f k^3) mod p) context. So a sample is found without those before,
    and the samples of a step are the same however many processes share it. Slot 0 comes last, at k = p.
    """
    p = magic_prime(n_tokens, context)
    f = int(p * ((math.sqrt(5) - 1) / 2))  # in double precision, as there: another rounding is another order
    return lambda number: f * (number + 1) ** 3 % p * context, p


def _shuffled(n_tokens: int, context: int, seed: int) -> tuple[Start, int]:
    """Windows end to end from a random place near the beginning, so that epochs cut the text differently."""
    n = max(1, (n_tokens - 1) // context - 1)
    spare = n_tokens - 1 - n * context

    def start(number: int) -> int:
        epoch, i = divmod(number, n)
        key = f"{seed} {epoch}"
        return permuted(i, n, key) * context + permuted(0, spare + 1, key + " offset")

    return start, n


class _Windows:
    """Stretches of context + 1 tokens, wherever documents end."""

    def __init__(
        self, order: str, data: TokenData, batch_size: int, context: int, start: Start, per_epoch: int
    ) -> None:
        self._order, self._data, self._batch_size, self._context = order, data, batch_size, context
        self._start, self._per_epoch = start, per_epoch
        self._read = 0  # windows so far

    @property
    def epoch(self) -> int:
        return self._read // self._per_epoch

    def next(self) -> Batch:
        places = [self._start(self._read + row) for row in range(self._batch_size)]
        self._read += self._batch_size
        windows = np.stack([self._data.tokens[i : i + self._context + 1] for i in places]).astype(np.int64)
        tokens, targets = torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, 1:].copy())
        return Batch(tokens, targets, None, carried=False)

    def position(self) -> dict[str, Any]:
        return {"order": self._order, "read": self._read}

    def seek(self, position: Mapping[str, Any]) -> None:
        _check_order(position, self._order)
        self._read = position["read"]


class _Piece(NamedTuple):
    """Tokens start ... stop - 1 of a document."""

    document: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def cut(self, size: int) -> tuple[_Piece, _Piece]:
        """The first `size` tokens, or all where there are fewer, and the rest."""
        middle = min(self.start + size, self.stop)
        return self._replace(stop=middle), self._replace(start=middle)


_NOTHING = _Piece(0, 0, 0)


class _Shuffle:
    """Documents one after another, each epoch in an order of its own."""

    def __init__(self, data: TokenData, seed: int) -> None:
        self._data, self._seed = data, seed
        self.drawn = 0

    @property
    def epoch(self) -> int:
        return self.drawn // self._data.n_documents

    def draw(self) -> _Piece:
        """The next document; it may have no tokens."""
        n = self._data.n_documents
        document = permuted(self.drawn % n, n, f"{self._seed} {self.epoch}")
        self.drawn += 1
        return _Piece(document, 0, len(self._data.document(document)))


class _Documents:
    """Rows of whole documents.

    A row begins with the piece that has waited longest, and takes the longest that still fits until none
    of those in sight does; the rest of it is padding. A document longer than the context is cut into pieces
    of its length, each of which starts from a fresh state with the token before it as first input. A row
    holds documents of one epoch only, so that an epoch's last few rows may be emptier.
    """

    def __init__(self, data: TokenData, batch_size: int, context: int, seed: int, separator: int) -> None:
        self._data, self._batch_size, self._context, self._separator = data, batch_size, context, separator
        self._shuffle = _Shuffle(data, seed)
        self._rest = _NOTHING  # of the document drawn last
        self._waiting: list[_Piece] = []
        self._epoch = 0  # of those waiting

    @property
    def epoch(self) -> int:
        return self._epoch if self._waiting else self._shuffle.epoch

    def next(self) -> Batch:
        rows = [self._row() for _ in range(self._batch_size)]
        return _fill(self._data, rows, self._context, self._separator, carried=False)

    def _row(self) -> list[_Piece]:
        self._look_ahead()
        while not self._waiting:
            self._epoch = self._shuffle.epoch
            self._look_ahead()
        row = [self._waiting.pop(0)]
        room = self._context - row[0].size
        while room:
            self._look_ahead()
            fitting = [piece for piece in self._waiting if piece.size <= room]
            if not fitting:
                break
            longest = max(fitting, key=lambda piece: piece.size)
            self._waiting.remove(longest)
            row.append(longest)
            room -= longest.size
        return row

    def _look_ahead(self) -> None:
        """Fill up those waiting, as far as the epoch goes."""
        while len(self._waiting) < _LOOK_AHEAD:
            if not self._rest.size:
                if self._shuffle.epoch > self._epoch:
                    return
                self._rest = self._shuffle.draw()
            piece, self._rest = self._rest.cut(self._context)
            if piece.size:
                self._waiting.append(piece)

    def position(self) -> dict[str, Any]:
        return {
            "order": "documents",
            "drawn": self._shuffle.drawn,
            "rest": list(self._rest),
            "waiting": [list(piece) for piece in self._waiting],
            "epoch": self._epoch,
        }

    def seek(self, position: Mapping[str, Any]) -> None:
        _check_order(position, "documents")
        self._shuffle.drawn, self._epoch = position["drawn"], position["epoch"]
        self._rest = _Piece(*position["rest"])
        self._waiting = [_Piece(*piece) for piece in position["waiting"]]


class _Streams:
    """Rows that read documents from end to end; the next document goes to the row that is through first."""

    def __init__(self, data: TokenData, batch_size: int, context: int, seed: int, separator: int) -> None:
        self._data, self._context, self._separator = data, context, separator
        self._shuffle = _Shuffle(data, seed)
        self._rest = [_NOTHING] * batch_size  # of the document that each row reads

    @property
    def epoch(self) -> int:
        return self._shuffle.epoch

    def next(self) -> Batch:
        rows: list[list[_Piece]] = [[] for _ in self._rest]
        filled = [(0, row) for row in range(len(rows))]  # the emptiest row first, of equals the upper one
        while filled:
            at, row = heapq.heappop(filled)
            while not self._rest[row].size:
                self._rest[row] = self._shuffle.draw()
            piece, self._rest[row] = self._rest[row].cut(self._context - at)
            rows[row].append(piece)
            if at + piece.size < self._context:
                heapq.heappush(filled, (at + piece.size, row))
        return _fill(self._data, rows, self._context, self._separator, carried=True)

    def position(self) -> dict[str, Any]:
        rest = [list(piece) for piece in self._rest]
        return {"order": "streams", "drawn": self._shuffle.drawn, "rest": rest}

    def seek(self, position: Mapping[str, Any]) -> None:
        _check_order(position, "streams")
        if len(position["rest"]) != len(self._rest):
            raise InputError(
                f"the place is of {len(position['rest'])} streams, the batches have {len(self._rest)}",
                "the batch size that the place was taken with",
            )
        self._shuffle.drawn = position["drawn"]
        self._rest = [_Piece(*piece) for piece in position["rest"]]


def _check_order(position: Mapping[str, Any], order: str) -> None:
    if position.get("order") != order:
        raise InputError(f"the place is of order {position.get('order')!r}", repr(order))


def _fill(
    data: TokenData, rows: Sequence[Sequence[_Piece]], context: int, separator: int, *, carried: bool
) -> Batch:
    """Each row's pieces one after another, then padding that continues nothing."""
    tokens = np.full((len(rows), context), separator, dtype=np.int64)
    targets = np.full_like(tokens, IGNORE)
    starts = np.zeros(tokens.shape, dtype=bool)
    for row, pieces in enumerate(rows):
        at = 0
        for piece in pieces:
            document, end = data.document(piece.document), at + piece.size
            targets[row, at:end] = document[piece.start : piece.stop]
            tokens[row, at + 1 : end] = targets[row, at : end - 1]
            if piece.start:
                tokens[row, at] = document[piece.start - 1]
            starts[row, at] = piece.start == 0 or not carried
            at = end
        starts[row, at : at + 1] = True  # of the padding, where there is any
    tokens_BT, targets_BT, starts_BT = map(torch.from_numpy, (tokens, targets, starts))
    return Batch(tokens_BT, targets_BT, starts_BT, carried)
