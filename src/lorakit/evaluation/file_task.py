"""A task from a file of the user: its rows are questions, their last answers the references.

The rows are read as training data is, with the same formats and checks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorakit.data.conversations import read_conversations
from lorakit.data.sources.readers import read_rows
from lorakit.data.tokenize.encode import prompt_ids
from lorakit.data.tokenize.spans import answer_text
from lorakit.errors import DataError
from lorakit.evaluation.answer_metrics import AnswerMetric, value_of
from lorakit.evaluation.model_side import ModelSide
from lorakit.evaluation.task_rows import MetricRows
from lorakit.inference.generate import GenerationSettings
from lorakit.recipe.schema import Recipe
from lorakit.types import Conversation


class FileTask:
    """Questions of a file, answered greedily, and scored by metrics."""

    def __init__(
        self,
        source: str,
        metrics: Sequence[AnswerMetric],
        recipe: Recipe,
        limit: int | None = None,
        max_new_tokens: int = 256,
        folders: Sequence[Path] = (Path(),),
        note: Callable[[str], None] = print,
    ) -> None:
        self.name = Path(source).stem
        self.metrics = metrics
        self.settings = GenerationSettings(max_new_tokens, temperature=0.0)
        items, log = read_conversations([source], _with_columns(recipe, source, folders), folders)
        for fault in log.faults():
            note(f"{source}: {fault.count} x {fault.kind}: {fault.action} ({fault.first_rows[0]})")
        self.rows: list[Conversation] = []
        without = 0
        for item in items:
            if isinstance(item, Conversation) and item.messages[-1].role == "assistant":
                self.rows.append(item)
            else:
                without += 1
            if limit is not None and len(self.rows) == limit:
                break
        if without:
            note(f"{source}: {without} rows end without an answer to compare with, left out")
        names = [str(row.origin) for row in self.rows]
        count = Counter(names)
        # A source may repeat rows, and one row may give several conversations.
        self.keys = [
            f"{name} ({place})" if count[name] > 1 else name for place, name in enumerate(names)
        ]
        if not self.rows:
            raise DataError(
                f"{source}: no row ends with an answer to compare with",
                hint="each row needs a question and the expected answer, as training data has",
            )

    def metric_directions(self) -> dict[str, bool]:
        """Every metric of a file: higher is better."""
        return {metric.name: True for metric in self.metrics}

    def run(self, side: ModelSide) -> list[MetricRows]:
        """Answer all questions and score the answers with each metric."""
        prompts = [prompt_ids(side.tokenizer, r.messages[:-1], r.tools) for r in self.rows]
        answers = [text.strip() for text in side.generate(prompts, self.settings)]
        return [self._rows_of(metric, answers) for metric in self.metrics]

    def _rows_of(self, metric: AnswerMetric, answers: Sequence[str]) -> MetricRows:
        values: dict[Any, float] = {}
        failures: dict[Any, str] = {}
        for key, row, answer in zip(self.keys, self.rows, answers, strict=True):
            found = value_of(metric, answer, answer_text(row.messages[-1]), row.messages[-1])
            if isinstance(found, str):
                failures[key] = found
            else:
                values[key] = found
        return MetricRows(self.name, metric.name, values, failures)


def _with_columns(recipe: Recipe, source: str, folders: Sequence[Path]) -> Recipe:
    """The recipe with its `columns` only if the file has them."""
    changed: dict[str, Any] = {"data": source, "val_data": None}
    if recipe.columns:
        first = next(iter(read_rows(source, folders, offline=recipe.offline)), None)
        if first is None or not set(recipe.columns.values()) <= set(first.values):
            changed["columns"] = {}
    return recipe.model_copy(update=changed)
