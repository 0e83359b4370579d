"""A tokenized example enters; text with its trained tokens marked leaves, readable without color."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from lorakit.records import IGNORE, Example

OPEN, CLOSE = "⟦", "⟧"


def render_example(tokenizer: Any, example: Example) -> Text:
    """The example as the model sees it, special tokens included; trained spans stand in ⟦ ⟧."""
    text = Text()
    start = 0
    while start < len(example.input_ids):
        trained = example.labels[start] != IGNORE
        end = start
        while end < len(example.input_ids) and (example.labels[end] != IGNORE) == trained:
            end += 1
        piece = tokenizer.decode(example.input_ids[start:end], skip_special_tokens=False)
        if trained:
            text.append(f"{OPEN}{piece}{CLOSE}", style="bold green")
        else:
            text.append(piece, style="dim")
        start = end
    return text
