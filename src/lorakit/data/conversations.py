"""Sources of a recipe enter; their usable rows leave on a shelf, and what became of the others.

Each file is looked at by itself, since a folder may mix formats. Rows stream from the reader to the
shelf: however long a source is, a hundred of its rows are in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorakit.data.cache import folder_for, folder_key, key_of
from lorakit.data.dataset import ConversationDataset, Item, write_items
from lorakit.data.formats.columns import ColumnWatch
from lorakit.data.formats.normalize import clean_item
from lorakit.data.formats.row_formats import GUESS_ROWS, FormatGuess, guess_format, to_conversation
from lorakit.data.issues import IssueLog, RowError, check_turns, refuse_if_empty
from lorakit.data.sources.locate import left_aside
from lorakit.data.sources.readers import content_key, read_rows
from lorakit.recipe.schema import Recipe
from lorakit.types import Document, Row


def read_conversations(
    names: Sequence[str], recipe: Recipe, folders: Sequence[Path]
) -> tuple[ConversationDataset, IssueLog]:
    """Usable rows of all sources in order; `meta["lines"]` has a line of the report for each.

    Raises:
        DataError: a source is missing or damaged, or none of its rows can be used.
    """
    contents = [content_key(name, folders) for name in names]
    aside = [left_aside(name, folders) for name in names]
    rules = [list(names), aside, recipe.columns, recipe.system]
    key = None if None in contents else key_of("items", contents, rules)

    def make(folder: Path) -> None:
        meta: dict[str, Any] = {"lines": []}
        write_items(folder, _read_all(names, aside, recipe, folders, meta), meta)

    folder = folder_for(key, make)
    # What came from a network is read anew each time; what was read decides what is tokenized.
    shelf = ConversationDataset(folder, key or folder_key(folder))
    return shelf, IssueLog.from_dict(shelf.meta["faults"])


def _read_all(
    names: Sequence[str],
    aside: Sequence[Sequence[str]],
    recipe: Recipe,
    folders: Sequence[Path],
    meta: dict[str, Any],
) -> Iterator[tuple[Item, int]]:
    """(item, number of its source); what became of the rows is written into `meta`."""
    log = IssueLog()
    for number, name in enumerate(names):
        own, read, found = IssueLog(), 0, 0
        for path in aside[number]:
            own.add("file of another kind", path, "not read")
        formats: dict[str, str] = {}
        unused: dict[str, None] = {}
        rows = read_rows(name, folders, offline=recipe.offline)
        for _, group in itertools.groupby(rows, key=lambda row: row.origin.source):
            first = list(itertools.islice(group, GUESS_ROWS))
            guess = guess_format(first, recipe.columns)
            formats.setdefault(guess.name, guess.reason)
            watch = ColumnWatch(guess.used, recipe.columns)
            for row in itertools.chain(first, group):
                read += 1
                watch.check(row)
                for item in _convert(row, guess, recipe, own):
                    found += 1
                    yield item, number
            unused |= dict.fromkeys(watch.unused)
        shown = Path(name).name if Path(name).is_absolute() else name
        refuse_if_empty(found, read, shown, own)
        log.absorb(own)
        meta["lines"].append(
            {
                "source": shown,
                "format": ", ".join(formats),
                "reason": next(iter(formats.values())),
                "rows": read,
                "left_out": own.rows_left_out,
                "columns_not_used": list(unused),
            }
        )
    meta["faults"] = log.as_dict()


def _convert(row: Row, guess: FormatGuess, recipe: Recipe, log: IssueLog) -> Iterator[Item]:
    try:
        item = clean_item(to_conversation(row, guess, recipe.system), log)
        yield item if isinstance(item, Document) else check_turns(item, log)
    except RowError as fault:
        log.leave_out(fault)
