"""Trainer callbacks: metrics, stop after a signal or a step, timed checkpoints, trackers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

from transformers import TrainerCallback

from lorakit.train.diagnostics import RunMonitor
from lorakit.train.gradient_sync import GradientSync
from lorakit.train.progress import TrainingProgress


class Counting(Protocol):
    """The trainer as used by `MetricsCallback`: tokens since the last row."""

    step_tokens: int


class MetricsCallback(TrainerCallback):
    """Convert the trainer's logs to rows of metrics.jsonl and the live line."""

    def __init__(self, trainer: Counting, progress: TrainingProgress, watch: RunMonitor) -> None:
        self.trainer, self.progress, self.watch = trainer, progress, watch

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.start(state.global_step, state.max_steps)
        self.watch.start(state.max_steps)
        self.clock, self.step = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or not ({"loss", "eval_loss"} & set(logs)):
            return
        if "eval_loss" in logs:
            held = {k: _finite(v) for k, v in logs.items() if k.startswith("eval_")}
            self.progress.held_out({"step": state.global_step, **held})
            scores = [k for k in held if k not in ("eval_loss", "eval_perplexity")]
            self.progress.note(
                f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}, "
                f"perplexity {logs['eval_perplexity']:.2f}"
                + "".join(f", {k.removeprefix('eval_')} {logs[k]:.3f}" for k in scores)
            )
            return
        tokens, self.trainer.step_tokens = self.trainer.step_tokens, 0
        now = time.perf_counter()
        seconds, steps = now - self.clock, max(1, state.global_step - self.step)
        self.clock, self.step = now, state.global_step
        row = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 4),
            "loss": _finite(logs["loss"]),
            "grad_norm": _finite(logs.get("grad_norm")),
            "learning_rate": logs.get("learning_rate"),
            "tokens": tokens,
            "seconds": round(seconds / steps, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            **{k: _finite(v) for k, v in logs.items() if k not in _OWN},
        }
        self.progress.step(row)
        for warning in self.watch.row(row):
            self.progress.note(warning)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for warning in self.watch.finish():
            self.progress.note(warning)
        self.progress.stop()


# Values of transformers that the row has already.
_OWN = ("loss", "grad_norm", "learning_rate", "epoch", "num_input_tokens_seen", "step")


def _finite(value: float | None) -> float | None:
    """None for NaN and infinity, which JSON cannot represent."""
    return value if value is not None and math.isfinite(value) else None


class StopOnSignal(TrainerCallback):
    """Save a checkpoint and stop after the step in which a signal arrived."""

    def __init__(self, sync: GradientSync) -> None:
        self.sync = sync

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.sync.should_stop:
            control.should_save = True
            control.should_training_stop = True
        return control


class PauseAtStep(TrainerCallback):
    """Save a checkpoint and stop after optimizer step `step`, as after a signal."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if state.global_step >= self.step:
            control.should_save = True
            control.should_training_stop = True
        return control


class TimedCheckpoint(TrainerCallback):
    """Request a checkpoint at the first step that ends `minutes` after the last save.

    Args:
        agreed: maps this rank's "save is due" to the decision that all ranks share.
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


class SafeTracker:
    """Forward events to a tracker until its first exception; then report that and drop events."""

    def __init__(self, tracker: Any, note: Callable[[str], None]) -> None:
        self.tracker, self.note = tracker, note
        self.failed = False

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.tracker, name)
        if not name.startswith("on_"):
            return attribute

        def event(*args: Any, **kwargs: Any) -> Any:
            if self.failed:
                return None
            try:
                return attribute(*args, **kwargs)
            except Exception as error:
                self.failed = True
                tracker_name = type(self.tracker).__name__.removesuffix("Callback").lower()
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                self.note(
                    f"report_to: {tracker_name} failed ({reason}); training continues without it, "
                    "metrics.jsonl has everything"
                )
                return None

        return event
