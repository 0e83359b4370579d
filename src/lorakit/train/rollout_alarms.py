"""Detect reinforcement learning that goes wrong without an error, from rows of metrics.

Each alarm names the numbers that gave rise to it and what to change. It is raised again only after
its cause was absent. A resumed run reads its history from metrics.jsonl.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorakit.recipe.schema import Recipe

# Rows over which an alarm judges, and rows at the start to which it compares.
WINDOW = 10
# Share of groups with equal rewards above which little is learned.
EQUAL_GROUPS = 0.8
# Factor of the length at the start, and share of cut completions.
LONGER, CUT = 2.0, 0.5
# Rise of a form's reward without a rise of the answer's.
FORM_RISE, ANSWER_RISE = 0.2, 0.02
COLLAPSED_ENTROPY = 0.02
# Functions that judge the form of a completion, and those that judge its content.
FORMS = ("regex", "json_schema", "length")
ANSWERS = ("exact_answer", "numeric_answer", "unit_tests", "judge")


class RolloutAlarms:
    """Checks on the metrics of one run, in place of `RunMonitor`.

    Args:
        names: those of the reward functions in the metrics, in the order of the recipe.
    """

    def __init__(self, recipe: Recipe, names: Sequence[str]) -> None:
        self.recipe, self.names = recipe, names
        self.kinds = {n: e.name or "file" for n, e in zip(names, recipe.rewards, strict=True)}
        self.rows: list[Mapping[str, Any]] = []
        self.raised: set[str] = set()

    def start(self, total: int) -> None:
        """Do nothing: the number of steps has no influence."""

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Read the rows of the steps before a resume."""
        for row in rows:
            self.row(dict(row))

    def row(self, row: dict[str, Any]) -> list[str]:
        """Alarms that this row gives rise to."""
        if "reward" not in row:
            return []
        self.rows.append(row)
        if len(self.rows) > 2 * WINDOW:  # the first ones are kept to compare
            del self.rows[WINDOW]
        if len(self.rows) < WINDOW:
            return []
        found = {
            "groups": self._equal_groups(),
            "length": self._length(),
            "entropy": self._entropy(),
            "form": self._form_without_answer(),
            **{f"constant {name}": self._constant(name) for name in self.names},
        }
        new = [text for kind, text in found.items() if text and kind not in self.raised]
        self.raised = {kind for kind, text in found.items() if text}
        return [f"step {row['step']}: {text}" for text in new]

    def finish(self) -> list[str]:
        """No more messages at the end: each row was judged as it came."""
        return []

    def _last(self, key: str) -> float | None:
        return _mean(self.rows[-WINDOW:], key)

    def _first(self, key: str) -> float | None:
        return _mean(self.rows[:WINDOW], key)

    def _equal_groups(self) -> str | None:
        share = self._last("frac_reward_zero_std")
        if share is None or share < EQUAL_GROUPS:
            return None
        reward = self._last("reward") or 0.0
        return (
            f"in {share:.0%} of the groups all completions have equal rewards (mean reward "
            f"{reward:.3g}), and nothing is learned from them; use prompts that are solved "
            "sometimes, a reward with partial credit, more num_generations, or a higher temperature"
        )

    def _constant(self, name: str) -> str | None:
        values = {row.get(f"rewards/{name}") for row in self.rows[-WINDOW:]}
        spread = {row.get(f"rewards/{name}/std") for row in self.rows[-WINDOW:]}
        if len(values) != 1 or None in values or spread - {0}:
            return None
        return (
            f"reward {name} gave {values.pop():g} to every completion of {WINDOW} logged steps: it "
            "has no influence; check the function and its column, or remove it"
        )

    def _length(self) -> str | None:
        first, last = self._first("completions/mean_length"), self._last("completions/mean_length")
        cut = self._last("completions/clipped_ratio") or 0.0
        if first is None or last is None or last < LONGER * first or cut < CUT:
            return None
        limit = self.recipe.max_completion_length
        return (
            f"completions grew from {first:.0f} to {last:.0f} tokens, and {cut:.0%} are cut at "
            f"{limit}; add reward length, set mask_truncated_completions: true, or lower "
            "learning_rate"
        )

    def _entropy(self) -> str | None:
        first, last = self._first("entropy"), self._last("entropy")
        if first is None or last is None or last > COLLAPSED_ENTROPY or last > first / 5:
            return None
        return (
            f"the entropy of the policy fell from {first:.3f} to {last:.3f}: completions of a "
            "prompt are nearly equal; raise temperature, beta or epsilon_high, or lower "
            "learning_rate"
        )

    def _form_without_answer(self) -> str | None:
        forms = [n for n, kind in self.kinds.items() if kind in FORMS]
        answers = [n for n, kind in self.kinds.items() if kind in ANSWERS]
        if not forms or not answers or len(self.rows) < 2 * WINDOW:
            return None
        form, answer = max(map(self._rise, forms)), max(map(self._rise, answers))
        if form < FORM_RISE or answer > ANSWER_RISE:
            return None
        return (
            f"the rewards for form ({', '.join(forms)}) rose by {form:.2f}, those for the answer "
            f"({', '.join(answers)}) by {answer:.2f}: the policy may collect the form alone; raise "
            "the weight of the answer, or read rollouts.jsonl"
        )

    def _rise(self, name: str) -> float:
        key = f"rewards/{name}"
        return (self._last(key) or 0.0) - (self._first(key) or 0.0)


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.fmean(values) if values else None
