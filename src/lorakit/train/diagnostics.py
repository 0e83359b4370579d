"""Detect runs that go wrong without an error, from rows of metrics and the files of a run.

Messages state measured values, and the likeliest cause as such. Each is reported once. `RunMonitor`
reports them during training, `run_notes` those of a run that may have ended.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lorakit.data.data_notes import data_notes
from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import RunDir, read_json

# The loss is judged over this many steps after the warm-up, by the means of its two ends.
FLAT_STEPS = 100
WINDOW_STEPS = 25
FLAT, RISE_THRESHOLD = 0.005, 0.05
# A shorter run is judged at its end if it has this many rows, by fifths of them. The last ones are
# compared with the first row, too, the loss of the base: a loss may diverge within a few steps.
SHORT_ROWS, WORSE_THAN_BASE = 10, 0.25
HELD_OUT_RISE = 0.03
ASKING_SAMPLES = 3  # of a run whose questions and answers are swapped
# Below this loss the model knows its data, and a constant loss is not a fault.
CONVERGED_LOSS = 0.3
HIGH_RATE = 2e-4  # the default of QLoRA; from ten times as much on, a flat loss is due to it
# Rows before the speed is judged; the first ones select kernels and fill caches.
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
        self.first: float | None = None
        self.rows: list[dict[str, Any]] = []
        self.rates: list[float] = []
        self.last_rate: float | None = None
        self.judged = self.rose = False
        self.reported: set[str] = set()

    def start(self, total: int) -> None:
        """Reset for a run of `total` steps."""
        self.total = total
        self.judged_from = self.recipe.warmup_of(total)

    def row(self, row: dict[str, Any]) -> list[str]:
        """Messages that this row gives rise to."""
        messages = {
            "rate": self._ended_early(row),
            "slow": self.slow_note(row),
            "loss": self._not_falling(row),
        }
        new = {k: message for k, message in messages.items() if message and k not in self.reported}
        self.reported |= set(new)
        return list(new.values())

    def _ended_early(self, row: dict[str, Any]) -> str | None:
        before, self.last_rate = self.last_rate, row.get("learning_rate")
        if not before or self.last_rate != 0 or row["step"] >= self.total:
            return None
        return (
            f"the learning rate is 0 from step {row['step']} of {self.total} on: further steps "
            "change nothing. The schedule was made for fewer steps"
        )

    def slow_note(self, row: dict[str, Any]) -> str | None:
        """Message at the row by which the speed is known, if it is far below the plan's."""
        if self.planned is None or len(self.rates) == UNTIMED_ROWS + TIMED_ROWS:
            return None
        self.rates.append(row.get("tokens_per_second") or 0.0)
        timed = self.rates[UNTIMED_ROWS:]
        if len(timed) != TIMED_ROWS:
            return None
        rate = statistics.median(timed)
        if rate >= SLOW * self.planned:
            return None
        return f"{rate:,.0f} tokens/s, the plan expects {self.planned:,.0f}: {self.slow()}"

    def _not_falling(self, row: dict[str, Any]) -> str | None:
        loss = row.get("loss")
        self.first = loss if self.first is None else self.first
        if self.judged or row["step"] <= self.judged_from or loss is None:
            return None
        self.rows.append(row)
        steps = row["step"] - self.rows[0]["step"] + 1
        if steps < FLAT_STEPS or len(self.rows) < 2 * WINDOW_STEPS:
            return None
        norms = [r["grad_norm"] for r in self.rows if r.get("grad_norm") is not None]
        first, last, rose = self._ends(WINDOW_STEPS)
        if rose:
            return rose
        if first > CONVERGED_LOSS and last > first * (1 - FLAT):
            norm = statistics.median(norms) if norms else None
            return _message(row, f"stays at {first:.3f} ({last:.3f})", steps, self._flat(norm))
        return None

    def finish(self) -> list[str]:
        """Message of a run that ended before its loss was judged."""
        if self.judged or len(self.rows) < SHORT_ROWS:
            return []
        rose = self._ends(len(self.rows) // 5)[2]
        return [rose] if rose else []

    def _ends(self, count: int) -> tuple[float, float, str | None]:
        """Mean loss of the first and of the last `count` rows; a message if it rose."""
        self.judged = True  # once, with either result
        begin, end = self.rows[0], self.rows[-1]
        first = statistics.fmean(r["loss"] for r in self.rows[:count])
        last = statistics.fmean(r["loss"] for r in self.rows[-count:])
        self.rows = []
        change = ""
        if self.first is not None and last > self.first * (1 + WORSE_THAN_BASE):
            change = f"rose from {self.first:.3f} at the start to {last:.3f}"
        elif last > first * (1 + RISE_THRESHOLD):
            change = f"rose from {first:.3f} to {last:.3f}"
        steps = end["step"] - begin["step"] + 1
        self.rose = bool(change)
        return first, last, _message(end, change, steps, self._too_high()) if change else None

    def _too_high(self) -> str:
        rate = self.recipe.learning_rate
        usual = "; LoRA is used to 1e-4" if rate > HIGH_RATE else ""
        return f"learning_rate is too high ({rate:g}{usual})"

    def _flat(self, norm: float | None) -> str:
        recipe = self.recipe
        if norm is not None and norm < 1e-4:
            return (
                f"few tokens are trained, or lora_alpha is too small ({recipe.lora_alpha:g}): the "
                f"gradient norm is {norm:.1g}"
            )
        if recipe.learning_rate < 2e-5:
            return f"learning_rate is too low ({recipe.learning_rate:g}; LoRA is used to 1e-4)"
        if recipe.learning_rate > 10 * HIGH_RATE:
            return self._too_high()
        return "the model knows this data already, or the answers do not follow from the questions"


def _message(row: dict[str, Any], change: str, steps: int, cause: str) -> str:
    return f"step {row['step']}: the loss {change} over {steps} steps; likely {cause}"


def run_notes(
    recipe: Recipe,
    steps: Iterable[Mapping[str, Any]],
    held: Sequence[Mapping[str, Any]],
    data: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    planned: float | None = None,
) -> list[str]:
    """Sentences about what went wrong in a run, the gravest first; none for a good run.

    Args:
        steps, held: rows of metrics.jsonl with a training loss, and with a held-out loss.
        data, evaluation: data_report.json and eval.json; empty if they are missing.
        planned: tokens/s of the plan.
    """
    monitor = RunMonitor(recipe, None, str)
    speed = RunMonitor(recipe, planned, lambda: "see its log")
    total = recipe.total_steps(data["examples_train"]) if data else recipe.max_steps
    monitor.start(total or 0)
    notes, slow, marked = [], list[str | None](), dict[str, list[str]]()
    for row in steps:
        if recipe.objective != "grpo":  # its loss says nothing; rewards have alarms of their own
            notes += monitor.row(dict(row))
        slow.append(speed.slow_note(dict(row)))
        for key in ("skipped", "spike"):
            if row.get(key):
                marked.setdefault(key, []).append(f"{row['step']:,}")
    notes = [f"{note[:1].upper()}{note[1:]}." for note in notes + monitor.finish()]
    for key, fault in (("skipped", "skipped, since loss or gradient was not finite"),
                       ("spike", "with a sudden peak of the loss")):  # fmt: skip
        if found := marked.get(key):
            more = " ..." if len(found) > 8 else ""
            notes.append(f"Steps {fault}: {', '.join(found[:8])}{more}.")
    if not monitor.rose:
        notes += _overfitting(held)
    notes += _evaluation_notes(evaluation) + (data_notes(data, recipe) if data else [])
    return notes + [f"{note}." for note in slow if note]


def _overfitting(held: Sequence[Mapping[str, Any]]) -> list[str]:
    """Note on a held-out loss that rises while that of the training does not."""
    losses = [(r["step"], r["eval_loss"]) for r in held if r.get("eval_loss") is not None]
    step, best = min(losses, key=lambda pair: pair[1], default=(0, 0.0))
    if not losses or losses[-1][1] <= best * (1 + HELD_OUT_RISE):
        return []
    return [
        f"The held-out loss rises since step {step:,}, from {best:.3f} to {losses[-1][1]:.3f}: "
        "overfitting. Train fewer epochs, or set load_best_model_at_end."
    ]


def _evaluation_notes(evaluation: Mapping[str, Any]) -> list[str]:
    """Notes on an adapter that is worse than its base, and on answers that are questions."""
    notes = []
    base, tuned = (((evaluation.get(k) or {}).get("loss")) for k in ("base", "tuned"))
    if base is not None and tuned is not None and tuned > base:
        notes.append(
            f"The adapter is worse than its base: held-out loss {tuned:.3f} against {base:.3f}."
        )
    samples = evaluation.get("samples") or []
    if len(samples) >= ASKING_SAMPLES and all(
        _asks(sample["reference"]) and not _asks(sample["prompt"]) for sample in samples
    ):
        notes.append(
            "The answers of the data are questions, and its questions are not: question and answer "
            "may be swapped. Set columns to name them."
        )
    return notes


def _asks(text: str) -> bool:
    return text.rstrip().endswith(("?", "？"))
