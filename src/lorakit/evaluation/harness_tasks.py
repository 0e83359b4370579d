"""Tasks of lm-eval by name: found, loaded, run on a model, and their values by document."""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorakit.errors import DataError, DependencyError, RecipeError, first_line
from lorakit.evaluation.answer_metrics import EVAL_INSTALL
from lorakit.evaluation.harness_index import mentioned, task_folders
from lorakit.evaluation.model_side import ModelSide
from lorakit.evaluation.task_rows import MetricRows
from lorakit.recipe.loader import suggest

# Seeds of `lm_eval.simple_evaluate`, for the same few-shot examples as by hand.
SEED, OTHER_SEED = 0, 1234


def task_manager(names: Sequence[str], include: Sequence[Path] = ()) -> Any:
    """lm-eval's index of the folders that hold the named tasks, and of the folders `include`.

    Raises:
        DependencyError: lm-eval is not installed or cannot be imported.
        RecipeError: a folder does not exist, or there is no such task; the nearest is suggested.
    """
    for folder in include:
        if not folder.is_dir():
            raise RecipeError(
                f"--include-path: {folder}: no such folder",
                hint="give a folder with task files (*.yaml) of lm-eval",
            )
    try:
        from lm_eval import tasks as shipped
    except ImportError as error:
        raise DependencyError(
            f"tasks of lm-eval need the package lm-eval: {first_line(error)}", hint=EVAL_INSTALL
        ) from error
    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    own = mentioned(include)
    known = task_folders(Path(shipped.__file__).parent)
    for name in names:
        check_name(name, [*own, *known])
    folders = {folder for name in {*names, *own} for folder in known.get(name, ())}
    return shipped.TaskManager(
        include_path=[str(folder) for folder in (*sorted(folders), *include)],
        include_defaults=False,
    )


def check_name(name: str, known: Collection[str]) -> None:
    """Check that lm-eval has a task, group or tag of this name, or that it is a task file.

    Raises:
        RecipeError: it has not; the nearest name is suggested.
    """
    if name in known or (name.endswith((".yaml", ".yml")) and Path(name).is_file()):
        return
    raise RecipeError(
        f"--tasks: {name}: no such task of lm-eval, and no file{suggest(name, known)}",
        hint="`lm-eval ls tasks` lists the tasks; --include-path adds a folder of your own; "
        "a file is a task too: --tasks mine.jsonl",
    )


class HarnessTask:
    """A task or group of lm-eval, on the first `limit` documents of each of its tasks."""

    def __init__(
        self,
        name: str,
        manager: Any,
        limit: int | None = None,
        system: str | None = None,
    ) -> None:
        self.name, self.limit, self.system = name, limit, system
        self.loaded = _load(name, manager)
        for task in self.loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.lorakit_failures = {}
            task.process_results = _guarded(task)

    def metric_directions(self) -> dict[str, bool]:
        """Metrics of all tasks, each with the names of its filters."""
        found: dict[str, bool] = {}
        for task in self.loaded["tasks"].values():
            filters = [f["name"] for f in task.get_config("filter_list") or ()] or ["none"]
            for metric, higher in task.higher_is_better().items():
                found |= {_shown(metric, each): bool(higher) for each in filters}
        return found

    def run(self, side: ModelSide) -> list[MetricRows]:
        """Ask the model all requests of the task, and score the answers by document.

        Raises:
            DataError: lm-eval refuses the task.
        """
        from lm_eval.evaluator import evaluate as run_tasks

        from lorakit.evaluation.harness_model import HarnessModel

        random.seed(SEED)
        np.random.seed(OTHER_SEED)
        torch.manual_seed(OTHER_SEED)
        for task in self.loaded["tasks"].values():
            task.set_fewshot_seed(seed=OTHER_SEED)
            task.lorakit_failures.clear()
        try:
            with _without_bars():
                found = run_tasks(
                    lm=HarnessModel(side),
                    task_dict=self.loaded,
                    limit=self.limit,
                    bootstrap_iters=0,
                    system_instruction=self.system,
                    apply_chat_template=True,
                    fewshot_as_multiturn=True,
                )
        except (ValueError, KeyError, AssertionError) as error:
            raise DataError(
                f"task {self.name}: lm-eval cannot run it: {first_line(error)}",
                hint="leave it out of --tasks; the other tasks are kept",
            ) from error
        rows = [
            each
            for name, task in self.loaded["tasks"].items()
            for each in _rows_of(name, task, found["samples"][name])
        ]
        return rows if len(self.loaded["tasks"]) == 1 else _pooled(self.name, rows)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide the bars with which lm-eval builds requests, among our own progress."""
    from lm_eval.api import task as module

    original = module.tqdm
    module.tqdm = lambda rows, **_: rows
    try:
        yield
    finally:
        module.tqdm = original


def _load(name: str, manager: Any) -> Any:
    """Load a task with its data.

    Raises:
        DataError: the data is not available here.
        DependencyError: the task needs a package that is not installed.
    """
    try:
        loaded = manager.load([name])
    except ImportError as error:
        raise DependencyError(
            f"task {name} needs a package that is not installed: {first_line(error)}",
            hint=f"pip install {error.name or 'it'}; lm-eval's extras name what its tasks need, "
            "such as pip install 'lm-eval[ifeval]'",
        ) from error
    except Exception as error:  # datasets and task files of others raise many types
        raise DataError(
            f"task {name}: its data ({_dataset_of(name, manager)}) cannot be loaded: "
            f"{first_line(error)}",
            hint="run once with network so that it is cached; or copy the task's YAML into a "
            "folder, set dataset_path: json and dataset_kwargs: {data_files: ...} to a local "
            "file, and add --include-path FOLDER",
        ) from error
    if not loaded["tasks"]:
        raise DataError(f"task {name}: lm-eval finds no task in it")
    return loaded


def _dataset_of(name: str, manager: Any) -> str:
    """Name the data set of a task, or of the first task of a group."""
    entry = manager.task_index.get(name)
    config = (entry.cfg if entry else None) or {}
    parts = [config.get("dataset_path"), config.get("dataset_name")]
    return " ".join(str(part) for part in parts if part) or "of its tasks"


def _guarded(task: Any) -> Callable[..., Any]:
    """`process_results` that keeps the reason for a document on which a metric raises."""
    original = task.process_results

    @functools.wraps(original)
    def process(doc: Any, results: Any) -> Any:
        try:
            return original(doc, results)
        except Exception as error:  # metrics of task files may raise anything
            task.lorakit_failures[repr(doc)] = f"{type(error).__name__}: {first_line(error)}"
            return {}

    return process


def _shown(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric} ({filter_name})"


def _rows_of(name: str, task: Any, samples: Sequence[dict[str, Any]]) -> list[MetricRows]:
    """Values of each metric and filter of one task by document."""
    values: dict[tuple[str, str], dict[Any, Any]] = {}
    failures: dict[Any, str] = {}
    for sample in samples:
        key = f"{name} document {sample['doc_id']}"
        if reason := task.lorakit_failures.get(repr(sample["doc"])):
            failures[key] = reason
        for metric in sample["metrics"]:
            values.setdefault((metric, sample["filter"]), {})[key] = sample[metric]
    higher, aggregations = task.higher_is_better(), task.aggregation()
    if failures and not values:
        values[next(iter(higher), "score"), "none"] = {}
    return [
        MetricRows(
            name,
            _shown(metric, each),
            found,
            failures,
            bool(higher.get(metric, True)),
            _aggregate(aggregations.get(metric), found.values()),
        )
        for (metric, each), found in values.items()
    ]


def _aggregate(function: Any, values: Any) -> Any:
    """None for the mean of numbers, which has a faster interval."""
    numbers = all(isinstance(value, int | float) for value in values)
    return (
        None
        if numbers and getattr(function, "__name__", "mean") in ("mean", "nanmean")
        else function
    )


def _pooled(name: str, rows: Sequence[MetricRows]) -> list[MetricRows]:
    """Join the documents of a group's tasks: each document has the same weight."""
    groups: dict[str, list[MetricRows]] = {}
    for each in rows:
        groups.setdefault(each.metric, []).append(each)
    pooled = []
    for metric, parts in groups.items():
        if any(part.aggregate is not None for part in parts):
            pooled += parts
            continue
        values = {key: value for part in parts for key, value in part.values.items()}
        failures = {key: reason for part in parts for key, reason in part.failures.items()}
        pooled.append(MetricRows(name, metric, values, failures, parts[0].higher_is_better))
    return pooled
