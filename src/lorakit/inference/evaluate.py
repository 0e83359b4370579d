"""Evaluate base and tuned model on held-out data: loss, perplexity and sample answers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.data.dataset import Item, read_validation
from lorakit.data.issues import IssueLog, RowError
from lorakit.data.prepare import prepare_data
from lorakit.data.tokenize.encode import EncodeConfig, encode_many
from lorakit.data.tokenize.spans import answer_text
from lorakit.errors import DataError, first_line
from lorakit.inference.generate import GenerationSettings, base_answers, replies
from lorakit.model.eval_mode import device_of
from lorakit.model.load import LoadedRun
from lorakit.recipe.schema import PREFERENCE_OBJECTIVES, Recipe
from lorakit.storage.run_dir import read_json
from lorakit.train.eval_loss import score
from lorakit.train.preference_loss import PreferenceObjective
from lorakit.train.preference_reference import answer_logps
from lorakit.train.preference_rows import PreferenceRows
from lorakit.train.preference_run import chosen_only, preference_scores, reference_store
from lorakit.train.trainer import pad_token_id
from lorakit.types import Conversation, EvalResult, Example, Message, Sample

ANSWER_TOKENS = 96
METRIC_ROWS = 64  # conversations that metrics score; each takes an answer of base and of tuned


def evaluate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    records: Sequence[Item],
    label: str,
    samples: int = 4,
    metrics: Mapping[str, Callable[[str, str], float]] | None = None,
    note: Callable[[str], None] = print,
    preferences: dict[str, float] | None = None,
) -> EvalResult:
    """Score base and tuned model on held-out examples, and generate greedy answers of both.

    Args:
        model: PEFT model; the base is the same model with its adapter switched off.
        examples: held-out examples to score, with the loss mask of training.
        records: the first `samples` conversations provide the questions, and their last answers
            the references.
        label: name of the data in the result.
        metrics: functions of (answer, reference) by name; each gives a number for a conversation,
            and the result has the mean over the first `METRIC_ROWS` of `records`.
        note: called with a line about a metric that failed; the others are computed.
        preferences: scores of preference data, which the result keeps.
    """
    if not examples:
        raise DataError(
            "there are no held-out examples to evaluate on",
            hint="set --data, or train with val_size above 0",
        )
    pad_id, answers_to_score = pad_token_id(tokenizer), chosen_only(examples)
    tuned = score(model, answers_to_score, pad_id)
    with base_answers(model):
        base = score(model, answers_to_score, pad_id)
    asked = max(samples, METRIC_ROWS) if metrics else samples
    answers = _answer(model, tokenizer, records, asked)
    means = {name: _means(name, metric, answers, note) for name, metric in (metrics or {}).items()}
    return EvalResult(
        base=base,
        tuned=tuned,
        data=label,
        samples=answers[:samples],
        metrics={name: found for name, found in means.items() if found is not None},
        preferences=preferences,
    )


def _means(
    name: str,
    metric: Callable[[str, str], float],
    answers: Sequence[Sample],
    note: Callable[[str], None],
) -> dict[str, float] | None:
    """Mean of a metric for base and tuned; None, with a note, if it gives no numbers."""
    if not answers:
        note(f"metric {name}: no held-out conversation to score")
        return None
    sums = {"base": 0.0, "tuned": 0.0}
    for number, sample in enumerate(answers, 1):
        for side in sums:
            try:
                value = float(metric(getattr(sample, side), sample.reference))
            except Exception as error:  # a function of the user may raise anything
                problem = f"{type(error).__name__}: {first_line(error)}"
            else:
                problem = "" if math.isfinite(value) else f"gave {value}"
            if problem:
                note(f"metric {name} is left out: {problem} (held-out conversation {number})")
                return None
            sums[side] += value
    return {side: total / len(answers) for side, total in sums.items()} | {"rows": len(answers)}


def questions_of(records: Sequence[Item], count: int) -> list[Conversation]:
    """The first conversations that end with an answer."""
    conversations = (r for r in records if isinstance(r, Conversation))
    answered = (c for c in conversations if c.messages[-1].role == "assistant")
    return list(itertools.islice(answered, count))


def _answer(
    model: Any, tokenizer: Any, records: Sequence[Item], samples: int
) -> tuple[Sample, ...]:
    """Generate greedy answers, which are the same each time."""
    questions = questions_of(records, samples)
    prompts: list[Sequence[Message]] = [c.messages[:-1] for c in questions]
    if not prompts:
        return ()
    settings = GenerationSettings(max_new_tokens=ANSWER_TOKENS, temperature=0.0)
    tools = [c.tools for c in questions]
    tuned = replies(model, tokenizer, prompts, settings, tools)
    with base_answers(model):
        base = replies(model, tokenizer, prompts, settings, tools)
    return tuple(
        Sample(c.messages[-2].content, answer_text(c.messages[-1]), b, t)
        for c, b, t in zip(questions, base, tuned, strict=True)
    )


def encode_held_out(tokenizer: Any, records: Sequence[Item], recipe: Recipe) -> list[Example]:
    """Encode held-out records as examples with the loss mask of training."""
    examples: list[Example] = []
    for _, encoded in encode_many(tokenizer, records, EncodeConfig.of(recipe), IssueLog()):
        if isinstance(encoded, RowError):
            raise encoded
        examples += encoded
    return examples


def evaluate_loaded(loaded: LoadedRun, data: str | None, samples: int) -> EvalResult:
    """Evaluate a finished run on its held-out rows, or on `data`.

    Raises:
        DataError: the run has no held-out rows and `data` is None, or `data` cannot be used.
    """
    recipe, run = loaded.recipe, loaded.run
    records: Sequence[Item]
    examples: Sequence[Example]
    if data is None:
        records = read_validation(run.validation)
        examples = encode_held_out(loaded.tokenizer, records, recipe)
    else:
        held_out = recipe.model_copy(update={"data": data, "val_data": None, "val_size": 0})
        prepared = prepare_data(held_out, loaded.tokenizer, [Path()])
        records, examples = prepared.train_conversations, prepared.train
    label = data or "the run's held-out rows"
    preferences = _preferences(loaded, examples) if examples else None
    return evaluate(
        loaded.model, loaded.tokenizer, examples, records, label, samples, preferences=preferences
    )


def _preferences(loaded: LoadedRun, examples: Sequence[Example]) -> dict[str, float] | None:
    """Scores of a run with a preference objective; None for other runs.

    The reference of a run that started from an adapter is known for its own held-out rows only;
    for other data it is the base.
    """
    recipe, model, pad_id = loaded.recipe, loaded.model, pad_token_id(loaded.tokenizer)
    if recipe.objective not in PREFERENCE_OBJECTIVES:
        return None
    objective = PreferenceObjective(recipe, device_of(model))
    rows = PreferenceRows(examples, recipe.objective == "kto", held_out=True)
    if objective.needs_reference:
        start = read_json(loaded.run.start)
        store = reference_store(loaded.run, recipe, start.get("sha256") if start else None)
        known = store.read("val", store.key(rows))
        if known is None:
            with base_answers(model):
                known = answer_logps(model, rows, pad_id)
        rows.reference = known
    return preference_scores(objective, rows, answer_logps(model, rows, pad_id))
