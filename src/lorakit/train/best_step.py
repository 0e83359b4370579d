"""Keep the step with the lowest held-out loss, and stop when it no longer falls.

transformers compares the losses (`metric_for_best_model`) and counts the evaluations without
improvement. Here a new best step is saved at once, the last step is scored too, and the count
survives a resume.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from lorakit.storage.run_dir import RunDir, read_json, write_json


@dataclass(frozen=True, slots=True)
class BestStep:
    """The step with the lowest held-out loss; `used` if the run's adapter is of this step."""

    step: int
    eval_loss: float
    steps: int
    used: bool

    def describe(self) -> str:
        """Describe it in one line, for messages."""
        adapter = "this step's" if self.used else f"that of step {self.steps}"
        return (
            f"step {self.step} of {self.steps}, held-out loss {self.eval_loss:.4f}; the adapter is "
            f"{adapter}"
        )

    def write(self, run: RunDir) -> None:
        """Write `best.json`."""
        write_json(run.best, asdict(self))


def best_step(run: RunDir) -> BestStep | None:
    """Read `best.json` of a finished run; None if the run did not compare steps."""
    values = read_json(run.best)
    if not isinstance(values, dict):
        return None
    try:
        return BestStep(
            int(values["step"]),
            float(values["eval_loss"]),
            int(values["steps"]),
            bool(values["used"]),
        )
    except (KeyError, TypeError, ValueError):
        return None


def evaluations_without_improvement(state: Any) -> int:
    """Count the last evaluations without a lower held-out loss, as kept in a trainer's state."""
    kept = state.stateful_callbacks.get(EarlyStopping.__name__)
    return int(kept["attributes"]["early_stopping_patience_counter"]) if kept else 0


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, whose count a resumed run continues."""

    def __init__(self, patience: int, note: Callable[[str], None]) -> None:
        super().__init__(early_stopping_patience=patience)
        self.note = note

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.early_stopping_patience_counter = evaluations_without_improvement(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
        super().on_evaluate(args, state, control, metrics)
        if control.should_training_stop and state.global_step < state.max_steps:
            self.note(
                f"step {state.global_step}: the held-out loss did not fall in "
                f"{self.early_stopping_patience_counter} evaluations: stopping early"
            )


class SaveBestStep(TrainerCallback):
    """Score the last step, and save each step that is the best so far or the last."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> Any:
        loss = metrics[args.metric_for_best_model]
        best = math.inf if state.best_metric is None else state.best_metric
        if loss < best or control.should_training_stop:
            control.should_save = True
        return control
