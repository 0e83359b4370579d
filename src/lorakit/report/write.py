"""A run directory enters; report.html in it leaves, or a word on why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lorakit.errors import LorakitError, RunError
from lorakit.report.page import page
from lorakit.report.read import read_run
from lorakit.run_dir import RunDir, write_text


def write_report(run: RunDir, output: Path | None = None) -> Path:
    """Write the page of a run, finished or stopped; returns where it lies.

    Raises:
        LorakitError: a file of the run is damaged, or the page cannot be written.
    """
    target = output or run.report
    record = read_run(run)
    try:
        text = page(record)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise RunError(
            f"{run.path}: a file of it holds something else than lorakit writes "
            f"({type(error).__name__}: {error})",
            hint="was one of its JSON files edited?",
        ) from error
    write_text(target, text)
    return target


def renew_report(run: RunDir, note: Callable[[str], None]) -> bool:
    """As `write_report` at the end of other work, which never fails by it; True where written."""
    try:
        write_report(run)
    except Exception as error:
        reason = error.message if isinstance(error, LorakitError) else f"{error!r}"
        note(f"report.html was not written ({reason}); nothing else is lost")
        return False
    return True
