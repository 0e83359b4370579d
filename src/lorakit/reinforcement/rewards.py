"""Score completions by the reward functions of a recipe.

    exact_answer, numeric_answer    the final answer against the reference
    regex                           the pattern of the recipe is found
    json_schema                     valid JSON of a schema
    length                          0, falling to -1 at a limit (DAPO, arXiv 2503.14476, eq. 13)
    unit_tests                      tests pass in a subprocess (`code_sandbox`)
    judge                           marks of a model behind an endpoint (`judge_reward`)
    {file, function}                your own, in a child process (`reward_process`)

A function returns a number for each completion, or None where it has no opinion. A fault of a
function ends the run with its name; a number that is not finite is counted and left out.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lorakit.errors import DependencyError, RecipeError, WorkError, first_line
from lorakit.evaluation.answer_metrics import EVAL_INSTALL, UnscorableRow, number_in
from lorakit.recipe.entries import RewardFunction
from lorakit.recipe.schema import Recipe
from lorakit.reinforcement.advantages import Floats, weighted_rewards
from lorakit.reinforcement.code_sandbox import UnitTests
from lorakit.reinforcement.judge_reward import JudgeReward
from lorakit.reinforcement.reward_process import FileReward, RegexReward


@dataclass(frozen=True, slots=True)
class Attempt:
    """A completion to score: the prompt's turns, the text, its ids, and the row's columns."""

    prompt: list[dict[str, Any]]
    text: str
    ids: list[int]
    fields: dict[str, Any]


class Reward(Protocol):
    """A reward function."""

    def __call__(self, attempts: Sequence[Attempt]) -> Sequence[float | None]:
        """Score completions, in order."""


@dataclass(frozen=True, slots=True)
class Rewards:
    """Rewards [N] of completions, and those of each function [N, F]; NaN where there are none."""

    total: Floats
    parts: Floats


class RewardSet:
    """All reward functions of a recipe.

    Args:
        folders: for relative paths.
        note: prints a line.

    Raises:
        RecipeError: a file, function, pattern or schema cannot be used.
        DependencyError: a package is not installed.
    """

    def __init__(
        self, recipe: Recipe, folders: Sequence[Path], note: Callable[[str], None]
    ) -> None:
        self.entries, self.note = recipe.rewards, note
        self.names = unique_names([entry.shown for entry in self.entries])
        self.weights = [entry.weight for entry in self.entries]
        self.functions = [_build(entry, folders, note) for entry in self.entries]
        self.faults = dict.fromkeys(self.names, 0)
        self.folders = folders

    def describe(self) -> str:
        """The functions with their weights, as one line."""
        pairs = zip(self.names, self.weights, strict=True)
        return ", ".join(n if w == 1 else f"{w:g} x {n}" for n, w in pairs)

    def digest(self, content_hashes: NDArray[np.uint64]) -> str:
        """SHA-256 of settings and files of the functions, and of the rows that they read."""
        digest = hashlib.sha256(content_hashes.tobytes())
        for entry in self.entries:
            settings = entry.model_dump(exclude={"file", "schema_file"})
            digest.update(json.dumps(settings, sort_keys=True).encode())
            for name in (entry.file, entry.schema_file):
                if name is not None:
                    digest.update(reward_file(name, self.folders).read_bytes())
        return digest.hexdigest()

    def score(self, attempts: Sequence[Attempt]) -> Rewards:
        """Score completions by all functions.

        Raises:
            WorkError: a function raised, took too long, returned another number of rewards, or
                none of them scored any completion.
        """
        parts = np.full((len(attempts), len(self.functions)), np.nan)
        for column, (name, function) in enumerate(zip(self.names, self.functions, strict=True)):
            try:
                values = function(attempts)
            except (WorkError, DependencyError) as error:
                raise WorkError(f"reward {name}: {error.message}", error.hint) from error
            parts[:, column] = self._checked(name, values, len(attempts))
        total = weighted_rewards(parts, self.weights)
        if np.isnan(total).all():
            raise WorkError(
                f"no reward function scored any of {len(attempts)} completions "
                f"({', '.join(self.names)})",
                hint="return a finite number for each completion",
            )
        return Rewards(total, parts)

    def _checked(self, name: str, values: Any, count: int) -> Floats:
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise WorkError(
                f"reward {name}: returned {type(values).__name__}, expected a list of {count} "
                "numbers"
            )
        if len(values) != count:
            raise WorkError(
                f"reward {name}: returned {len(values)} rewards, expected {count}",
                hint="return one number per completion",
            )
        checked = np.full(count, np.nan)
        for number, value in enumerate(values):
            if value is None:
                continue
            if not isinstance(value, int | float) or not math.isfinite(value):
                self._count(name, value)
                continue
            checked[number] = value
        return checked

    def _count(self, name: str, value: Any) -> None:
        self.faults[name] += 1
        if self.faults[name] == 1:
            self.note(
                f"reward {name}: gave {value!r} for a completion, expected a number; such "
                "completions are scored by the other functions, or left out; they are counted"
            )


def unique_names(names: Sequence[str]) -> list[str]:
    """Number equal names: regex, regex_2."""
    return [
        name if name not in names[:place] else f"{name}_{names[:place].count(name) + 1}"
        for place, name in enumerate(names)
    ]


_BOXED = re.compile(r"\\boxed\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")


def final_answer(text: str) -> str:
    """The answer in a text: after the last `####`, in the last `\\boxed{}`, or all of it."""
    if "####" in text:
        text = text.rpartition("####")[2].split("\n")[0]
    elif boxed := _BOXED.findall(text):
        text = boxed[-1]
    return " ".join(text.split())


class AnswerReward:
    """1 where the final answer is that of the column, 0 elsewhere."""

    def __init__(self, column: str, numeric: bool) -> None:
        self.column, self.numeric = column, numeric

    def __call__(self, attempts: Sequence[Attempt]) -> list[float | None]:
        return [self._score(a.text, str(a.fields.get(self.column, ""))) for a in attempts]

    def _score(self, text: str, reference: str) -> float | None:
        answer, wanted = final_answer(text), final_answer(reference)
        if not self.numeric:
            return float(answer == wanted or answer.rstrip(".") == wanted.rstrip("."))
        try:
            expected = number_in(wanted)
        except UnscorableRow:
            return None
        try:
            found = number_in(answer)
        except UnscorableRow:
            return 0.0
        return float(math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-9))


class LengthReward:
    """0 up to `limit - buffer` tokens, then falling to -1 at `limit`."""

    def __init__(self, limit: int, buffer: int) -> None:
        self.limit, self.buffer = limit, buffer

    def __call__(self, attempts: Sequence[Attempt]) -> list[float | None]:
        return [self._score(len(attempt.ids)) for attempt in attempts]

    def _score(self, tokens: int) -> float:
        if tokens >= self.limit:
            return -1.0
        return -max(0, tokens - (self.limit - self.buffer)) / max(1, self.buffer)


class SchemaReward:
    """1 where the completion is JSON of a schema: that of a file, or of the row's column."""

    def __init__(self, column: str | None, path: Path | None) -> None:
        try:
            import jsonschema
        except ImportError as error:
            raise DependencyError(
                "reward json_schema: jsonschema is not installed", hint=EVAL_INSTALL
            ) from error
        self.column, self.library = column, jsonschema
        self.fixed = None
        if path is not None:
            try:
                self.fixed = self._validator(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise RecipeError(
                    f"reward json_schema: {path}: not a JSON schema: {first_line(error)}"
                ) from error

    def _validator(self, schema: Any) -> Any:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        kind = self.library.validators.validator_for(schema)
        try:
            kind.check_schema(schema)
        except self.library.exceptions.SchemaError as error:
            raise ValueError(first_line(error)) from error
        return kind(schema)

    def __call__(self, attempts: Sequence[Attempt]) -> list[float | None]:
        return [self._score(attempt) for attempt in attempts]

    def _score(self, attempt: Attempt) -> float | None:
        validator = self.fixed
        if validator is None:
            try:
                validator = self._validator(attempt.fields.get(str(self.column)))
            except (ValueError, TypeError, AttributeError):
                return None
        try:
            value = json.loads(json_part(attempt.text))
            return float(validator.is_valid(value))
        except (ValueError, RecursionError):
            return 0.0


_FENCE = re.compile(r"\s*```(?:json)?[ \t]*\n(.*?)\n?```\s*", re.DOTALL)


def json_part(text: str) -> str:
    """The text, or what a single fenced block that makes up all of it holds."""
    fenced = _FENCE.fullmatch(text)
    return fenced[1] if fenced else text


def _build(entry: RewardFunction, folders: Sequence[Path], note: Callable[[str], None]) -> Reward:
    column = entry.reference_column
    if entry.file is not None:
        path = reward_file(entry.file, folders)
        return FileReward(path, str(entry.function), entry.timeout)
    if entry.name == "regex":
        return RegexReward(str(entry.pattern), entry.timeout)
    if entry.name == "json_schema":
        file = entry.schema_file
        return SchemaReward(column, None if file is None else reward_file(file, folders))
    if entry.name == "length":
        return LengthReward(int(entry.limit or 0), entry.buffer)
    if entry.name == "unit_tests":
        return UnitTests(str(column), entry.timeout, entry.memory, note)
    if entry.name == "judge":
        return JudgeReward(entry, column, note)
    return AnswerReward(str(column), entry.name == "numeric_answer")


def reward_file(name: str, folders: Sequence[Path]) -> Path:
    """Find a file of a reward function.

    Raises:
        RecipeError: it is in none of the folders.
    """
    for folder in folders:
        path = folder / Path(name).expanduser()
        if path.is_file():
            return path.resolve()
    raise RecipeError(
        f"reward_funcs: {name}: no such file", hint="give its path from here or from the recipe"
    )
