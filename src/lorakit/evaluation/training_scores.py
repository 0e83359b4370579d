"""Score a recipe's `eval_tasks` during training, as metrics for the log and for the best step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.evaluation.model_side import ModelSide
from lorakit.evaluation.task_list import TaskList, build_tasks, recipe_specs
from lorakit.recipe.schema import Recipe


class TrainingScorer:
    """Tasks of a recipe, built before the base is loaded; `score` asks the model in training.

    `directions` has a key for each metric, `eval_<task>_<metric>`, and True where higher is better.

    Raises:
        LorakitError: a task or metric is unknown, or its data is not available.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: Any,
        folders: Sequence[Path],
        note: Callable[[str], None],
    ) -> None:
        self.tokenizer, self.note = tokenizer, note
        self.listed: TaskList = build_tasks(recipe_specs(recipe), recipe, folders, note=note)
        for name, reason in self.listed.failed.items():
            raise LorakitError(f"eval_tasks: {name}: {reason}")
        self.directions = {
            metric_key(task.name, metric): higher
            for task in self.listed.tasks
            for metric, higher in task.metric_directions().items()
        }

    def score(self, model: Any) -> dict[str, float]:
        """Score the model on all tasks; a metric without a value is the worst one."""
        worst = {k: -math.inf if higher else math.inf for k, higher in self.directions.items()}
        found: dict[str, float] = {}
        for task in self.listed.tasks:
            try:
                rows = task.run(ModelSide(model, self.tokenizer))
            except LorakitError as error:
                self.note(f"eval_tasks: {task.name} was not scored: {error.message}")
                continue
            for each in rows:
                if each.failures:
                    place, reason = next(iter(each.failures.items()))
                    self.note(
                        f"eval_tasks: {each.task}: {each.metric} failed on {len(each.failures)} "
                        f"rows (first: {place}: {reason})"
                    )
                if (value := each.summary()) is not None:
                    found[metric_key(task.name, each.metric)] = value
        return {**worst, **found}


def metric_key(task: str, metric: str) -> str:
    """Name of a metric in the log: letters, digits and underscores."""
    return "eval_" + re.sub(r"\W+", "_", f"{task}_{metric}").strip("_")
