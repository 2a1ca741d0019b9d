"""The orders of reading: what each step sees, that nothing is lost, and that any place can be found again."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from wkv.errors import InputError
from wkv.training.data.batches import (
    IGNORE,
    Batch,
    Batches,
    magic_prime,
    make_batches,
    n_longer_documents,
    permuted,
)

ORDERS = ["magic", "shuffled", "documents", "streams"]
SEPARATOR = 0


class Tokens:
    """What the orders need of a token file, out of lists; it notes the largest stretch that was read."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.tokens = np.array([token for document in documents for token in document], dtype=np.int32)
        self.ends = np.cumsum([len(document) for document in documents])
        self.n_tokens, self.n_documents = len(self.tokens), len(documents)

    def document(self, i: int) -> np.ndarray[Any, Any]:
        return self.tokens[self.ends[i - 1] if i else 0 : self.ends[i]]


def numbered(sizes: list[int]) -> Tokens:
    """Documents of these sizes whose every token is another number, from 1 on: what was read can be told."""
    numbers = iter(range(1, sum(sizes) + 1))
    return Tokens([[next(numbers) for _ in range(size)] for size in sizes])


SIZES = [3, 10, 1, 0, 25, 7, 7, 2, 40, 8, 9, 1, 5, 0, 6, 11]
DATA = numbered(SIZES)
PREDECESSOR = {
    token: int(document[i - 1]) if i else SEPARATOR
    for document in map(DATA.document, range(DATA.n_documents))
    for i, token in enumerate(document.tolist())
}
FIRST = {token for token, before in PREDECESSOR.items() if before == SEPARATOR}


def make(order: str, data: Tokens = DATA, *, batch_size: int = 3, context: int = 8, seed: int = 0) -> Batches:
    return make_batches(
        data,  # type: ignore[arg-type]
        order=order, batch_size=batch_size, context=context, seed=seed, separator=SEPARATOR,
    )  # fmt: skip


def learnt(batch: Batch) -> Counter[int]:
    return Counter(batch.targets[batch.targets != IGNORE].tolist())


def same(a: Batch, b: Batch) -> bool:
    starts = a.starts is b.starts or (
        a.starts is not None and b.starts is not None and torch.equal(a.starts, b.starts)
    )
    return (
        torch.equal(a.tokens, b.tokens)
        and torch.equal(a.targets, b.targets)
        and starts
        and a.carried == b.carried
    )


# All orders


@pytest.mark.parametrize("order", ORDERS)
def test_a_batch_has_the_promised_shapes_and_every_target_follows_its_token(order: str) -> None:
    batches = make(order)
    for _ in range(30):
        batch = batches.next()
        assert batch.tokens.shape == batch.targets.shape == (3, 8)
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert batch.carried == (order == "streams")
        if order in ("magic", "shuffled"):  # documents are no borders here: 1, 2, 3, ... throughout
            assert batch.starts is None
            assert torch.equal(batch.targets, batch.tokens + 1)
        else:
            assert batch.starts is not None
            assert batch.starts.dtype == torch.bool
            pairs = zip(batch.tokens.flatten().tolist(), batch.targets.flatten().tolist(), strict=True)
            assert all(token == PREDECESSOR.get(target, SEPARATOR) for token, target in pairs)


@pytest.mark.parametrize("order", ORDERS)
def test_after_a_seek_to_any_place_the_batches_are_the_same(order: str) -> None:
    straight, places, epochs = make(order), [], []
    expected = []
    while straight.epoch < 3:
        places.append(json.dumps(straight.position()))
        epochs.append(straight.epoch)
        expected.append(straight.next())
    again = make(order)
    for i in reversed(range(len(places))):
        again.seek(json.loads(places[i]))
        assert again.epoch == epochs[i]
        assert json.dumps(again.position()) == places[i]
        for batch in expected[i : i + 12]:
            assert same(again.next(), batch)


@pytest.mark.parametrize("order", ["shuffled", "documents", "streams"])
def test_the_order_belongs_to_the_seed_and_to_the_epoch(order: str) -> None:
    def first_epochs(seed: int) -> list[list[list[int]]]:
        batches, epochs = make(order, numbered([8] * 30), batch_size=1, seed=seed), [[], []]
        while batches.epoch < 2:
            epochs[batches.epoch].append(batches.next().targets.tolist())
        return epochs

    first, second = first_epochs(0)
    assert first != second
    assert [first, second] == first_epochs(0)
    assert first != first_epochs(1)[0]


class Watched:
    """An array on disk: taking a stretch of it is free, and how much is read in the end is noted."""

    def __init__(self, array: np.ndarray[Any, Any], read: list[int]) -> None:
        self.array, self.read = array, read

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, key: int | slice) -> Any:
        part = self.array[key]
        return Watched(part, self.read) if isinstance(key, slice) else part

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        self.read.append(len(self))
        return np.array(self.array, dtype=dtype)


@pytest.mark.parametrize("order", ORDERS)
def test_only_what_a_batch_holds_is_read_from_the_file(order: str) -> None:
    data = numbered([5000, 3, 4, 20000, 7])
    read: list[int] = []
    data.tokens = Watched(data.tokens, read)  # type: ignore[assignment]
    batches = make(order, data)
    for _ in range(10):
        read.clear()
        batches.next()
        assert 24 <= sum(read) <= 27 if order in ("magic", "shuffled") else sum(read) <= 24


@pytest.mark.parametrize("order", ORDERS)
def test_arguments_out_of_range_are_named(order: str) -> None:
    with pytest.raises(InputError, match="batch_size is 0"):
        make(order, batch_size=0)
    with pytest.raises(InputError, match="context is -1"):
        make(order, context=-1)
    with pytest.raises(InputError, match="context of 135 tokens is longer than the data, which has 135"):
        make(order, context=DATA.n_tokens)
    for empty in (Tokens([]), Tokens([[]])):
        with pytest.raises(InputError, match="0 tokens"):
            make(order, empty)
    with pytest.raises(InputError, match="separator is -1"):
        make_batches(DATA, order=order, batch_size=1, context=4, separator=-1)  # type: ignore[arg-type]
    other = make(ORDERS[ORDERS.index(order) - 1])
    with pytest.raises(InputError, match=f"Expected: '{order}'"):
        make(order).seek(other.position())


def test_an_unknown_order_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'sorted'\. Expected: magic, shuffled, documents or streams"):
        make("sorted")


# The official windows


@pytest.mark.parametrize(
    ("n_tokens", "context", "prime"),
    [(1498226207, 512, 2926181), (1498226207, 4096, 365759), (200499, 4096, 47), (30, 10, 2), (24, 8, 2)],
)
def test_the_prime_is_the_official_one(n_tokens: int, context: int, prime: int) -> None:
    assert magic_prime(n_tokens, context) == prime


def test_less_data_than_the_official_order_needs_is_refused() -> None:
    with pytest.raises(InputError, match=r"longer than a third of the data.*at least 24 tokens"):
        make("magic", numbered([23]))


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_official_windows_are_those_of_the_formula(batch_size: int) -> None:
    context, data = 4, numbered([7] * 300)
    p = 521  # the largest prime = 2 modulo 3 of at most 2100 // 4 - 1
    batches = make("magic", data, batch_size=batch_size, context=context)
    rows = torch.cat([batches.next().tokens for _ in range(3 * p // batch_size)])
    for k, row in enumerate(rows.tolist(), 1):
        place = (int(p * ((math.sqrt(5) - 1) / 2)) * k * k * k) % p * context
        assert row == list(range(place + 1, place + 1 + context))  # token i of the data is i + 1


def test_consecutive_official_samples_visit_every_slot_but_the_first_once() -> None:
    context, data = 4, numbered([7] * 300)
    p = magic_prime(data.n_tokens, context)
    batches = make("magic", data, batch_size=1, context=context)
    slots = []
    for number in range(2 * p):
        assert batches.epoch == number // p
        slots.append((int(batches.next().tokens[0, 0]) - 1) // context)
    assert sorted(slots[: p - 1]) == list(range(1, p))
    assert slots[p - 1] == 0
    assert slots[p:] == slots[:p]


# Shuffled windows


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4096, 4097])
def test_the_random_order_visits_every_number_once(n: int) -> None:
    assert sorted(permuted(i, n, "key") for i in range(n)) == list(range(n))


def test_the_random_order_has_no_pattern() -> None:
    n, keys = 8, 4000
    counts = Counter((i, permuted(i, n, str(key))) for key in range(keys) for i in range(n))
    expected = keys / n
    chi_squared = sum((counts[i, j] - expected) ** 2 / expected for i in range(n) for j in range(n))
    assert chi_squared < 49 + 5 * math.sqrt(2 * 49)  # (n - 1)^2 degrees of freedom, five deviations
    order = np.array([permuted(i, 3000, "key") for i in range(3000)])
    for distance in (1, 2, 7):  # neighbours in the order are no neighbours in the file
        correlation = np.corrcoef(order[:-distance], order[distance:])[0, 1]
        assert abs(correlation) < 5 / math.sqrt(3000)


@pytest.mark.parametrize("n_tokens", [9, 10, 16, 17, 24, 25, 26, 100, 129])
def test_an_epoch_of_windows_reads_no_token_twice_and_leaves_out_less_than_two_windows(n_tokens: int) -> None:
    context = 8
    batches = make("shuffled", numbered([n_tokens]), batch_size=1, context=context)
    for epoch in range(5):
        seen: Counter[int] = Counter()
        while batches.epoch == epoch:
            seen += learnt(batches.next())
        assert max(seen.values()) == 1
        assert sum(seen.values()) > n_tokens - 1 - 2 * context


def test_epochs_of_windows_cut_the_text_at_different_places() -> None:
    batches = make("shuffled", numbered([100]), batch_size=1)
    places = {epoch: set() for epoch in range(8)}
    while batches.epoch < 8:
        epoch = batches.epoch
        places[epoch].add(int(batches.next().tokens[0, 0]) % 8)
    assert all(len(remainders) == 1 for remainders in places.values())
    assert len(set.union(*places.values())) > 3


# Whole documents


@pytest.mark.parametrize("context", [1, 2, 5, 8, 25, 64])
def test_every_token_of_every_document_is_learnt_exactly_once_per_epoch(context: int) -> None:
    batches = make("documents", batch_size=1, context=context)
    for epoch in range(4):
        seen: Counter[int] = Counter()
        while batches.epoch == epoch:
            seen += learnt(batches.next())
        assert seen == Counter(DATA.tokens.tolist())


def test_documents_that_fit_are_never_cut_and_each_starts_fresh() -> None:
    batches = make("documents", context=16)
    while batches.epoch < 3:
        batch = batches.next()
        assert batch.starts is not None
        for tokens, targets, starts in zip(*(x.tolist() for x in batch[:3]), strict=True):
            for t, (token, target, fresh) in enumerate(zip(tokens, targets, starts, strict=True)):
                if target == IGNORE:  # padding: nobody's continuation
                    assert token == SEPARATOR
                    assert set(targets[t:]) == {IGNORE}
                    assert fresh == (targets[t - 1] != IGNORE)
                elif target in FIRST:
                    assert fresh
                elif fresh:  # a later piece of a document longer than the context, with the token before it
                    assert token == PREDECESSOR[target]
                    assert (target - next(f for f in sorted(FIRST, reverse=True) if f <= target)) % 16 == 0
                else:
                    assert t > 0
                    assert token == targets[t - 1]
    assert n_longer_documents(DATA, 16) == 2  # type: ignore[arg-type]


def test_rows_are_packed_nearly_full() -> None:
    generator = np.random.default_rng(0)
    sizes = np.minimum(generator.lognormal(4, 1, 1500).astype(int) + 1, 3000).tolist()
    batches = make("documents", numbered(sizes), batch_size=1, context=256)
    padding = rows = 0
    while batches.epoch == 0:
        padding += int((batches.next().targets == IGNORE).sum())
        rows += 1
    assert padding < 0.03 * rows * 256


# Streams


def test_streams_read_documents_from_end_to_end_without_padding() -> None:
    batches = make("streams", batch_size=3, context=8)
    rows: list[list[tuple[int, int, bool]]] = [[], [], []]
    for _ in range(100):
        batch = batches.next()
        assert batch.starts is not None
        for row, columns in zip(rows, zip(*(x.tolist() for x in batch[:3]), strict=True), strict=True):
            row += zip(*columns, strict=True)
    for row in rows:
        for token, target, fresh in row:
            assert target != IGNORE
            assert fresh == (target in FIRST)
            assert token == PREDECESSOR[target]
        for (_, target, _), (token, _, fresh) in pairwise(row):
            assert fresh or token == target  # goes on where it was, over the borders of batches too


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_streams_begin_every_document_once_per_epoch_on_the_row_that_is_through_first(
    batch_size: int,
) -> None:
    context = 8
    batches = make("streams", batch_size=batch_size, context=context)
    columns = [torch.cat(x, dim=1) for x in zip(*(batches.next()[1:3] for _ in range(60)), strict=True)]
    begun = sorted((t, row) for row, t in columns[1].nonzero().tolist())
    first_tokens = [int(columns[0][row, t]) for t, row in begun]
    for epoch in range(3):
        assert set(first_tokens[epoch * len(FIRST) : (epoch + 1) * len(FIRST)]) == FIRST


def test_streams_of_another_number_of_rows_are_refused() -> None:
    with pytest.raises(InputError, match="3 streams, the batches have 2"):
        make("streams", batch_size=2).seek(make("streams").position())
