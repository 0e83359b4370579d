"""Turn the names of `--tasks` and `eval_tasks` into tasks, with all checks that need no model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.data.sources.locate import kind_of
from lorakit.errors import LorakitError, RecipeError
from lorakit.evaluation.answer_metrics import parse_metric
from lorakit.evaluation.file_task import FileTask
from lorakit.evaluation.general_skills import GeneralSkills
from lorakit.evaluation.harness_tasks import HarnessTask, task_manager
from lorakit.evaluation.task_rows import EvaluationTask
from lorakit.recipe.schema import Recipe

GENERAL = "general"
DEFAULT_METRICS = ("exact_match", "contains")
ANSWER_TOKENS = 256


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """A task as asked for: a name or file, its most rows, and metrics for a file."""

    name: str
    limit: int | None = None
    metrics: tuple[str, ...] = DEFAULT_METRICS
    max_new_tokens: int = ANSWER_TOKENS


@dataclass(frozen=True, slots=True)
class TaskList:
    """Tasks that can run, and the message about each that cannot."""

    tasks: tuple[EvaluationTask, ...]
    failed: dict[str, str] = field(default_factory=dict)


def parse_specs(
    texts: Iterable[str],
    metrics: Sequence[str] = (),
    max_new_tokens: int = ANSWER_TOKENS,
) -> list[TaskSpec]:
    """Read `NAME`, `NAME:LIMIT` and `FILE:LIMIT`, several in one text with commas.

    Raises:
        RecipeError: a limit of 0, or a task given twice.
    """
    found: list[TaskSpec] = []
    for text in (part.strip() for entry in texts for part in entry.split(",")):
        if not text:
            continue
        name, colon, tail = text.rpartition(":")
        limited = bool(colon) and tail.isdigit()
        if limited and int(tail) == 0:
            raise RecipeError(f"--tasks: {text}: found 0 rows, expected 1 or more")
        spec = TaskSpec(
            name if limited else text,
            int(tail) if limited else None,
            tuple(metrics) or DEFAULT_METRICS,
            max_new_tokens,
        )
        if spec.name in [each.name for each in found]:
            raise RecipeError(f"--tasks: {spec.name} is given twice", hint="give each task once")
        found.append(spec)
    return found


def recipe_specs(recipe: Recipe) -> list[TaskSpec]:
    """Read the recipe's `eval_tasks`."""
    found = []
    for entry in recipe.eval_tasks:
        if isinstance(entry, str):
            found += parse_specs([entry])
        else:
            (spec,) = parse_specs([entry.task], entry.metrics, entry.max_new_tokens)
            limit = spec.limit if entry.limit is None else entry.limit
            found.append(TaskSpec(spec.name, limit, spec.metrics, spec.max_new_tokens))
    return found


def build_tasks(
    specs: Sequence[TaskSpec],
    recipe: Recipe,
    folders: Sequence[Path] = (Path(),),
    include: Sequence[Path] = (),
    note: Callable[[str], None] = print,
) -> TaskList:
    """Build the tasks; one whose data is not available here is named, and the others go on.

    Args:
        folders: folders for relative paths of files.
        include: folders with further tasks of lm-eval.

    Raises:
        LorakitError: a task or metric is unknown, or a file is missing or has no usable row.
    """
    of_harness = [each.name for each in specs if not _is_own(each.name)]
    manager: Any = task_manager(of_harness, include) if of_harness else None
    tasks: list[EvaluationTask] = []
    failed: dict[str, str] = {}
    for spec in specs:
        if spec.name == GENERAL:
            tasks.append(GeneralSkills(spec.limit, recipe.system))
        elif _is_own(spec.name):
            metrics = [parse_metric(each, folders) for each in spec.metrics]
            own = FileTask(
                spec.name, metrics, recipe, spec.limit, spec.max_new_tokens, folders, note
            )
            tasks.append(own)
        else:
            try:
                tasks.append(HarnessTask(spec.name, manager, spec.limit, recipe.system))
            except LorakitError as error:
                failed[spec.name] = str(error)
                note(f"left out: {error}")
    return TaskList(_with_own_names(tasks), failed)


def _is_own(name: str) -> bool:
    """True for the shipped questions, and for data that is no task of lm-eval."""
    path = Path(name).expanduser()
    return (
        name == GENERAL
        or kind_of(name) is not None
        or "*" in name
        or ("/" in name and path.is_dir())
    )


def _with_own_names(tasks: Sequence[EvaluationTask]) -> tuple[EvaluationTask, ...]:
    """Number the tasks of files with one name in several folders."""
    seen: dict[str, int] = {}
    for task in tasks:
        seen[task.name] = seen.get(task.name, 0) + 1
        if seen[task.name] > 1:
            task.name = f"{task.name} {seen[task.name]}"
    return tuple(tasks)
