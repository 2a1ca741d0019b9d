"""What was computed for the beginnings of texts, found again by their tokens.

    cache = PrefixCache(budget=2**30)
    match = cache.find("alice", tokens)        # the longest beginning whose value is known
    ...                                        # read tokens[match.n_tokens :], with stops at match.borders
    cache.store("alice", tokens[:border], value, nbytes)

A state cannot be cut like a KV cache: it is there only for the places at which it was kept. `find` says which
places are worth it. Besides those that the caller knows, these are the places at which texts have parted: a
trie remembers the texts that were looked up, and where two of them differ, whatever comes next is likely to
share what is before.

Keys keep callers apart: nobody finds, or can measure, what was stored under another key. Values are never
looked into. When values and tokens together take more than `budget` bytes, those go that were not used for
longest.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

_NODE_BYTES = 400  # of a node's objects, about


class Match(NamedTuple):
    """What is known of a text.

    n_tokens  so long is the longest beginning that has a value; 0: none has
    value     that value; None: there is none
    borders   longer beginnings that other texts share, ascending: places where to keep one
    """

    n_tokens: int
    value: Any
    borders: Sequence[int]


class _Node:
    """The end of a beginning. `edge`: its tokens after those of the parent."""

    __slots__ = ("children", "edge", "nbytes", "parent", "value")

    def __init__(self, edge: array[int], parent: _Node | None) -> None:
        self.edge, self.parent = edge, parent
        self.children: dict[int, _Node] = {}
        self.value: Any = None
        self.nbytes = 0  # of the value

    @property
    def size(self) -> int:
        return _NODE_BYTES + self.edge.itemsize * len(self.edge) + self.nbytes


class PrefixCache:
    """A trie of token ids for each key. Not for use by several threads at a time.

    budget  bytes of values and of tokens, together with what Python needs to hold them
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.nbytes = budget, 0
        self._roots: dict[Hashable, _Node] = {}
        # Nodes that may go, the longest unused first: those with a value, and leaves.
        self._used: OrderedDict[_Node, Hashable] = OrderedDict()

    def __len__(self) -> int:
        """How many values there are."""
        return sum(node.value is not None for node in self._used)

    def find(self, key: Hashable, tokens: Sequence[int]) -> Match:
        """Look a text up, and remember it: a later one that parts from it will know where."""
        end = self._grow(key, tokens)
        borders: list[int] = []
        n_tokens, value, place = 0, None, 0
        for node in _path(end):
            place += len(node.edge)
            if node.value is not None:
                n_tokens, value, borders = place, node.value, []
                self._touch(node, key)
            elif place and (len(node.children) > 1 or (node.children and node is end)):
                borders.append(place)
        if end in self._used:
            self._touch(end, key)
        self._shrink()
        return Match(n_tokens, value, borders)

    def store(self, key: Hashable, tokens: Sequence[int], value: Any, nbytes: int) -> None:
        """Keep a value (not None) for a beginning. One that is larger than the whole budget is not kept."""
        if nbytes + _NODE_BYTES > self.budget:
            return
        node = self._grow(key, tokens)
        self.nbytes += nbytes - node.nbytes
        node.value, node.nbytes = value, nbytes
        self._touch(node, key)
        self._shrink()

    def forget(self, key: Hashable) -> None:
        """Drop everything of a key."""
        for node in [node for node, owner in self._used.items() if owner == key]:
            if node in self._used:  # a branch goes as a whole
                self._drop(node)

    def _grow(self, key: Hashable, tokens: Sequence[int]) -> _Node:
        """The node of a text, which is made where there is none."""
        if key not in self._roots:
            root = self._roots[key] = _Node(array("I"), None)
            self.nbytes += root.size
            self._touch(root, key)
        node, place = self._roots[key], 0
        while place < len(tokens):
            child = node.children.get(tokens[place])
            if child is None:
                child = self._attach(node, array("I", tokens[place:]))
                self._touch(child, key)
            else:
                same = _common(child.edge, tokens, place)
                if same < len(child.edge):
                    child = self._split(child, same)
            place += len(child.edge)
            node = child
        return node

    def _attach(self, parent: _Node, edge: array[int]) -> _Node:
        child = parent.children[edge[0]] = _Node(edge, parent)
        self.nbytes += child.size
        if parent.value is None:
            self._used.pop(parent, None)  # no leaf any more
        return child

    def _split(self, node: _Node, at: int) -> _Node:
        """A new node on the way to this one, after `at` tokens of its edge."""
        assert node.parent is not None
        middle = _Node(node.edge[:at], node.parent)
        node.parent.children[middle.edge[0]] = middle
        node.edge, node.parent = node.edge[at:], middle
        middle.children[node.edge[0]] = node
        self.nbytes += _NODE_BYTES
        return middle

    def _touch(self, node: _Node, key: Hashable) -> None:
        self._used[node] = key
        self._used.move_to_end(node)

    def _shrink(self) -> None:
        while self.nbytes > self.budget and self._used:
            self._drop(next(iter(self._used)))

    def _drop(self, node: _Node) -> None:
        """Forget a value, and what is left of the branch without it."""
        key = self._used.pop(node)
        self.nbytes -= node.nbytes
        node.value, node.nbytes = None, 0
        while not node.children and node.value is None:
            self._used.pop(node, None)
            self.nbytes -= node.size
            if node.parent is None:
                del self._roots[key]
                return
            parent = node.parent
            del parent.children[node.edge[0]]
            node = parent
        if len(node.children) == 1 and node.value is None and node.parent is not None:
            self._join(node)

    def _join(self, node: _Node) -> None:
        """Take a node off the way to its only child."""
        assert node.parent is not None
        (child,) = node.children.values()
        child.edge, child.parent = node.edge + child.edge, node.parent
        node.parent.children[child.edge[0]] = child
        self.nbytes -= _NODE_BYTES


def _path(end: _Node) -> Iterator[_Node]:
    """From the root to this node."""
    nodes = [end]
    while (parent := nodes[-1].parent) is not None:
        nodes.append(parent)
    return reversed(nodes)


def _common(edge: array[int], tokens: Sequence[int], place: int) -> int:
    """How many tokens of the edge the text has from `place` on."""
    n = min(len(edge), len(tokens) - place)
    return next((i for i in range(n) if edge[i] != tokens[place + i]), n)
