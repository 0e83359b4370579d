"""Minutes enter; a checkpoint each so many minutes of training leaves."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class SaveClock(TrainerCallback):
    """Asks for a checkpoint at the first step that ends `minutes` after the last one was saved.

    Args:
        agreed: told whether the time is over, says whether all ranks save now.
    """

    def __init__(
        self,
        minutes: float,
        agreed: Callable[[bool], bool],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds, self.agreed, self.now = 60 * minutes, agreed, now

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last = self.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.agreed(self.now() - self.last >= self.seconds):
            control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last = self.now()
