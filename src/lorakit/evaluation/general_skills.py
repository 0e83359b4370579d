"""Questions of general knowledge and language, to see if a tuned model forgot something.

Each has options, of which the first is right; the model's answer is the option with the highest
log-likelihood. The change of the right option's probability shows forgetting earlier than
the number of right answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from importlib.resources import files

from lorakit.data.tokenize.encode import prompt_ids
from lorakit.evaluation.model_side import ModelSide, Pair
from lorakit.evaluation.task_rows import MetricRows
from lorakit.types import Message

ASSET = "general_skills.jsonl"
NAME = "general skills"


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its options; the first one is right."""

    text: str
    options: tuple[str, ...]


def general_questions() -> list[Question]:
    """Read the questions that are shipped with the package."""
    text = (files("lorakit") / "assets" / ASSET).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [Question(row["question"], tuple(row["options"])) for row in rows]


class GeneralSkills:
    """The shipped questions as a task."""

    name = NAME

    def __init__(self, limit: int | None = None, system: str | None = None) -> None:
        self.questions = general_questions()[:limit]
        self.head = [Message("system", system)] if system else []

    def metric_directions(self) -> dict[str, bool]:
        """Both metrics: higher is better."""
        return {"accuracy": True, "probability": True}

    def run(self, side: ModelSide) -> list[MetricRows]:
        """Score each option of each question."""
        pairs = [pair for question in self.questions for pair in self._pairs(side, question)]
        scores = iter(side.loglikelihoods(pairs))
        right: dict[Hashable, float] = {}
        probability: dict[Hashable, float] = {}
        for number, question in enumerate(self.questions, 1):
            found = [next(scores)[0] for _ in question.options]
            # The first option is right; a tie is no answer.
            right[number] = float(found[0] > max(found[1:]))
            probability[number] = _share(found)
        return [
            MetricRows(NAME, "accuracy", right),
            MetricRows(NAME, "probability", probability),
        ]

    def _pairs(self, side: ModelSide, question: Question) -> list[Pair]:
        prompt = prompt_ids(side.tokenizer, [*self.head, Message("user", question.text)])
        encode = side.tokenizer
        return [
            (prompt, encode(option, add_special_tokens=False)["input_ids"])
            for option in question.options
        ]


def _share(values: Sequence[float]) -> float:
    """Probability of the first of several log-likelihoods."""
    top = max(values)
    parts = [math.exp(value - top) for value in values]
    return parts[0] / sum(parts)
