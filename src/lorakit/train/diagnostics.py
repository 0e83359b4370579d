"""Detect runs that go wrong without an error, from rows of metrics.

Messages state measured values, and the likeliest cause as such. Each is reported once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import RunDir, read_json

# The loss is judged over this many steps after the warm-up, by the means of its two ends.
FLAT_STEPS = 100
WINDOW_STEPS = 25
FLAT, RISE_THRESHOLD = 0.005, 0.05
# Below this loss the model knows its data, and a constant loss is not a fault.
CONVERGED_LOSS = 0.3
# Rows before the rate is judged; the first ones select kernels and fill caches.
UNTIMED_ROWS, TIMED_ROWS = 3, 10
SLOW = 0.5


def planned_rate(run: RunDir) -> float | None:
    """Tokens/s that the run's plan.json expects; None if it has no estimate."""
    rate = (read_json(run.plan) or {}).get("tokens_per_second")
    return None if rate is None else float(rate)


class RunMonitor:
    """Checks on the metrics of one run.

    Args:
        planned: tokens/s that the plan expects, None if it has no estimate.
        slow: returns the likeliest reason for a slow run.
    """

    def __init__(self, recipe: Recipe, planned: float | None, slow: Callable[[], str]) -> None:
        self.recipe, self.planned, self.slow = recipe, planned, slow
        self.total = self.judged_from = 0
        self.rows: list[dict[str, Any]] = []
        self.rates: list[float] = []
        self.last_rate: float | None = None
        self.judged = False
        self.reported: set[str] = set()

    def start(self, total: int) -> None:
        """Reset for a run of `total` steps."""
        self.total = total
        self.judged_from = self.recipe.warmup_of(total)

    def row(self, row: dict[str, Any]) -> list[str]:
        """Messages that this row gives rise to."""
        messages = {
            "rate": self._ended_early(row),
            "slow": self._slow(row),
            "loss": self._not_falling(row),
        }
        new = {k: message for k, message in messages.items() if message and k not in self.reported}
        self.reported |= set(new)
        return list(new.values())

    def _ended_early(self, row: dict[str, Any]) -> str | None:
        before, self.last_rate = self.last_rate, row["learning_rate"]
        if not before or self.last_rate != 0 or row["step"] >= self.total:
            return None
        return (
            f"the learning rate is 0 from step {row['step']} of {self.total} on: further steps "
            "change nothing. The schedule was made for fewer steps"
        )

    def _slow(self, row: dict[str, Any]) -> str | None:
        if self.planned is None or len(self.rates) == UNTIMED_ROWS + TIMED_ROWS:
            return None
        self.rates.append(row["tokens_per_second"])
        timed = self.rates[UNTIMED_ROWS:]
        if len(timed) != TIMED_ROWS:
            return None
        rate = statistics.median(timed)
        if rate >= SLOW * self.planned:
            return None
        return f"{rate:,.0f} tokens/s, the plan expects {self.planned:,.0f}: {self.slow()}"

    def _not_falling(self, row: dict[str, Any]) -> str | None:
        if self.judged or row["step"] <= self.judged_from or row["loss"] is None:
            return None
        self.rows.append(row)
        steps = row["step"] - self.rows[0]["step"] + 1
        if steps < FLAT_STEPS or len(self.rows) < 2 * WINDOW_STEPS:
            return None
        self.judged = True  # once, with either result
        first = statistics.fmean(r["loss"] for r in self.rows[:WINDOW_STEPS])
        last = statistics.fmean(r["loss"] for r in self.rows[-WINDOW_STEPS:])
        norms = [r["grad_norm"] for r in self.rows if r["grad_norm"] is not None]
        self.rows = self.rows[:1]
        if last > first * (1 + RISE_THRESHOLD):
            cause = f"learning_rate is too high ({self.recipe.learning_rate:g})"
            return _message(row, f"rose from {first:.3f} to {last:.3f}", steps, cause)
        if first > CONVERGED_LOSS and last > first * (1 - FLAT):
            norm = statistics.median(norms) if norms else None
            return _message(row, f"stays at {first:.3f} ({last:.3f})", steps, self._flat(norm))
        return None

    def _flat(self, norm: float | None) -> str:
        recipe = self.recipe
        if norm is not None and norm < 1e-4:
            return (
                f"few tokens are trained, or lora_alpha is too small ({recipe.lora_alpha:g}): the "
                f"gradient norm is {norm:.1g}"
            )
        if recipe.learning_rate < 2e-5:
            return f"learning_rate is too low ({recipe.learning_rate:g}; LoRA is used to 1e-4)"
        if recipe.learning_rate > 2e-3:
            return f"learning_rate is too high ({recipe.learning_rate:g}; LoRA is used to 1e-4)"
        return "the model knows this data already, or the answers do not follow from the questions"


def _message(row: dict[str, Any], change: str, steps: int, cause: str) -> str:
    return f"step {row['step']}: the loss {change} over {steps} steps; likely {cause}"
