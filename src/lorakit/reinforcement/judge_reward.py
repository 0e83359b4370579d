"""Marks of a model behind an OpenAI-compatible endpoint as a reward between 0 and 1."""

from __future__ import annotations

import concurrent.futures
import re
from collections.abc import Callable, Sequence
from typing import Any

from lorakit.evaluation.judge import JudgeEndpoint, ask_endpoint
from lorakit.recipe.entries import RewardFunction

MARKS = 10
AT_ONCE = 8
INSTRUCTIONS = (
    "You mark the answer to a request. Correctness counts first, then helpfulness and clarity; "
    f"length does not count. Reply with one whole number from 0 (useless) to {MARKS} (perfect)."
)
_MARK = re.compile(r"\b(\d+)\b")


def read_mark(reply: str) -> float | None:
    """The last whole number of a reply as a share of the best mark; None if it is no mark."""
    shown = re.sub(r"<think>.*?</think>", "", reply, flags=re.DOTALL)
    found = [int(number) for number in _MARK.findall(shown.replace(f"/{MARKS}", ""))]
    return found[-1] / MARKS if found and found[-1] <= MARKS else None


class JudgeReward:
    """Asks an endpoint for the mark of each completion; equal requests of a step are asked once.

    Requests, answers and the reference are sent to this endpoint, and to no other place.
    """

    def __init__(
        self, entry: RewardFunction, column: str | None, note: Callable[[str], None]
    ) -> None:
        self.endpoint = JudgeEndpoint(str(entry.url), str(entry.model))
        self.instructions = entry.instructions or INSTRUCTIONS
        self.column = column or "answer"
        self.ask = ask_endpoint(self.endpoint)
        note(f"judge: prompts and completions are sent to {self.endpoint.base_url}")

    def __call__(self, attempts: Sequence[Any]) -> list[float | None]:
        texts = [self._request(attempt) for attempt in attempts]
        asked = list(dict.fromkeys(texts))
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            marks = dict(zip(asked, pool.map(self._mark, asked), strict=True))
        return [marks[text] for text in texts]

    def _mark(self, text: str) -> float | None:
        turns = [
            {"role": "system", "content": self.instructions},
            {"role": "user", "content": text},
        ]
        return read_mark(self.ask(turns))

    def _request(self, attempt: Any) -> str:
        turns = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in attempt.prompt)
        reference = attempt.fields.get(self.column)
        parts = {"Request": turns, "Reference answer": reference, "Answer": attempt.text}
        return "\n\n".join(f"## {name}\n{part}" for name, part in parts.items() if part)
