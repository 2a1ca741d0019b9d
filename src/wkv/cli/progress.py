"""One line that keeps up with the work; lines that are said meanwhile stay above it."""

from __future__ import annotations

LINES = 20  # in all, where nothing can be drawn over


class ProgressLine:
    """A bar and a text on stderr. Where that is no terminal, every twentieth of the work prints the text."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = Console(stderr=True)
        columns = BarColumn(20), TextColumn("{task.description}", markup=False)
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=1.0)
        self._bar.start()
        self._printed = 0

    def show(self, done: float, text: str) -> None:
        """`done` of the work, 0 to 1."""
        self._bar.update(self._task, completed=done, description=text)
        if not self._console.is_terminal and int(LINES * done) > self._printed:
            self._printed = int(LINES * done)
            self.say(text)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()
