"""The trainer's logs enter; metric rows leave, and a stop that was asked for."""

from __future__ import annotations

import math
import time
from typing import Any, Protocol

from transformers import TrainerCallback

from lorakit.train.progress import TrainingProgress
from lorakit.train.signals import StopRequest


class Counting(Protocol):
    """The trainer, as the reporter sees it: tokens since the last row, and where it diverged."""

    step_tokens: int
    diverged_at: int | None


class Reporter(TrainerCallback):
    """Turns the trainer's logs into rows of metrics.jsonl and the live line."""

    def __init__(self, trainer: Counting, progress: TrainingProgress) -> None:
        self.trainer, self.progress = trainer, progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.start(state.global_step, state.max_steps)
        self.clock, self.step = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or not ({"loss", "eval_loss"} & set(logs)):
            return
        if "eval_loss" in logs:
            self.progress.note(
                f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}, "
                f"perplexity {logs['eval_perplexity']:.2f}"
            )
            return
        tokens, self.trainer.step_tokens = self.trainer.step_tokens, 0
        if not math.isfinite(logs["loss"]):
            self.trainer.diverged_at = state.global_step
            control.should_training_stop, control.should_save = True, False
        now = time.perf_counter()
        seconds, steps = now - self.clock, max(1, state.global_step - self.step)
        self.clock, self.step = now, state.global_step
        self.progress.step(
            {
                "step": state.global_step,
                "epoch": round(state.epoch or 0.0, 4),
                "loss": logs["loss"],
                "grad_norm": logs.get("grad_norm"),
                "learning_rate": logs.get("learning_rate"),
                "tokens": tokens,
                "seconds": round(seconds / steps, 4),
                "tokens_per_second": round(tokens / seconds, 1),
            }
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.stop()


class Stopper(TrainerCallback):
    """After a signal: finish the step, save a checkpoint, stop."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.stop.asked:
            control.should_save = True
            control.should_training_stop = True
        return control
