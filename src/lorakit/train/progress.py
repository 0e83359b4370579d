"""Live progress line on the terminal, and rows of metrics.jsonl."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lorakit.storage.run_dir import RunDir, append_lines, append_metrics

# Minimum interval of printed lines without a terminal (a log file, CI, a notebook's pipe).
SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
    """Display of step, loss, tokens/s, remaining time and memory of a run.

    Args:
        run: run whose metrics.jsonl is written; None if another rank writes it.
    """

    def __init__(self, console: Console, run: RunDir | None, device: str) -> None:
        self.console = console
        self.run = run
        self.device = device
        self.last_line = 0.0
        self.warned = False
        self.unwritten: list[dict[str, Any]] = []
        self.bar: Progress | None = None
        self.task: Any = None

    def start(self, done: int, total: int) -> None:
        """Open the live bar (on a terminal) for steps `done` to `total`."""
        self.total = total
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(compact=True),
                console=self.console,
                transient=False,
            )
            self.task = self.bar.add_task("", total=total, completed=done, shown="")
            self.bar.start()

    def step(self, row: dict[str, Any]) -> None:
        """Record one logged step and refresh the display."""
        row["memory_gb"] = round(process_memory_bytes(self.device) / 1e9, 2)
        if self.run is not None:
            self._write(self.run, row)
        loss = "no finite loss" if row["loss"] is None else f"loss {row['loss']:.3f}"
        if row.get("rewards/margins") is not None:
            loss += f" · margin {row['rewards/margins']:.3f}"
        loss += f" · reward {row['reward']:.3f}" if "reward" in row else ""
        shown = f"{loss} · {row['tokens_per_second']:,.0f} tok/s · {row['memory_gb']:.1f} GB"
        if self.bar is not None:
            self.bar.update(self.task, completed=row["step"], shown=shown)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES or row["step"] == self.total:
            self.last_line = time.monotonic()
            left = (self.total - row["step"]) * row["seconds"]
            self.console.print(f"step {row['step']}/{self.total} · {shown} · {left:.0f} s left")

    def held_out(self, row: dict[str, Any]) -> None:
        """Record one evaluation between steps."""
        if self.run is not None:
            self._write(self.run, row)

    def examples(self, rows: list[dict[str, Any]]) -> None:
        """Record rollouts of a logged step; a full disk loses them, and training continues."""
        if self.run is not None and rows:
            with contextlib.suppress(OSError):
                append_lines(self.run.rollouts, rows)

    def _write(self, run: RunDir, row: dict[str, Any]) -> None:
        self.unwritten.append(row)
        try:
            append_metrics(run, self.unwritten)
            self.unwritten = []
        except OSError as error:  # training continues; the rows are written with the next ones
            if not self.warned:
                self.note(f"metrics.jsonl cannot be written: {error.strerror}; training continues")
            self.warned = True

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        (self.bar.console if self.bar else self.console).print(text)

    def stop(self) -> None:
        """Close the bar; safe to call twice."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def process_memory_bytes(device: str) -> int:
    """Peak bytes on the GPU since the run began, or this process's resident memory on a CPU."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_reserved())
    return int(psutil.Process().memory_info().rss)
