"""A run's folder enters; its loss curve leaves, drawn anew in the notebook while the run trains.

    with live_curve(folder):
        run = lorakit.finetune(recipe, output_dir=folder)

Outside of a notebook nothing is drawn: the terminal has its own line.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.figures import Figure, curves
from lorakit.run_dir import RunDir, read_metrics

SECONDS = 2.0


@contextlib.contextmanager
def live_curve(folder: str | Path, seconds: float = SECONDS) -> Iterator[None]:
    """Draw the losses in `folder` every few `seconds` and once more at the end of the block."""
    place = _place()
    if place is None:
        yield
        return
    done = threading.Event()

    def watch() -> None:
        steps = 0
        while not done.wait(seconds):
            losses = losses_of(folder)
            if len(losses) > steps:
                steps = len(losses)
                place.update(loss_curve(losses))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        place.update(loss_curve(losses_of(folder)))


def losses_of(folder: str | Path) -> list[tuple[float, float]]:
    """(step, loss) of each finite step so far."""
    rows = read_metrics(RunDir(Path(folder)))
    return [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]


def loss_curve(losses: list[tuple[float, float]]) -> Figure:
    """The curve from zero up."""
    return curves("loss while training", {"loss of a step": losses}, x_label="step", low=0)


def _place() -> Any:
    """The handle of an output of this cell; None outside of a notebook."""
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython
    from IPython.display import display

    if getattr(get_ipython(), "kernel", None) is None:
        return None
    return display(loss_curve([]), display_id=True)
