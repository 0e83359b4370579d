"""Read the sources of a recipe into a dataset on disk, and count the rows that were left out.

The format is guessed for each file, since a folder may mix formats. Rows stream from the reader to
the disk: a hundred rows are in memory, however long a source is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.data.cache import cached, key_of
from lorakit.data.dataset import ConversationDataset, Item, write_items
from lorakit.data.formats.columns import ColumnWatch
from lorakit.data.formats.marks import unknown_flags
from lorakit.data.formats.normalize import clean_item
from lorakit.data.formats.preferences import guess_preferences, to_preferences
from lorakit.data.formats.prompts import check_references, guess_prompts, to_prompt
from lorakit.data.formats.rendered import note_rendered
from lorakit.data.formats.row_formats import GUESS_ROWS, FormatGuess, guess_format, to_conversation
from lorakit.data.formats.tool_turns import has_null_arguments
from lorakit.data.issues import IssueLog, RowError, check_turns, refuse_if_empty
from lorakit.data.sources.locate import left_aside
from lorakit.data.sources.readers import content_key, read_rows
from lorakit.recipe.schema import PAIR_OBJECTIVES, PREFERENCE_OBJECTIVES, Recipe
from lorakit.types import Conversation, Document, Row


def read_conversations(
    names: Sequence[str], recipe: Recipe, folders: Sequence[Path]
) -> tuple[ConversationDataset, IssueLog]:
    """Read the usable rows of all sources in order.

    Returns:
        The dataset, whose `meta["lines"]` has one line of the report per source, and the faults.

    Raises:
        DataError: a source is missing or damaged, or none of its rows can be used.
    """
    contents = [content_key(name, folders) for name in names]
    skipped_files = [left_aside(name, folders) for name in names]
    rules: list[Any] = [list(names), skipped_files, recipe.columns, recipe.system]
    if recipe.objective in PREFERENCE_OBJECTIVES:
        rules.append("pairs" if recipe.objective in PAIR_OBJECTIVES else "labels")
    if recipe.objective == "grpo":
        rules.append([entry.model_dump() for entry in recipe.rewards])
    key = None if None in contents else key_of("items", contents, rules)

    def write(path: Path) -> dict[str, Any]:
        meta: dict[str, Any] = {"lines": []}
        return write_items(path, _read_all(names, skipped_files, recipe, folders, meta), meta)

    dataset = ConversationDataset(cached(key, write))
    return dataset, IssueLog.from_dict(dataset.meta["faults"])


def _read_all(
    names: Sequence[str],
    skipped_files: Sequence[Sequence[tuple[str, str]]],
    recipe: Recipe,
    folders: Sequence[Path],
    meta: dict[str, Any],
) -> Iterator[tuple[Item, int]]:
    """Yield (item, index of its source) pairs; write report lines and faults into `meta`."""
    log = IssueLog()
    for index, name in enumerate(names):
        source_log, read, usable = IssueLog(), 0, 0
        for path, why in skipped_files[index]:
            source_log.add(why, path, "not read")
        formats: dict[str, str] = {}
        unused: dict[str, None] = {}
        files: list[str] = []
        rows = read_rows(name, folders, offline=recipe.offline)
        for file, group in itertools.groupby(rows, key=lambda row: row.origin.source):
            files.append(file)
            first = list(itertools.islice(group, GUESS_ROWS))
            guess = _guess(first, recipe)
            formats.setdefault(guess.name, guess.reason)
            watch = ColumnWatch(guess.used, guess.columns, recipe.columns)
            for row in itertools.chain(first, group):
                read += 1
                watch.check(row)
                for item in _convert(row, guess, recipe, source_log):
                    usable += 1
                    yield item, index
            unused |= dict.fromkeys(watch.unused)
        shown = Path(name).name if Path(name).is_absolute() else name
        refuse_if_empty(usable, read, shown, source_log)
        log.merge(source_log)
        meta["lines"].append(
            {
                "source": shown,
                "format": ", ".join(formats),
                "reason": next(iter(formats.values())),
                "rows": read,
                "left_out": source_log.rows_left_out,
                "columns_not_used": list(unused),
                **({"files": ", ".join(files)} if len(files) > 1 else {}),
            }
        )
    meta["faults"] = log.as_dict()


def _guess(first: Sequence[Row], recipe: Recipe) -> FormatGuess:
    if recipe.objective in PREFERENCE_OBJECTIVES:
        return guess_preferences(first, recipe.columns, recipe.objective)
    if recipe.objective == "grpo":
        return guess_prompts(first, recipe.columns)
    return guess_format(first, recipe.columns)


def _convert(row: Row, guess: FormatGuess, recipe: Recipe, log: IssueLog) -> Iterator[Item]:
    try:
        for name in unknown_flags(row.values):
            log.add(f"flag {name!r} of an answer has no known meaning", row.origin, "not used")
        if recipe.objective == "grpo":
            prompt = to_prompt(row, guess, recipe.system)
            yield _cleaned(check_references(prompt, recipe), row, log)
            return
        if recipe.objective not in PREFERENCE_OBJECTIVES:
            yield _cleaned(to_conversation(row, guess, recipe.system), row, log)
            return
        for item in to_preferences(row, guess, recipe.system, recipe.objective, log):
            yield _both_cleaned(item, row, log)
    except RowError as fault:
        log.skip_row(fault)


def _cleaned(item: Item, row: Row, log: IssueLog) -> Item:
    item = clean_item(note_rendered(item, log), log)
    calls = isinstance(item, Conversation) and any("tool_calls" in m.extra for m in item.messages)
    if calls and has_null_arguments(row.values):
        log.add("null argument of a tool call", row.origin, "the row kept without it")
    return item if isinstance(item, Document) else check_turns(item, log)


def _both_cleaned(item: Conversation, row: Row, log: IssueLog) -> Item:
    """Clean both conversations of a pair; a change of the prompt is counted once."""
    cleaned = _cleaned(replace(item, rejected=()), row, log)
    if not item.rejected or isinstance(cleaned, Document):
        return cleaned
    other = _cleaned(replace(item, messages=item.rejected, rejected=()), row, IssueLog())
    if isinstance(other, Document) or other.messages == cleaned.messages:
        raise RowError(
            "identical answers", row.origin, "chosen and rejected are equal once they are cleaned"
        )
    return replace(cleaned, rejected=other.messages)
