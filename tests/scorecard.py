"""The score card of `make scorecard`: a line per promise, with what was tried, how often, and what was lost.

    @pytest.mark.scorecard("T11", "a run is killed while it removes old checkpoints")
    def test_...(card):
        for trial in range(card.count(quick=20, full=200)):
            ...
        card.record(tried=200)

The names T01, T02, ... are those of the project's list of acceptance tests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

# Tests that make a line of the card together, and know nothing of it: (name, what, which of them).
QUOTED = [
    ("T07", "hostile and damaged model files", r"test_hostile_files\.py"),
    ("T07", "hostile and damaged token files", r"test_binidx\.py"),
    (
        "T12",
        "unfit data: not UTF-8, empty, CRLF, BOM, 200 MB in a line, circular links, files that vanish",
        r"test_data_sources\.py::test_(every_kind_of_unfit|links|a_file_that|a_line_of|any_bytes|all_are_counted)",
    ),
    ("T13", "every form of every operator against its definition", r"test_ops\.py"),
]


@dataclass
class Line:
    tried: int = 0
    lost: int = 0
    of: str = ""
    failed: int = 0

    def __str__(self):
        if self.failed:
            return f"{self.tried:7,} tried   FAILED ({self.failed})"
        return f"{self.tried:7,} tried   lost: {f'{self.lost:,} {self.of}' if self.lost else 'nothing'}"


@dataclass
class Card:
    """What a test writes on the card."""

    full: bool
    properties: list

    def count(self, quick, full):
        """How often to try: few times in everyday runs."""
        return full if self.full else quick

    def record(self, tried, lost=0, of=""):
        """`tried` times, and that was all that it cost: 3 "steps", say."""
        self.properties.append(("scorecard result", [tried, lost, of]))


class ScoreCard:
    """The pytest plugin, `full` with --scorecard."""

    def __init__(self, full):
        self.full, self.lines = full, {}

    @pytest.fixture
    def card(self, request):
        return Card(self.full, request.node.user_properties)

    @pytest.hookimpl(tryfirst=True)  # before -m chooses
    def pytest_collection_modifyitems(self, items):
        for item in items if self.full else ():
            if item.get_closest_marker("slow"):
                continue
            for name, what, tests in QUOTED:
                if re.search(tests, item.nodeid):
                    item.add_marker(pytest.mark.scorecard(name, what))

    def pytest_runtest_setup(self, item):
        if marker := item.get_closest_marker("scorecard"):
            item.user_properties.append(("scorecard", marker.args))

    def pytest_runtest_logreport(self, report):
        properties = dict(report.user_properties)
        if "scorecard" not in properties or not (report.when == "call" or report.failed):
            return
        line = self.lines.setdefault(tuple(properties["scorecard"]), Line())
        line.failed += report.failed
        tried, lost, line.of = properties.get("scorecard result", (1, 0, ""))
        line.tried += tried
        line.lost += lost

    def pytest_terminal_summary(self, terminalreporter):
        if not self.full:
            return
        width = max((len(what) for _, what in self.lines), default=0)
        terminalreporter.section("score card")
        for (name, what), line in sorted(self.lines.items()):
            terminalreporter.write_line(f"{name}  {what:{width}}  {line}")
