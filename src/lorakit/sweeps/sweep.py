"""A sweep as an object: its runs, the best of them, and their settings and losses as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import RenderableType

from lorakit.display.rich_output import Displayed
from lorakit.run import Run
from lorakit.sweeps.sweep_record import RunRecord, SweepDir, read_record
from lorakit.sweeps.sweep_view import sweep_view


class Sweep(Displayed):
    """The sweep in a folder; it displays itself as a table of its runs."""

    def __init__(self, path: str | Path) -> None:
        self.folder = SweepDir(Path(path))
        self.record = read_record(self.folder)

    @property
    def path(self) -> Path:
        """The sweep's folder."""
        return self.folder.path

    @property
    def page(self) -> Path:
        """The page that compares the runs."""
        return self.folder.page

    @property
    def runs(self) -> list[Run]:
        """The runs that have begun, in their order."""
        folders = [self.folder.run(run.name) for run in self.record.runs]
        return [Run(folder.path) for folder in folders if folder.has_run()]

    @property
    def best(self) -> Run | None:
        """The run with the lowest held-out loss; None if no runs can be compared."""
        best = self.record.best()
        return None if best is None else Run(self.folder.run(best.name).path)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A dict per run: name, settings, state, step, held_out, reason ..."""
        return [run_row(run) for run in self.record.runs]

    def __rich__(self) -> RenderableType:
        return sweep_view(self.record)


def run_row(run: RunRecord) -> dict[str, Any]:
    """One run as a flat dict, for tables and JSON."""
    return {
        "name": run.name,
        **run.settings,
        "state": run.state,
        "step": run.step,
        "held_out": run.held_out,
        "rungs": dict(run.rungs),
        "seconds": run.seconds,
        "reason": run.reason,
    }
