"""Prepare training and held-out examples, and a data report, from a recipe and a tokenizer."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.data.cache import cached, key_of
from lorakit.data.conversations import read_conversations
from lorakit.data.dataset import (
    ConversationDataset,
    Examples,
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
    summarize_faults,
)
from lorakit.data.split import shuffled, split
from lorakit.data.tokenize.batch_tokenizer import tokenizer_key
from lorakit.data.tokenize.encode import EncodeConfig, encode_many, resolve_template
from lorakit.errors import DataError
from lorakit.recipe.schema import Recipe
from lorakit.types import DataReport, Document, Example


@dataclass(frozen=True, slots=True)
class Prepared:
    """Training and held-out examples of a run, and the items they were made from.

    All four are read from disk on access: each of a million rows takes about a hundred bytes of
    memory. Their order is that of the sources, the same in each run on the same data.
    """

    train: Examples
    val: Examples
    train_conversations: ConversationDataset
    val_conversations: ConversationDataset
    report: DataReport


@dataclass(frozen=True, slots=True)
class _Split:
    """Chosen items, and the examples of all items."""

    items: ConversationDataset
    encoded: Examples

    @property
    def hashes_and_signatures(self) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """Content hash and MinHash signature of each item."""
        return self.items.content_hashes, self.items.signatures

    def select(self, mask: NDArray[np.bool_]) -> _Split:
        """The items where `mask` is true."""
        return _Split(self.items.select(self.items.chosen[mask]), self.encoded)

    def examples(self, times: NDArray[np.int64] | int = 1) -> Examples:
        """Examples of these items, repeated `times`."""
        repeats = np.zeros(len(self.items.table), np.int64)
        repeats[self.items.chosen] = times
        left = repeats[self.encoded.column("item_index")]
        # All examples once, then the repeated ones: copies are not next to each other.
        rounds = [np.flatnonzero(left > done) for done in range(int(left.max(initial=1)))]
        return self.encoded.select(np.concatenate(rounds))


def prepare_data(
    recipe: Recipe, tokenizer: Any, folders: Sequence[Path] = (), inspecting: bool = False
) -> Prepared:
    """Run the stages from source strings to examples; sets the chat template on `tokenizer`.

    Args:
        folders: folders for relative paths, tried after the current directory.
        inspecting: count rows that would spoil the training instead of raising.

    Raises:
        DataError: a source is missing or damaged, no usable row is left, or a row would spoil the
            training; every message names the file and the row.
        ModelError: the chat template of the tokenizer does not work.
    """
    # Millions of small objects are created and freed here. With the usual thresholds the garbage
    # collector goes through the objects of torch and transformers too, 0.1 s every 10,000 rows.
    thresholds = gc.get_threshold()
    gc.set_threshold(50_000, 20, 100)
    try:
        return _prepare(recipe, tokenizer, folders, inspecting)
    finally:
        gc.set_threshold(*thresholds)


def _prepare(recipe: Recipe, tokenizer: Any, folders: Sequence[Path], inspecting: bool) -> Prepared:
    items, log = read_conversations(recipe.sources, recipe, folders)
    lines, held_items = list(items.meta["lines"]), None
    if recipe.val_data:
        held_items, held_log = read_conversations([recipe.val_data], recipe, folders)
        lines += held_items.meta["lines"]
        log.merge(held_log)
    elif recipe.held_out and len(items) == 1:
        items, held_items = _split_single_document(items, recipe.held_out, log)
    thinking = items.thinking or (held_items is not None and held_items.thinking)
    info = resolve_template(
        tokenizer, recipe.model, thinking, recipe.template_kwargs, recipe.template_date
    )
    encode = _Encoder(recipe, tokenizer, inspecting, log)
    side = encode(items)
    report_duplicates(*side.hashes_and_signatures, side.items.origin, log)
    if held_items is not None:
        train, held = side, encode(held_items)
        if not recipe.val_data:
            _report_tail(train, held, log)
        twins = train.hashes_and_signatures, held.hashes_and_signatures
        report_overlap(*twins, held.items.origin, log)
    else:
        out = _split(side, recipe, log, inspecting)
        train, held = side.select(~out), side.select(out)
        _report_large_share(train, held, log)
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
        longest_example=_longest(recipe, examples, val),
        cutoff_len=recipe.cutoff_len,
        template=info.source,
        faults=log.faults(),
    )
    return Prepared(examples, val, train.items, held.items, report)


def _longest(recipe: Recipe, *parts: Examples) -> int:
    """Tokens of the longest example, or of the longest prompt with its longest completion."""
    longest = max(part.longest_sequence for part in parts)
    return longest + recipe.max_completion_length if recipe.objective == "grpo" else longest


def _split(side: _Split, recipe: Recipe, log: IssueLog, inspecting: bool) -> NDArray[np.bool_]:
    """True for the items to hold out, bool [chosen items]."""
    try:
        return split(side.items.column("prompt_hash"), recipe.held_out, recipe.seed)
    except DataError as error:
        if inspecting and len(side.items):
            # Inspecting a single row is not a reason to stop.
            log.add("no row held out", side.items.origin(0), f"train would stop: {error.message}")
            return np.zeros(len(side.items), bool)
        if not log.rows_left_out:
            raise
        # Few rows are left because others were left out: the message names their faults.
        lost = f"{log.rows_left_out:,} rows were left out: {summarize_faults(log)}"
        raise DataError(f"{error.message}; {lost}", error.hint) from None


def _report_tail(train: _Split, held: _Split, log: IssueLog) -> None:
    """Report the share of a single document that is held out, in tokens."""
    sizes = [int(side.examples().lengths.sum()) for side in (train, held)]
    kind = f"{sizes[1]:,} of {sum(sizes):,} tokens of a single document"
    log.add(kind, held.items.origin(0), "its end is held out")


def _report_large_share(train: _Split, held: _Split, log: IssueLog) -> None:
    """Report held-out rows with far more tokens than their share of rows (one of two books)."""
    sizes = [int(side.examples().lengths.sum()) for side in (train, held)]
    rows = len(held.items) / (len(train.items) + len(held.items))
    share = sizes[1] / sum(sizes)
    if share > max(0.2, 2 * rows) or (share > 0.2 and len(train.items) < 5):
        first = [str(held.items.origin(i)) for i in range(min(SHOWN_ROWS, len(held.items)))]
        kind = f"{share:.0%} of the tokens are held out"
        log.add_many(kind, len(held.items), first, HELD_OUT)


_DOCUMENTS = {
    "completion": "trained as plain text, every token (documents: instruction makes requests and "
    "answers of it, better for a chat model)",
    "instruction": "each piece trained as the answer to a request (documents: completion trains "
    "every token as plain text)",
}


def _with_documents(line: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Add to a line of the report, for plain texts, how they are trained."""
    texts = "text" in line["format"].split(", ")
    return {**line, "documents": _DOCUMENTS[recipe.documents]} if texts else line


# -- encoding -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Encoder:
    """Tokenizes a dataset of items, or reuses the cached result."""

    recipe: Recipe
    tokenizer: Any
    inspecting: bool
    log: IssueLog

    def __call__(self, items: ConversationDataset) -> _Split:
        rules = EncodeConfig.of(self.recipe)
        tokenizer = tokenizer_key(self.tokenizer)
        parts = "examples", items.key, tokenizer, asdict(rules)
        encode_log = IssueLog()

        def write(path: Path) -> dict[str, Any]:
            encoded = self._encoded(items, rules, encode_log)
            return write_examples(path, encoded, items.content_hashes, encode_log)

        examples = Examples(cached(key_of(*parts) if tokenizer else None, write))
        faults = IssueLog.from_dict(examples.meta["faults"])
        if faults.spoils and not self.inspecting:
            # `inspect` cached this dataset: encode again, which raises at the spoiling row.
            for _ in self._encoded(items, rules, encode_log):
                pass
        self.log.merge(faults)
        return _Split(items.select(np.unique(examples.column("item_index"))), examples)

    def _encoded(
        self, items: ConversationDataset, rules: EncodeConfig, log: IssueLog
    ) -> Iterator[tuple[int, list[Example]]]:
        encoded = encode_many(self.tokenizer, items.remapped(), rules, log)
        for index, (_, examples) in enumerate(encoded):
            if isinstance(examples, FatalRowError) and not self.inspecting:
                raise examples
            if isinstance(examples, RowError):
                log.skip_row(examples)
            else:
                yield index, examples
        refuse_if_empty(len(items) - log.rows_left_out, len(items), "data", log)


# -- weights, and a single document ---------------------------------------------------------------


def _times(side: _Split, recipe: Recipe, log: IssueLog) -> NDArray[np.int64] | int:
    """Count how often an epoch trains on each item, int64 [items] or 1 for all.

    A weight of 2.5 trains each row twice, and half of the rows, chosen by content and seed, once
    more.
    """
    if all(weight == 1 for weight in recipe.weights):
        return 1
    items = side.items
    times = np.zeros(len(items), np.int64)
    for source, weight in enumerate(recipe.weights):
        rows = np.flatnonzero(items.column("source_index") == source)
        times[rows] = int(weight)
        more = round((weight - int(weight)) * len(rows))
        order = shuffled(items.content_hashes[rows], recipe.seed)
        times[rows[order[: max(more, weight < 1)]]] += 1
        rest = rows[times[rows] == 0]
        if len(rest):
            first = [str(items.origin(int(i))) for i in rest[:SHOWN_ROWS]]
            log.add_many(f"weight {weight:g}", len(rest), first, "not drawn")
    return times


# Where a text may be cut, the best first: paragraphs, lines, sentences, words.
_BORDERS = (r"\n\s*\n", r"\n", r"[.!?]\s+|[。！？]", r"\s+")


def _cut(text: str, target: int, tolerance: float) -> int:
    """Position of the best kind of border within `tolerance` characters of `target`."""
    begin, end = max(1, int(target - tolerance)), min(len(text) - 1, int(target + tolerance) + 1)
    for border in _BORDERS:
        ends = [match.end() for match in re.compile(border).finditer(text, begin, end)]
        if ends:
            return min(ends, key=lambda at: abs(at - target))
    return target


def _split_single_document(
    items: ConversationDataset, held_out: float | int, log: IssueLog
) -> tuple[ConversationDataset, ConversationDataset | None]:
    """Split a single document near the held-out share of its end, at the best border there.

    Returns:
        The head and the tail; the dataset unchanged and None for a conversation, or for a text
        that is too short.
    """
    document = items[0]
    if not isinstance(document, Document):
        return items, None
    text = document.text
    share = held_out if held_out < 1 else 0.05
    at = _cut(text, round((1 - share) * len(text)), share / 2 * len(text))
    if not text[:at].strip() or not text[at:].strip():
        return items, None
    halves = []
    for name, half in (("head", text[:at]), ("tail", text[at:])):
        write = partial(write_items, items=[(replace(document, text=half), 0)], meta={})
        halves.append(ConversationDataset(cached(key_of(name, items.key, at), write)))
    return halves[0], halves[1]
