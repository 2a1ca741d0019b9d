"""Whether what a model wrote is Python: the parser of this interpreter decides."""

from __future__ import annotations

import ast
import textwrap
import warnings


def parses(lines: list[str]) -> bool:
    """Whether these lines are Python as they stand, at whatever depth of indentation they begin."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an invalid escape is still Python
        try:
            ast.parse(textwrap.dedent("\n".join(lines)))
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return False
    return True


def whole_lines(text: str) -> list[str]:
    """The lines of a text that was cut off somewhere: without the last, unless a line end follows it."""
    return text.split("\n")[:-1]


def longest_run(lines: list[str]) -> int:
    """How many lines the longest run of neighbouring lines has that parses; empty lines at its ends apart."""
    n = len(lines)
    for length in range(n, 0, -1):
        for start in range(n - length + 1):
            run = lines[start : start + length]
            if run[0].strip() and run[-1].strip() and parses(run):
                return length
    return 0
