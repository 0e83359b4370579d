"""Each step's loss and gradient norm enter before the update; a bad step leaves no trace.

A step whose loss or gradient norm is no number is skipped: no update, weights and optimizer as
before, its rows named. The second one within `WINDOW` steps ends the run. A norm or loss far above
the usual is named and trained (the norm is clipped as ever). float16 with a loss scale overflows
now and then by design: its scaler skips such steps itself, and only many of them are told.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lorakit.data.batching import Layout
from lorakit.errors import WorkError
from lorakit.recipe.schema import Recipe
from lorakit.types import Example

WINDOW = 100
# Medians are of so many steps, and say something from `MIN_HISTORY` on.
HISTORY, MIN_HISTORY = 50, 20
SPIKE = 10.0
MAX_SPIKE_WARNINGS = 3
OVERFLOWS_OF = 20


class Guarded(Protocol):
    """The trainer, as its guard sees it."""

    recipe: Recipe
    layout: Layout
    state: Any

    def rows_not_finite(self, examples: Sequence[Example]) -> list[Example]: ...

    def last_checkpoint(self) -> str: ...


class StepGuard(TrainerCallback, ExportableState):
    """Lets a finite step through, skips a bad one, ends the run at the second.

    What a resumed run must know travels in the checkpoint: the last bad step, and the size of
    micro-batches where memory forced a smaller one.
    """

    def __init__(self, trainer: Guarded, note: Callable[[str], None]) -> None:
        self.trainer, self.note = trainer, note
        self.bad: dict[str, Any] | None = None
        self.norms: deque[float] = deque(maxlen=HISTORY)
        self.losses: deque[float] = deque(maxlen=HISTORY)
        self.overflows: deque[bool] = deque(maxlen=OVERFLOWS_OF)
        self.overflows_told = self.reached = False
        self.spikes = 0
        self.steps = self.skipped = self.without_loss = 0  # since the last row of metrics
        self.spiked = False

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps."""
        layout, asked = self.trainer.layout, self.trainer.recipe.micro_batch_size
        kept = {"asked": asked, "rows": layout.rows, "capacity": layout.capacity, "bad": self.bad}
        return {"args": {}, "attributes": kept}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take up what the checkpoint kept; in a new run that is what is there."""
        kept = state.stateful_callbacks.get(type(self).__name__)
        if kept is None:
            return
        kept = kept["attributes"]
        self.bad = kept["bad"]
        # Another size in the recipe is a new wish, made for this machine.
        if kept["asked"] == self.trainer.recipe.micro_batch_size:
            rows, capacity = kept["rows"], kept["capacity"]
            self.trainer.layout = replace(self.trainer.layout, rows=rows, capacity=capacity)

    def check(
        self, model: Any, loss: Tensor, norm: Any, examples: Sequence[Example], scaled: bool
    ) -> float:
        """The step's gradient norm as a number, read together with its loss: one wait a step.

        Args:
            model: holds the step's gradients; they are dropped where they must not be used.
            scaled: a loss scaler skips steps whose gradient overflows.

        Raises:
            WorkError: the second bad step in `WINDOW`, or a first step without any gradient.
        """
        norm = torch.as_tensor(norm, dtype=torch.float32, device=loss.device)
        of_loss, of_norm = torch.stack([loss.float(), norm]).tolist()
        step = self.trainer.state.global_step + 1
        self.steps += 1
        if math.isfinite(of_loss) and math.isfinite(of_norm):
            self._good(model, step, of_loss, of_norm, examples)
        elif scaled and math.isfinite(of_loss):
            self._overflow(step, True)
        else:
            self._bad(model, step, of_loss, of_norm, examples)
        return float(of_norm)

    def row(self, loss: float) -> dict[str, Any]:
        """What the log says of the steps since its last row.

        Args:
            loss: their mean, in which a loss that is no number counts as 0.
        """
        counted = self.steps - self.without_loss
        told: dict[str, Any] = {"loss": loss * self.steps / counted if counted else math.nan}
        told |= {"skipped": self.skipped} if self.skipped else {}
        told |= {"spike": True} if self.spiked else {}
        self.steps = self.skipped = self.without_loss = 0
        self.spiked = False
        return told

    def _good(
        self, model: Any, step: int, loss: float, norm: float, examples: Sequence[Example]
    ) -> None:
        if not self.reached:
            self.reached = True
            words = params_without_grad(model, step)
            if words:
                self.note(words)
        self._overflow(step, False)
        told = self._spike(loss, norm)
        self.norms.append(norm)
        self.losses.append(loss)
        if told is None:
            return
        self.spiked = True
        self.spikes += 1
        if self.spikes <= MAX_SPIKE_WARNINGS:
            self.note(f"step {step}: {told}; rows of the step: {format_row_origins(examples)}")
        if self.spikes == MAX_SPIKE_WARNINGS:
            self.note("further spikes are marked in metrics.jsonl only")

    def _spike(self, loss: float, norm: float) -> str | None:
        if len(self.norms) < MIN_HISTORY:
            return None
        usual, usual_loss = statistics.median(self.norms), statistics.median(self.losses)
        if norm > SPIKE * usual:
            limit = self.trainer.recipe.max_grad_norm
            clipped = f", clipped to {limit:g}" if norm > limit else ""
            return f"gradient norm {norm:.3g}, usually {usual:.3g}{clipped}"
        if loss > 2 * usual_loss + 1:
            return f"loss {loss:.3g}, usually {usual_loss:.3g}"
        return None

    def _overflow(self, step: int, overflown: bool) -> None:
        self.overflows.append(overflown)
        count = sum(self.overflows)
        if 2 * count > OVERFLOWS_OF and not self.overflows_told:
            self.overflows_told = True
            self.note(
                f"step {step}: {count} of the last {OVERFLOWS_OF} steps overflowed in float16 and "
                "changed nothing; set dtype: float32, or lower learning_rate"
            )

    def _bad(
        self, model: Any, step: int, loss: float, norm: float, examples: Sequence[Example]
    ) -> None:
        # Optimizers leave parameters without a gradient, and their state, alone.
        model.zero_grad(set_to_none=True)
        self.skipped += 1
        self.without_loss += not math.isfinite(loss)
        what = f"gradient norm {norm}" if math.isfinite(loss) else f"loss {loss}"
        alone = self.trainer.rows_not_finite(examples)
        which = "not finite by themselves" if alone else "rows of the step"
        told = f"step {step}: {what}; {which}: {format_row_origins(alone or examples)}"
        before, self.bad = self.bad, {"step": step, "told": told}
        if before is None or step - before["step"] > WINDOW:
            self.note(f"{told}; its update was skipped, a second one in {WINDOW} steps ends it all")
            return
        whole = len(alone) == len(examples)
        raise WorkError(
            "training is not finite; stopped before the update, and no adapter was saved"
            f"\n  {before['told']}\n  {told}\n  {self.trainer.last_checkpoint()}",
            hint=self._way_out(whole, bool(alone), math.isfinite(loss)),
        )

    def _way_out(self, whole: bool, alone: bool, finite_loss: bool) -> str:
        recipe = self.trainer.recipe
        if whole and not self.losses:
            return (
                "it is so from the start on: is the base model whole? dtype: float32 tells whether "
                "its type is too narrow"
            )
        if alone:
            return "mend these rows or leave them out, and start anew with --output"
        lower = f"lower learning_rate (it is {recipe.learning_rate:g})"
        if finite_loss:
            lower += f" or lora_alpha (it is {recipe.lora_alpha:g}): the gradient overflows"
        return f"{lower}, and start anew with --output"


def params_without_grad(model: Any, step: int) -> str | None:
    """Which adapters got no gradient in the first step, in words; None where all got one.

    lora_A gets none while its lora_B is zero, so only the others are asked.

    Raises:
        WorkError: nothing got any.
    """
    asked = [(n, p) for n, p in model.named_parameters() if p.requires_grad and ".lora_A." not in n]
    grads = [p.grad for _, p in asked if p.grad is not None]
    norms = iter(torch.stack(torch._foreach_norm(grads)).tolist() if grads else [])
    without = [n for n, p in asked if p.grad is None or next(norms) == 0]
    if not without:
        return None
    if len(without) == len(asked):
        raise WorkError(
            f"step {step}: no gradient reaches the adapters (0 of {len(asked)}); nothing would "
            "be learned",
            hint="does the model's forward use these target_modules? try fused_layers: off, or others",
        )
    return (
        f"step {step}: no gradient reaches {len(without)} of {len(asked)} trained tensors "
        f"(first: {without[0]}); they stay as they are until one does"
    )


def format_row_origins(examples: Sequence[Example]) -> str:
    """`train.jsonl: 17, 88; more.jsonl: 3`, each row once, at most 64 of them."""
    origins = list(dict.fromkeys(e.origin for e in examples))
    by_source: dict[str, list[str]] = {}
    for origin in origins[:64]:
        by_source.setdefault(origin.source, []).append(str(origin.row))
    told = "; ".join(f"{source}: {', '.join(rows)}" for source, rows in by_source.items())
    return told + (f" and {len(origins) - 64} more" if len(origins) > 64 else "")
