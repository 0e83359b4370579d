"""A recipe and a tokenizer enter; examples to train on, held-out ones and a report leave."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.data.cache import folder_for, key_of
from lorakit.data.conversations import read_conversations
from lorakit.data.dataset import (
    ConversationDataset,
    Examples,
    Item,
    Items,
    TokenizedDataset,
    write_examples,
    write_items,
)
from lorakit.data.dedup import report_duplicates, report_overlap
from lorakit.data.issues import (
    HELD_OUT,
    SHOWN_ROWS,
    FatalRowError,
    IssueLog,
    RowError,
    refuse_if_empty,
    refuse_if_strict,
    told_faults,
)
from lorakit.data.split import shuffled, split
from lorakit.data.tokenize.batch_tokenizer import tokenizer_key
from lorakit.data.tokenize.encode import EncodeConfig, encode_many, resolve_template
from lorakit.errors import DataError
from lorakit.recipe.schema import Recipe
from lorakit.types import DataReport, Document, Example


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run trains on and is scored on: examples, and the items they were made from.

    All four are read from disk as they are asked for: a million rows cost memory by the hundred
    bytes. Their order is that of the sources, the same in each run on the same data.
    """

    train: Examples
    val: Examples
    train_conversations: Sequence[Item]
    val_conversations: Sequence[Item]
    report: DataReport


@dataclass(frozen=True, slots=True)
class _Split:
    """Some items of a shelf by number, int64 [N], with the shelf of their examples."""

    shelf: TokenizedDataset
    chosen: NDArray[np.int64]

    @property
    def prints(self) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """Content hash and signature of each item."""
        return self.shelf.items.marks[self.chosen], self.shelf.items.signatures[self.chosen]

    def place(self, number: int) -> Any:
        return self.shelf.items.origin(int(self.chosen[number]))

    @property
    def items(self) -> Items:
        """The items themselves."""
        return Items(self.shelf.items, self.chosen)

    def examples(self, times: NDArray[np.int64] | None = None) -> Examples:
        """The examples of these items, each as many times as its item is wanted, int64 [items]."""
        wanted = np.zeros(len(self.shelf.items), np.int64)
        wanted[self.chosen] = 1 if times is None else times[self.chosen]
        left = wanted[self.shelf.owners]
        # All of them once, then those wanted twice: copies do not stand side by side.
        rounds = [np.flatnonzero(left > done) for done in range(int(left.max(initial=1)))]
        return Examples(self.shelf, np.concatenate(rounds))


def prepare(
    recipe: Recipe, tokenizer: Any, folders: Sequence[Path] = (), inspecting: bool = False
) -> Prepared:
    """Run the stages from source strings to examples; sets the chat template on `tokenizer`.

    Args:
        folders: where relative paths are tried after the current directory.
        inspecting: rows that would spoil the training are counted, not stopped at.

    Raises:
        DataError: a source is missing or damaged, nothing usable is left, or a row would spoil
            the training; every message names the file and the row.
        ModelError: the tokenizer has no workable chat template.
    """
    # Millions of small objects come and go here; what torch and transformers hold (a pass over it
    # takes 0.1 s, every 10,000 rows) need not be looked through each time.
    gc.freeze()
    try:
        return _prepare(recipe, tokenizer, folders, inspecting)
    finally:
        gc.unfreeze()


def _prepare(recipe: Recipe, tokenizer: Any, folders: Sequence[Path], inspecting: bool) -> Prepared:
    items, log = read_conversations(recipe.sources, recipe, folders)
    lines, held_items = list(items.meta["lines"]), None
    if recipe.val_data:
        held_items, held_log = read_conversations([recipe.val_data], recipe, folders)
        lines += held_items.meta["lines"]
        log.absorb(held_log)
    elif recipe.held_out and len(items) == 1:
        items, held_items = _split_single_document(items, recipe.held_out, log)
    thinking = items.thinking or (held_items is not None and held_items.thinking)
    info = resolve_template(tokenizer, recipe.model, thinking)
    encode = _Encoder(recipe, tokenizer, inspecting, log)
    side = encode(items)
    report_duplicates(*side.prints, side.place, log)
    if held_items is not None:
        train, held = side, encode(held_items)
        report_overlap(train.prints, held.prints, held.place, log)
    else:
        out = _split(side, recipe, log)
        train, held = (_Split(side.shelf, side.chosen[part]) for part in (~out, out))
        _tell_large_share(train, held, log)
    examples = train.examples(_times(train, recipe, log))
    val = held.examples()
    if recipe.strict and not inspecting:
        refuse_if_strict(log)
    report = DataReport(
        sources=tuple(_with_documents(line, recipe) for line in lines),
        rows_read=sum(line["rows"] for line in lines),
        examples_train=len(examples),
        examples_val=len(val),
        tokens_train=int(examples.lengths.sum()),
        trained_tokens_train=int(examples.trained.sum()),
        tokens_val=int(val.lengths.sum()),
        trained_tokens_val=int(val.trained.sum()),
        longest_example=int(max(part.lengths.max(initial=0) for part in (examples, val))),
        cutoff_len=recipe.cutoff_len,
        template=info.source,
        faults=log.faults(),
    )
    return Prepared(examples, val, train.items, held.items, report)


def _split(side: _Split, recipe: Recipe, log: IssueLog) -> NDArray[np.bool_]:
    try:
        return split(side.prints[0], recipe.held_out, recipe.seed)
    except DataError as error:
        if not log.rows_left_out:
            raise
        # Few rows are left because others went: that is what there is to mend.
        lost = f"{log.rows_left_out:,} rows were left out: {told_faults(log)}"
        raise DataError(f"{error.message}; {lost}", error.hint) from None


def _tell_large_share(train: _Split, held: _Split, log: IssueLog) -> None:
    """Rows are held out by number: one of two books is 5% of nothing."""
    sizes = [int(part.examples().lengths.sum()) for part in (train, held)]
    rows = len(held.chosen) / (len(train.chosen) + len(held.chosen))
    share = sizes[1] / sum(sizes)
    if share > max(0.2, 2 * rows) or (share > 0.2 and len(train.chosen) < 5):
        first = [str(held.place(i)) for i in range(min(SHOWN_ROWS, len(held.chosen)))]
        kind = f"{share:.0%} of the tokens are held out"
        log.add_many(kind, len(held.chosen), first, HELD_OUT)


_DOCUMENTS = {
    "completion": "trained as plain text, every token (documents: instruction makes requests and "
    "answers of it, better for a chat model)",
    "instruction": "each piece trained as the answer to a request (documents: completion trains "
    "every token as it stands)",
}


def _with_documents(line: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """A line of the report that says, for plain texts, how they are trained."""
    texts = "text" in line["format"].split(", ")
    return {**line, "documents": _DOCUMENTS[recipe.documents]} if texts else line


# -- encoding -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Encoder:
    """Makes the examples of a shelf of items, or finds them made."""

    recipe: Recipe
    tokenizer: Any
    inspecting: bool
    log: IssueLog

    def __call__(self, items: ConversationDataset) -> _Split:
        rules = EncodeConfig.of(self.recipe)
        known = tokenizer_key(self.tokenizer)
        key = key_of("examples", items.key, known, rules.as_dict()) if items.key and known else None
        own = IssueLog()

        def make(folder: Path) -> None:
            write_examples(folder, self._made(items, rules, own), own)

        shelf = TokenizedDataset(folder_for(key, make), items)
        if shelf.faults.spoils and not self.inspecting:
            for _ in self._made(items, rules, own):  # kept by `inspect`: stops at the row again
                pass
        self.log.absorb(shelf.faults)
        return _Split(shelf, np.unique(shelf.owners).astype(np.int64))

    def _made(
        self, items: ConversationDataset, rules: EncodeConfig, log: IssueLog
    ) -> Iterator[tuple[int, list[Example]]]:
        made = encode_many(self.tokenizer, items, rules, log)
        for number, (_, examples) in enumerate(made):
            if isinstance(examples, FatalRowError) and not self.inspecting:
                raise examples
            if isinstance(examples, RowError):
                log.leave_out(examples)
            else:
                yield number, examples
        refuse_if_empty(len(items) - log.rows_left_out, len(items), "data", log)


# -- weights, and a single document ---------------------------------------------------------------


def _times(side: _Split, recipe: Recipe, log: IssueLog) -> NDArray[np.int64] | None:
    """How often an epoch trains on each item of the shelf, int64 [items]; None for once each.

    A weight of 2.5 is twice each row, and half of the rows, chosen by content and seed, once more.
    """
    if all(weight == 1 for weight in recipe.weights):
        return None
    items = side.shelf.items
    times = np.zeros(len(items), np.int64)
    for number, weight in enumerate(recipe.weights):
        rows = side.chosen[items.sources[side.chosen] == number]
        times[rows] = int(weight)
        more = round((weight - int(weight)) * len(rows))
        order = shuffled(items.marks[rows], recipe.seed)
        times[rows[order[: max(more, weight < 1)]]] += 1
        rest = rows[times[rows] == 0]
        if len(rest):
            first = [str(items.origin(int(i))) for i in rest[:SHOWN_ROWS]]
            log.add_many(f"weight {weight:g}", len(rest), first, "not drawn")
    return times


def _split_single_document(
    items: ConversationDataset, held_out: float | int, log: IssueLog
) -> tuple[ConversationDataset, ConversationDataset | None]:
    """A single document in two, at the paragraph border nearest to the held-out share of its end.

    A text without borders comes back whole, and so does a conversation: they cannot be split.
    """
    document = items[0]
    if not isinstance(document, Document):
        return items, None
    text = document.text
    wanted = (1 - (held_out if held_out < 1 else 0.05)) * len(text)
    borders = [found.end() for found in re.finditer(r"\n\s*\n", text.strip("\n"))]
    borders = [at for at in borders if 0 < at < len(text.rstrip())]
    if not borders:
        return items, None
    at = min(borders, key=lambda border: abs(border - wanted))
    log.add("a single document", document.origin, "its end is held out")
    parts = []
    for name, part in (("head", text[:at]), ("tail", text[at:])):
        key = key_of(name, items.key, at) if items.key else None
        pairs = [(replace(document, text=part), 0)]
        parts.append(
            ConversationDataset(folder_for(key, partial(write_items, items=pairs, meta={})), key)
        )
    return parts[0], parts[1]
