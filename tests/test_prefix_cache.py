"""The prefix cache: it finds what was stored and nothing else, and says where texts part."""

from __future__ import annotations

import random

import pytest

from wkv.inference.prefix_cache import PrefixCache


def cache(budget: int = 10**9) -> PrefixCache:
    return PrefixCache(budget)


def test_the_longest_beginning_with_a_value_is_found() -> None:
    it = cache()
    it.store("key", [1, 2], "short", 10)
    it.store("key", [1, 2, 3, 4], "long", 10)
    assert it.find("key", [1, 2, 3, 4, 5])[:2] == (4, "long")
    assert it.find("key", [1, 2, 3, 4])[:2] == (4, "long")
    assert it.find("key", [1, 2, 3, 5])[:2] == (2, "short")
    assert it.find("key", [1, 3])[:2] == (0, None)
    assert it.find("key", [])[:2] == (0, None)
    assert len(it) == 2


def test_a_key_finds_nothing_of_another() -> None:
    it = cache()
    it.store("alice", [1, 2, 3], "hers", 10)
    assert it.find("bob", [1, 2, 3]) == (0, None, [])
    assert it.find("alice", [1, 2, 3])[:2] == (3, "hers")


def test_where_texts_have_parted_is_a_border() -> None:
    it = cache()
    assert it.find("key", [1, 2, 3, 4, 5]).borders == []
    assert it.find("key", [1, 2, 3, 9, 9]).borders == [3]
    assert it.find("key", [1, 2, 8]).borders == [2]
    assert it.find("key", [1, 2, 3, 4, 5, 6]).borders == [2, 3]
    it.store("key", [1, 2, 3], "state", 10)
    assert it.find("key", [1, 2, 3, 4, 5]) == (3, "state", [5])


def test_a_text_that_another_goes_on_from_is_a_border() -> None:
    it = cache()
    it.find("key", [1, 2, 3])
    assert it.find("key", [1, 2, 3, 4]).borders == []  # its end was no place where texts parted
    assert it.find("key", [1, 2]).borders == [2]


def test_a_value_is_replaced() -> None:
    it = cache()
    it.store("key", [1], "old", 100)
    before = it.nbytes
    it.store("key", [1], "new", 50)
    assert it.find("key", [1]).value == "new"
    assert it.nbytes == before - 50
    assert len(it) == 1


def test_what_was_not_used_for_longest_goes_first() -> None:
    it = cache(budget=5000)
    for i in range(3):
        it.store("key", [i], i, 1000)
    it.find("key", [0])
    it.store("key", [3], 3, 1000)
    assert [it.find("key", [i]).value for i in (0, 2, 3, 1)] == [0, 2, 3, None]
    assert it.nbytes <= 5000


def test_a_value_on_the_way_and_a_text_without_one_count_as_used() -> None:
    it = cache(budget=10_000)
    it.store("key", [1], "on the way", 1000)
    it.find("key", [7, 7])
    it.store("key", [2], "unused", 1000)
    it.find("key", [1, 1])
    it.find("key", [7, 7])
    it.budget = it.nbytes - 1
    it.find("key", [1, 1])
    assert it.find("key", [7, 8]).borders == [1]
    assert it.find("key", [1]).value == "on the way"
    assert it.find("key", [2]).value is None


def test_what_is_left_of_a_branch_takes_no_more_than_if_it_had_never_parted() -> None:
    it = cache()
    it.store("key", [1, 2, 3], "x", 10)
    alone = it.nbytes
    it.find("key", [1, 2, 9])
    it.budget = alone
    it.find("key", [1, 2, 3])
    assert it.nbytes == alone
    assert it.find("key", [1, 2, 3]).value == "x"


def test_a_key_without_tokens_is_forgotten_too() -> None:
    it = cache(budget=5000)
    for i in range(1000):
        it.find(f"key {i}", [])
    assert it.nbytes <= 5000


def test_what_is_larger_than_the_budget_is_not_kept_and_throws_nothing_out() -> None:
    it = cache(budget=5000)
    it.store("key", [1], "small", 1000)
    it.store("key", [2], "huge", 10**6)
    assert it.find("key", [1]).value == "small"
    assert it.find("key", [2]).value is None


def test_texts_without_values_are_forgotten_too() -> None:
    it = cache(budget=20_000)
    for i in range(1000):
        it.find(f"key {i % 7}", [i] * 20)
    assert 0 < it.nbytes <= 20_000


def test_a_key_can_be_forgotten() -> None:
    it = cache()
    for key in "ab":
        it.store(key, [1, 2], "x", 10)
        it.store(key, [1, 2, 3], "y", 10)
        it.find(key, [1, 5])
    it.forget("a")
    assert it.find("a", [1, 2, 3]) == (0, None, [])
    assert it.find("b", [1, 2, 3]).value == "y"
    for key in "ab":
        it.forget(key)
    assert (len(it), it.nbytes) == (0, 0)


@pytest.mark.parametrize("seed", range(40))
def test_it_is_a_dictionary_of_beginnings_that_forgets(seed: int) -> None:
    draw = random.Random(seed)
    budget = draw.choice([3_000, 20_000, 10**9])
    it, stored = cache(budget), {}
    for _ in range(300):
        key = draw.choice("ab")
        tokens = tuple(draw.randint(0, 2) for _ in range(draw.randint(0, 8)))
        if draw.random() < 0.4:
            value = object()
            stored[key, tokens] = value
            it.store(key, tokens, value, draw.randint(0, 500))
        else:
            n, value, borders = it.find(key, tokens)
            known = [i for i in range(len(tokens) + 1) if (key, tokens[:i]) in stored]
            if value is None:
                assert n == 0
            else:
                assert stored[key, tokens[:n]] is value
            if budget == 10**9:
                assert n == max(known, default=0)
                assert value is (stored[key, tokens[:n]] if known else None)
            assert all(n < border <= len(tokens) for border in borders)
            assert list(borders) == sorted(set(borders))
        assert it.nbytes <= budget
    assert it.nbytes == sum(node.size for root in it._roots.values() for node in _nodes(root))


def _nodes(node):
    return [node, *(below for child in node.children.values() for below in _nodes(child))]
