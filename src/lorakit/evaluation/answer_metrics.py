"""Metrics of one answer: exact match, contains, regex, number, JSON, tool calls, ROUGE, your own.

A metric gives a number for an answer and its reference, higher is better. It raises for a row that
it cannot score; that row is counted and left out for base and tuned.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import DependencyError, LorakitError, RecipeError, first_line
from lorakit.evaluation.tool_calls import called_in, expected_calls
from lorakit.recipe.loader import suggest
from lorakit.types import Message

EVAL_INSTALL = "pip install 'lorakit[eval]'"
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+(?:[eE][-+]?\d+)?")


@dataclass(frozen=True, slots=True)
class AnswerMetric:
    """A metric by name; `score` takes the answer, the reference text and the reference turn."""

    name: str
    score: Callable[[str, str, Message], float]


class UnscorableRow(ValueError):
    """The row lacks what a metric needs."""


def parse_metric(text: str, folders: Sequence[Path] = (Path(),)) -> AnswerMetric:
    """Find a metric by its name, `NAME:ARGUMENT`, or `FILE.py:FUNCTION`.

    Raises:
        RecipeError: the name is unknown, or its argument is missing or wrong.
        DependencyError: the metric's package is not installed.
    """
    name, _, argument = text.partition(":")
    if name.endswith(".py"):
        return AnswerMetric(argument or name, _own(name, argument, folders))
    if name not in _METRICS:
        raise RecipeError(
            f"metric: {name!r} is unknown{suggest(name, _METRICS)}",
            hint=f"metrics: {', '.join(_METRICS)}, or FILE.py:FUNCTION for your own",
        )
    if argument and name not in _ARGUMENTS:
        raise RecipeError(f"metric: {name} takes no argument (found: {argument!r})")
    shown = argument if name == "rouge" and argument else name
    return AnswerMetric(shown, _METRICS[name](argument, folders))


def number_in(text: str) -> float:
    """Last number of a text, as a reader takes it: `1,000` is a thousand.

    Raises:
        UnscorableRow: the text has no number.
    """
    found = _NUMBER.findall(text)
    if not found:
        raise UnscorableRow("the reference has no number")
    return float(found[-1].replace(",", ""))


def _plain(score: Callable[[str, str], float]) -> Callable[..., Any]:
    """A metric of texts without an argument."""
    return lambda argument, folders: lambda answer, reference, turn: score(answer, reference)


def _exact(answer: str, reference: str) -> float:
    return float(answer.strip() == reference.strip())


def _contains(answer: str, reference: str) -> float:
    if not reference.strip():
        raise UnscorableRow("the reference is empty")
    return float(reference.strip().casefold() in answer.casefold())


def _numeric(answer: str, reference: str) -> float:
    wanted = number_in(reference)
    found = _NUMBER.findall(answer)
    if not found:
        return 0.0
    return float(math.isclose(number_in(answer), wanted, rel_tol=1e-6, abs_tol=1e-9))


def _json(answer: str, reference: str) -> float:
    try:
        wanted = json.loads(reference)
    except ValueError as error:
        raise UnscorableRow(f"the reference is not JSON: {error}") from error
    try:
        return float(json.loads(answer) == wanted)
    except (ValueError, RecursionError):
        return 0.0


def _regex(argument: str, folders: Sequence[Path]) -> Callable[[str, str, Message], float]:
    """Match the row's reference as a pattern, or compare what one pattern finds in both texts."""
    if not argument:

        def matches(answer: str, reference: str, turn: Message) -> float:
            try:
                return float(re.search(reference, answer) is not None)
            except re.error as error:
                raise UnscorableRow(f"the reference is not a pattern: {error}") from error

        return matches
    try:
        pattern = re.compile(argument)
    except re.error as error:
        raise RecipeError(f"metric: regex:{argument}: not a pattern: {error}") from error

    def last(text: str) -> str | None:
        found = [m.group(1) if pattern.groups else m.group() for m in pattern.finditer(text)]
        return found[-1] if found else None

    def equal(answer: str, reference: str, turn: Message) -> float:
        wanted = last(reference)
        if wanted is None:
            raise UnscorableRow(f"the pattern {argument} is not in the reference")
        return float(last(answer) == wanted)

    return equal


def _schema(argument: str, folders: Sequence[Path]) -> Callable[[str, str, Message], float]:
    """Check that the answer is JSON of a schema, given as a file."""
    if not argument:
        raise RecipeError("metric: json_schema: no schema", hint="--metric json_schema:FILE.json")
    try:
        import jsonschema
    except ImportError as error:
        raise DependencyError(
            "metric: json_schema: jsonschema is not installed", hint=EVAL_INSTALL
        ) from error
    path = _found(argument, folders)
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
        kind = jsonschema.validators.validator_for(schema)
        kind.check_schema(schema)
    except (ValueError, OSError, jsonschema.exceptions.SchemaError) as error:
        raise RecipeError(f"metric: {path}: not a JSON schema: {first_line(error)}") from error
    validator = kind(schema)

    def valid(answer: str, reference: str, turn: Message) -> float:
        try:
            return float(validator.is_valid(json.loads(answer)))
        except (ValueError, RecursionError):
            return 0.0

    return valid


def _rouge(argument: str, folders: Sequence[Path]) -> Callable[[str, str, Message], float]:
    kind = argument or "rougeL"
    known = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    if kind not in known:
        raise RecipeError(
            f"metric: rouge:{kind}: unknown{suggest(kind, known)}",
            hint=f"one of {', '.join(known)}",
        )
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise DependencyError(
            "metric: rouge: rouge-score is not installed", hint=EVAL_INSTALL
        ) from error
    scorer = RougeScorer([kind], use_stemmer=True)
    return lambda answer, reference, turn: float(scorer.score(reference, answer)[kind].fmeasure)


def _tool_calls(argument: str, folders: Sequence[Path]) -> Callable[[str, str, Message], float]:
    """Compare the calls in the answer with those of the reference turn, in any order."""

    def equal(answer: str, reference: str, turn: Message) -> float:
        wanted = [json.dumps(call, sort_keys=True) for call in expected_calls(turn)]
        found = [json.dumps(call, sort_keys=True) for call in called_in(answer)]
        return float(sorted(found) == sorted(wanted))

    return equal


def _own(name: str, function: str, folders: Sequence[Path]) -> Callable[..., float]:
    """Import a function of (answer, reference) from a file of the user."""
    path = _found(name, folders)
    if not function:
        raise RecipeError(f"metric: {name}: no function named", hint=f"--metric {name}:FUNCTION")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file may raise anything
        raise RecipeError(
            f"metric: {path}: cannot be imported: {type(error).__name__}: {first_line(error)}"
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise RecipeError(
            f"metric: {path} has no function {function}{suggest(function, names)}",
            hint=f"write def {function}(answer, reference): ... there",
        )
    return lambda answer, reference, turn: found(answer, reference)


def _found(name: str, folders: Sequence[Path]) -> Path:
    for folder in folders:
        path = folder / Path(name).expanduser()
        if path.is_file():
            return path
    raise RecipeError(f"metric: {name}: no such file", hint="give its path from here")


def value_of(metric: AnswerMetric, answer: str, reference: str, turn: Message) -> float | str:
    """Score one answer; the reason as text if the metric fails on this row."""
    try:
        value = float(metric.score(answer, reference, turn))
    except LorakitError as error:
        return error.message
    except UnscorableRow as error:
        return str(error)
    except Exception as error:  # a function of the user may raise anything
        return f"{type(error).__name__}: {first_line(error)}"
    return value if math.isfinite(value) else f"gave {value}"


_METRICS: dict[str, Callable[[str, Sequence[Path]], Callable[[str, str, Message], float]]] = {
    "exact_match": _plain(_exact),
    "contains": _plain(_contains),
    "regex": _regex,
    "numeric": _plain(_numeric),
    "json": _plain(_json),
    "json_schema": _schema,
    "tool_calls": _tool_calls,
    "rouge": _rouge,
}
_ARGUMENTS = ("regex", "json_schema", "rouge")
METRIC_NAMES = tuple(_METRICS)
