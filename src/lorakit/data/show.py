"""An example or a report enters; text leaves, trained tokens standing between ⟦ and ⟧.

Color only repeats what the brackets say, so that a pipe or a color-blind reader loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from lorakit.records import IGNORE, DataReport, Example

TRAINED, MASKED, SPECIAL = "bold green underline", "dim", "magenta"


def render_example(tokenizer: Any, example: Example) -> Text:
    """The decoded tokens of `example`: special tokens spelled out, trained runs in ⟦ ⟧."""
    special = set(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    text = Text()
    for trained, run in _runs(example):
        text.append("⟦" if trained else "")
        for is_special, part in groupby(run, key=lambda i: i in special):
            style = TRAINED if trained else MASKED
            if is_special:
                style = f"{style} {SPECIAL}" if trained else SPECIAL
            text.append(_decode(tokenizer, list(part)), style=style)
        text.append("⟧" if trained else "")
    return text


def _runs(example: Example) -> Iterator[tuple[bool, list[int]]]:
    pairs = zip(example.input_ids, example.labels, strict=True)
    for trained, run in groupby(pairs, key=lambda pair: pair[1] != IGNORE):
        yield trained, [token for token, _ in run]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # Llama-2's pieces carry their space in front (▁word), and decoding eats the first of a run.
    first = tokenizer.convert_ids_to_tokens(ids[:1])[0]
    if str(first).startswith("▁") and not text.startswith(" "):
        return " " + text
    return text


def show_report(report: DataReport, console: Console) -> None:
    """One line a source, the counts, and every fault with its first rows."""
    for source in report.sources:
        console.print("data     " + ", ".join(f"{k} {v}" for k, v in source.items()), markup=False)
    share = report.trained_tokens_train / max(report.tokens_train, 1)
    console.print(
        f"examples {report.examples_train:,} to train on, {report.examples_val:,} held out; "
        f"{report.trained_tokens_train:,} of {report.tokens_train:,} tokens trained ({share:.0%}); "
        f"longest {report.longest_example} of {report.cutoff_len}"
    )
    console.print(f"template {report.template}", markup=False)
    for fault in report.faults:
        rows = ", ".join(fault.first_rows)
        console.print(
            f"note     {fault.count} x {fault.kind}: {fault.action} ({rows})", markup=False
        )
