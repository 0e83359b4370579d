"""Progress of an evaluation: a bar with the remaining time, or a line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class EvalProgress:
    """Progress of one task after the other on a console; None shows nothing."""

    def __init__(self, console: Console | None) -> None:
        self.console = console
        self.task = ""

    @contextmanager
    def stage(self, side: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
        """Show `total` requests to one model, of which `done` are already answered.

        Yields:
            A function to call with the number of further answers.
        """
        if self.console is None or done == total:
            yield lambda _: None
        elif self.console.is_terminal:
            with Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            ) as bar:
                shown = bar.add_task(f"{self.task} {side}", total=total, completed=done)
                yield lambda count: bar.advance(shown, count)
        else:
            yield _Lines(self.console, f"{self.task} {side}", total, done)


class _Lines:
    """A printed line from time to time, where no bar can be drawn."""

    def __init__(self, console: Console, name: str, total: int, done: int) -> None:
        self.console, self.name, self.total, self.begin, self.done = (
            console, name, total, done, done,
        )  # fmt: skip
        self.started = self.last = time.monotonic()

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = now
        left = (now - self.started) / (self.done - self.begin) * (self.total - self.done)
        self.console.print(f"{self.name}: {self.done} of {self.total} answers, {left:.0f} s left")
