"""Write the page of a sweep: its runs compared, best first, and why runs stopped or failed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lorakit.errors import LorakitError
from lorakit.report.comparison import compare_runs, write_comparison
from lorakit.report.load_run import Record
from lorakit.sweeps.sweep_record import RunRecord, SweepDir, SweepRecord


def write_sweep_page(folder: SweepDir, record: SweepRecord) -> bool:
    """Write `compare.html`; return False if fewer than two runs have begun.

    Raises:
        LorakitError: a file of a run is damaged, or the page cannot be written.
    """
    order = {number: place for place, (_, number) in enumerate(record.ranking())}
    begun = [run for run in record.runs if folder.run(run.name).has_run()]
    begun.sort(key=lambda run: order.get(run.configuration, len(order)))
    if len(begun) < 2:
        return False
    found = compare_runs([folder.run(run.name) for run in begun])
    records = tuple(map(_with_rungs, found.records, begun))
    ends = [(run.name, run.reason) for run in record.runs if run.reason]
    verdict = ""
    if (best := record.best()) is not None:
        verdict = f"The best run is {best.name}, with a held-out loss of {best.held_out:.4f}"
        if record.seeds > 1:
            mean = record.ranking()[0][0]
            verdict += f"; the mean over the {record.seeds} seeds of its settings is {mean:.4f}"
    compared = replace(found, records=records)
    title = f"Sweep {folder.path.resolve().name}"
    write_comparison(compared, folder.page, title, verdict, ends)
    return True


def renew_sweep_page(folder: SweepDir, record: SweepRecord, note: Callable[[str], None]) -> None:
    """Call `write_sweep_page` without raising."""
    try:
        write_sweep_page(folder, record)
    except Exception as error:
        reason = error.message if isinstance(error, LorakitError) else f"{error!r}"
        note(f"{folder.page.name} was not written ({reason}); all other files are complete")


def _with_rungs(record: Record, run: RunRecord) -> Record:
    """Add the held-out losses by which a sweep compared its runs to those of the run's metrics."""
    rungs: list[dict[str, Any]] = [
        {"step": int(step), "eval_loss": loss} for step, loss in run.rungs.items()
    ]
    if run.held_out is not None:
        rungs.append({"step": run.step, "eval_loss": run.held_out})
    known = {row["step"] for row in record.held}
    rows = [*record.held, *(row for row in rungs if row["step"] not in known)]
    steps = {row["step"]: row for row in rows}
    return replace(record, held=tuple(steps[step] for step in sorted(steps)))
