"""Check each step's loss and gradient norm before the update, and skip bad steps.

A step whose loss or gradient norm is not finite is skipped: no update, unchanged weights and
optimizer, and its rows are named. A second one within `WINDOW` steps ends the run. A norm or loss
far above the usual is reported and trained (the norm is clipped as usual). float16 with a loss
scale overflows occasionally by design: its scaler skips such steps itself, and only frequent
overflows are reported.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lorakit.errors import WorkError
from lorakit.recipe.schema import Recipe
from lorakit.types import Example

WINDOW = 100
# Medians cover this many steps, and are used from `MIN_HISTORY` on.
HISTORY, MIN_HISTORY = 50, 20
SPIKE = 10.0
MAX_SPIKE_WARNINGS = 3
OVERFLOWS_OF = 20


class StepGuard(TrainerCallback, ExportableState):
    """Pass finite steps, skip a bad one, and end the run at the second.

    A checkpoint stores the last bad step, which a resumed run needs.

    Args:
        note: prints a line.
        rows_not_finite: those of some examples whose loss alone is not finite.
        last_checkpoint: names the checkpoint to resume from, for messages.
    """

    def __init__(
        self,
        recipe: Recipe,
        note: Callable[[str], None],
        rows_not_finite: Callable[[Sequence[Example]], list[Example]],
        last_checkpoint: Callable[[], str],
    ) -> None:
        self.recipe, self.note = recipe, note
        self.rows_not_finite, self.last_checkpoint = rows_not_finite, last_checkpoint
        self.bad: dict[str, Any] | None = None
        self.norms: deque[float] = deque(maxlen=HISTORY)
        self.losses: deque[float] = deque(maxlen=HISTORY)
        self.overflows: deque[bool] = deque(maxlen=OVERFLOWS_OF)
        self.overflows_reported = self.reached = False
        self.spikes = 0
        self.steps = self.skipped = self.without_loss = 0  # since the last row of metrics
        self.spiked = False

    def state(self) -> dict[str, Any]:
        """The state kept in `trainer_state.json`."""
        return {"args": {}, "attributes": {"bad": self.bad}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore the state of the checkpoint; a new run keeps the present one."""
        kept = state.stateful_callbacks.get(type(self).__name__)
        if kept is not None:
            self.bad = kept["attributes"]["bad"]

    def check(
        self,
        model: Any,
        step: int,
        loss: Tensor,
        norm: Any,
        examples: Sequence[Example],
        scaled: bool,
    ) -> float:
        """Check a step, and return its gradient norm, read with its loss in one synchronization.

        Args:
            step: its number, from 1.
            model: holds the step's gradients; they are dropped if they must not be used.
            scaled: a loss scaler skips steps whose gradient overflows.

        Raises:
            WorkError: the second bad step in `WINDOW`, or a first step without any gradient.
        """
        norm = torch.as_tensor(norm, dtype=torch.float32, device=loss.device)
        loss_value, norm_value = torch.stack([loss.float(), norm]).tolist()
        self.steps += 1
        if math.isfinite(loss_value) and math.isfinite(norm_value):
            self._good(model, step, loss_value, norm_value, examples)
        elif scaled and math.isfinite(loss_value):
            self._overflow(step, True)
        else:
            self._bad(model, step, loss_value, norm_value, examples)
        return float(norm_value)

    def row(self, loss: float) -> dict[str, Any]:
        """Values for the log of the steps since its last row.

        Args:
            loss: their mean, in which a loss that is not finite counts as 0.
        """
        counted = self.steps - self.without_loss
        values: dict[str, Any] = {"loss": loss * self.steps / counted if counted else math.nan}
        values |= {"skipped": self.skipped} if self.skipped else {}
        values |= {"spike": True} if self.spiked else {}
        self.steps = self.skipped = self.without_loss = 0
        self.spiked = False
        return values

    def _good(
        self, model: Any, step: int, loss: float, norm: float, examples: Sequence[Example]
    ) -> None:
        if not self.reached:
            self.reached = True
            warning = params_without_grad(model, step)
            if warning:
                self.note(warning)
        self._overflow(step, False)
        spike = self._spike(loss, norm)
        self.norms.append(norm)
        self.losses.append(loss)
        if spike is None:
            return
        self.spiked = True
        self.spikes += 1
        if self.spikes <= MAX_SPIKE_WARNINGS:
            self.note(f"step {step}: {spike}; rows of the step: {format_row_origins(examples)}")
        if self.spikes == MAX_SPIKE_WARNINGS:
            self.note("further spikes are marked in metrics.jsonl only")

    def _spike(self, loss: float, norm: float) -> str | None:
        if len(self.norms) < MIN_HISTORY:
            return None
        usual, usual_loss = statistics.median(self.norms), statistics.median(self.losses)
        if usual > 0 and norm > SPIKE * usual:  # rewards that are all equal give no gradient
            limit = self.recipe.max_grad_norm
            clipped = f", clipped to {limit:g}" if norm > limit else ""
            return f"gradient norm {norm:.3g}, usually {usual:.3g}{clipped}"
        if loss > 2 * usual_loss + 1:
            return f"loss {loss:.3g}, usually {usual_loss:.3g}"
        return None

    def _overflow(self, step: int, overflown: bool) -> None:
        self.overflows.append(overflown)
        count = sum(self.overflows)
        if 2 * count > OVERFLOWS_OF and not self.overflows_reported:
            self.overflows_reported = True
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
        fault = f"gradient norm {norm}" if math.isfinite(loss) else f"loss {loss}"
        bad_rows = self.rows_not_finite(examples)
        relation = "not finite by themselves" if bad_rows else "rows of the step"
        line = f"step {step}: {fault}; {relation}: {format_row_origins(bad_rows or examples)}"
        previous, self.bad = self.bad, {"step": step, "told": line}
        if previous is None or step - previous["step"] > WINDOW:
            self.note(
                f"{line}; update skipped; training stops if this happens again within {WINDOW} "
                "steps"
            )
            return
        all_bad = len(bad_rows) == len(examples)
        raise WorkError(
            "training is not finite; stopped before the update, and no adapter was saved"
            f"\n  {previous['told']}\n  {line}\n  {self.last_checkpoint()}",
            hint=self._way_out(all_bad, bool(bad_rows), math.isfinite(loss)),
        )

    def _way_out(self, all_bad: bool, bad_rows: bool, finite_loss: bool) -> str:
        recipe = self.recipe
        if all_bad and not self.losses:
            return (
                "check that the base model files are complete, or try dtype: float32: no row is "
                "finite from the start"
            )
        if bad_rows:
            return "fix or remove these rows, and start a new run with --output"
        lower = f"lower learning_rate (it is {recipe.learning_rate:g})"
        if finite_loss:
            lower += f" or lora_alpha (it is {recipe.lora_alpha:g}): the gradient overflows"
        return f"{lower}, and start a new run with --output"


def params_without_grad(model: Any, step: int) -> str | None:
    """Describe the adapters without a gradient in the first step; None if all have one.

    A factor has no gradient while the other factor of its product is zero (lora_A at the start,
    lora_embedding_B of an embedding), so only other parameters are checked.

    Raises:
        WorkError: no parameter has a gradient.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    checked = [(n, p) for n, p in trained.items() if not _other_factor_is_zero(n, trained)]
    grads = [p.grad for _, p in checked if p.grad is not None]
    norms = iter(torch.stack(torch._foreach_norm(grads)).tolist() if grads else [])
    without = [n for n, p in checked if p.grad is None or next(norms) == 0]
    if not without:
        return None
    if len(without) == len(checked):
        raise WorkError(
            f"step {step}: no gradient reaches the adapters (0 of {len(checked)}); nothing would "
            "be learned",
            hint="check that the model's forward uses these target_modules, or try "
            "fused_layers: off",
        )
    return (
        f"step {step}: no gradient reaches {len(without)} of {len(checked)} trained tensors "
        f"(first: {without[0]}); they stay unchanged until one does"
    )


_OTHER_FACTOR = {
    ".lora_A.": ".lora_B.",
    ".lora_B.": ".lora_A.",
    ".lora_embedding_A.": ".lora_embedding_B.",
    ".lora_embedding_B.": ".lora_embedding_A.",
}


def _other_factor_is_zero(name: str, trained: dict[str, Tensor]) -> bool:
    """True if a parameter is multiplied by a parameter that is still zero, or is a row of tokens.

    Tokens need not occur in the first step.
    """
    if ".trainable_tokens_" in name:
        return True
    for factor, other in _OTHER_FACTOR.items():
        if factor in name and (partner := trained.get(name.replace(factor, other))) is not None:
            return not bool(partner.any())
    return False


def format_row_origins(examples: Sequence[Example]) -> str:
    """Format rows as `train.jsonl: 17, 88; more.jsonl: 3`, each once, at most 64 of them."""
    origins = list(dict.fromkeys(e.origin for e in examples))
    by_source: dict[str, list[str]] = {}
    for origin in origins[:64]:
        by_source.setdefault(origin.source, []).append(str(origin.row))
    listed = "; ".join(f"{source}: {', '.join(rows)}" for source, rows in by_source.items())
    return listed + (f" and {len(origins) - 64} more" if len(origins) > 64 else "")
