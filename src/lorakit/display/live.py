"""Live loss curve of a run in a notebook cell.

    with live_curve(folder):
        run = lorakit.finetune(recipe, output_dir=folder)

Outside a notebook it draws nothing; the terminal has a progress line.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.display.charts import Chart, Point, Series, line_chart
from lorakit.storage.run_dir import RunDir, read_metrics


@contextlib.contextmanager
def live_curve(folder: str | Path, seconds: float = 2.0) -> Iterator[None]:
    """Draw the losses in `folder` every few `seconds`, and once more at the end of the block."""
    cell = _cell_output()
    if cell is None:
        yield
        return
    done = threading.Event()

    def watch() -> None:
        drawn, ended = 0, False
        while not ended:
            ended = done.wait(seconds)
            points = losses_of(folder)
            if len(points) > drawn and (chart := loss_chart(points)):
                drawn = len(points)
                cell.update(chart)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def losses_of(folder: str | Path) -> list[Point]:
    """Read (step, loss) of each step so far; None for a loss that was not finite."""
    return [(row["step"], row.get("loss")) for row in read_metrics(RunDir(Path(folder)))]


def loss_chart(points: list[Point]) -> Chart | None:
    """Draw the loss of each step with y from 0; None without a finite loss."""
    return line_chart("Loss", [Series(points)], zero=True)


def _cell_output() -> Any:
    """Handle of an output of this cell; None outside a notebook."""
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython
    from IPython.display import display

    if getattr(get_ipython(), "kernel", None) is None:
        return None
    return display({"text/plain": "no step yet"}, raw=True, display_id=True)
