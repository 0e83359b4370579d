"""Evaluate a run: held-out loss, tasks before and after, general skills, and a judge.

Answers are kept in the run's folder, so that a stopped evaluation continues; `eval.json` and the
report are written at the end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from lorakit.data.conversations import read_conversations
from lorakit.data.dataset import Item, read_validation
from lorakit.data.tokenize.encode import prompt_ids
from lorakit.data.tokenize.spans import answer_text
from lorakit.errors import DataError, LorakitError
from lorakit.evaluation.answer_store import AnswerStore, file_name
from lorakit.evaluation.eval_progress import EvalProgress
from lorakit.evaluation.judge import JudgeEndpoint, judge_pairs
from lorakit.evaluation.model_side import ModelSide
from lorakit.evaluation.task_list import ANSWER_TOKENS, GENERAL, TaskSpec, build_tasks, parse_specs
from lorakit.evaluation.task_rows import EvaluationTask, paired_scores
from lorakit.inference.evaluate import evaluate_loaded, questions_of
from lorakit.inference.generate import GenerationSettings, base_answers
from lorakit.model.load import LoadedRun, load_run
from lorakit.model.start_adapter import weights_sha256
from lorakit.recipe.loader import load_recipe
from lorakit.report.page import renew_report
from lorakit.storage.run_dir import RunDir, read_json, write_json
from lorakit.types import EvalResult, Message, Sample, TaskScore

JUDGED_ROWS = 32


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """Parts of an evaluation.

    Attributes:
        data: data to use instead of the run's held-out rows.
        samples: answers to show.
        tasks: names or files, each with an optional limit: `gsm8k:200`, `mine.jsonl`.
        metrics: metrics of the tasks from files.
        include: folders with task files of lm-eval.
        general: score the shipped questions of general skills.
        judge: endpoint that compares base and tuned on held-out questions.
    """

    data: str | None = None
    samples: int = 4
    tasks: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    include: tuple[Path, ...] = ()
    general: bool = True
    judge: JudgeEndpoint | None = None
    judge_rows: int = JUDGED_ROWS
    max_new_tokens: int = ANSWER_TOKENS


# (model, data instead of the run's held-out rows, answers to show) -> scores
HeldOut = Callable[[LoadedRun, str | None, int], EvalResult]


def evaluate_run(
    run: RunDir,
    request: EvalRequest,
    console: Console,
    loaded: LoadedRun | None = None,
    held_out: HeldOut = evaluate_loaded,
) -> tuple[EvalResult, dict[str, str]]:
    """Evaluate a finished run, and write eval.json and the report.

    Args:
        loaded: the run's model, if it is already loaded.
        held_out: scores the held-out rows.

    Returns:
        The result, and the message about each task that could not run.

    Raises:
        LorakitError: a task, metric or file is wrong (before the model is loaded), or there is
            neither a held-out row nor a task.
    """
    recipe = load_recipe(run.recipe).recipe
    specs = parse_specs(request.tasks, request.metrics, request.max_new_tokens)
    if request.general and GENERAL not in [spec.name for spec in specs]:
        specs.append(TaskSpec(GENERAL))
    listed = build_tasks(specs, recipe, [Path(), run.path], request.include, console.print)
    records = _records(run, request)
    if not records and not listed.tasks:
        raise DataError(
            f"{run.path}: nothing to evaluate on: no held-out rows, and no task",
            hint="give --data or --tasks, or train with val_size above 0",
        )
    loaded = loaded or load_run(run)
    stores = RunStores(run, loaded)
    progress = EvalProgress(console)
    result = EvalResult(None, None, request.data or "")
    if request.data is None and not records:
        console.print("held-out loss: not scored, this run has no held-out rows")
    else:
        result = held_out(loaded, request.data, request.samples)
    failed = dict(listed.failed)
    scores, more = score_tasks(listed.tasks, loaded, stores.of, progress, console.print)
    failed |= more
    judge = None
    if request.judge is not None:
        pairs = _pairs(records or _data_records(loaded, request), request, loaded, stores, progress)
        store = AnswerStore(run.answers / "judge" / file_name(request.judge.model))
        judge = judge_pairs(request.judge, pairs, store, progress, console.print)
        if judge is None:
            failed["judge"] = "no pair was judged"
    result = replace(result, tasks=tuple(scores), judge=judge, adapter=stores.adapter)
    _write(run, result, request, console.print)
    return result, failed


class RunStores:
    """Stores of the answers of base and tuned, in folders named by weights, type and device."""

    def __init__(self, run: RunDir, loaded: LoadedRun) -> None:
        self.adapter = weights_sha256(run.adapter)
        device = f"{loaded.device.kind} {loaded.device.dtype}"
        base = run.base.read_text(encoding="utf-8") if run.base.exists() else ""
        parts = {"base": [base, device], "tuned": [base, device, self.adapter]}
        self.folders = {
            side: run.answers / f"{side}-{hashlib.sha256(json.dumps(p).encode()).hexdigest()[:12]}"
            for side, p in parts.items()
        }

    def of(self, side: str, task: str) -> AnswerStore:
        """Open the store of one model and task."""
        return AnswerStore(self.folders[side] / file_name(task))


def score_tasks(
    tasks: Sequence[EvaluationTask],
    loaded: LoadedRun,
    store_of: Callable[[str, str], AnswerStore],
    progress: EvalProgress,
    note: Callable[[str], None],
) -> tuple[list[TaskScore], dict[str, str]]:
    """Score base and tuned on each task; one that fails is named, and the others go on.

    Args:
        store_of: opens the store of the answers of one model, "base" or "tuned", to a task.
    """
    scores: list[TaskScore] = []
    failed: dict[str, str] = {}
    for task in tasks:
        progress.task = task.name
        try:
            sides = {
                name: ModelSide(
                    loaded.model, loaded.tokenizer, store_of(name, task.name), progress, name
                )
                for name in ("tuned", "base")
            }
            tuned = task.run(sides["tuned"])
            with base_answers(loaded.model):
                base = task.run(sides["base"])
        except LorakitError as error:
            failed[task.name] = str(error)
            note(f"left out: {error}")
            continue
        scores += paired_scores(base, tuned, note)
    return scores, failed


def _records(run: RunDir, request: EvalRequest) -> list[Item]:
    """Held-out rows of the run; none where other data is given."""
    return (
        read_validation(run.validation) if request.data is None and run.validation.exists() else []
    )


def _data_records(loaded: LoadedRun, request: EvalRequest) -> Sequence[Item]:
    """Rows of the data that is given instead."""
    if request.data is None:
        return []
    recipe = loaded.recipe.model_copy(update={"data": request.data, "val_data": None})
    return read_conversations([request.data], recipe, [Path()])[0]


def _pairs(
    records: Sequence[Item],
    request: EvalRequest,
    loaded: LoadedRun,
    stores: RunStores,
    progress: EvalProgress,
) -> list[Sample]:
    """Answers of base and tuned to the first questions.

    Raises:
        DataError: no row has a question and an answer.
    """
    questions = questions_of(records, request.judge_rows)
    if not questions:
        raise DataError(
            "--judge: no held-out row has a question and an answer to compare",
            hint="give rows with --data",
        )
    prompts = [prompt_ids(loaded.tokenizer, c.messages[:-1], c.tools) for c in questions]
    settings = GenerationSettings(request.max_new_tokens, temperature=0.0)
    progress.task = "answers to judge"

    def answers(side: str) -> list[str]:
        store = stores.of(side, "judge")
        asked = ModelSide(loaded.model, loaded.tokenizer, store, progress, side)
        return asked.generate(prompts, settings)

    tuned = answers("tuned")
    with base_answers(loaded.model):
        base = answers("base")
    return [
        Sample(_as_text(c.messages[:-1]), answer_text(c.messages[-1]), b.strip(), t.strip())
        for c, b, t in zip(questions, base, tuned, strict=True)
    ]


def _as_text(turns: Sequence[Message]) -> str:
    """A conversation for a judge; a single question without its role."""
    if len(turns) == 1:
        return turns[0].content
    return "\n".join(f"{turn.role}: {answer_text(turn)}" for turn in turns)


def _write(
    run: RunDir, result: EvalResult, request: EvalRequest, note: Callable[[str], None]
) -> None:
    """Write eval.json, which keeps scores of the same adapter that were not computed again."""
    before = read_json(run.eval)
    before = before if isinstance(before, dict) else {}
    value = result.as_dict()
    if request.data is not None or (result.base is None and not result.metrics):
        # Other data does not replace the scores on the run's own rows.
        if not value["tasks"] and result.judge is None:
            return
        value |= {
            k: before[k] for k in ("base", "tuned", "data", "samples", "metrics") if k in before
        }
    if before.get("adapter") == result.adapter:
        new = {score["task"] for score in value["tasks"]}
        kept = [s for s in before.get("tasks") or [] if s.get("task") not in new]
        value["tasks"] = [*kept, *value["tasks"]]
        value["judge"] = value["judge"] or before.get("judge")
    write_json(run.eval, value)
    renew_report(run, note)
