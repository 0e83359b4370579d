"""Refuse examples that would spoil the training.

The checks read ids and labels alone, so that they also catch faults of the code that made them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from lorakit.data.chat_template.render import template_capabilities
from lorakit.data.issues import FatalRowError
from lorakit.data.tokenize.batch_tokenizer import indices_of
from lorakit.types import IGNORE, Example


def verify_example(tokenizer: Any, example: Example, train_on: str = "responses") -> None:
    """Refuse an example of a conversation that would spoil the training.

    Raises:
        FatalRowError: no trained token, two BOS in a row, or a trained answer whose end of turn is
            not trained.
    """
    origin, ids, labels = example.origin, example.input_ids, example.labels
    if not example.trained_tokens:
        raise FatalRowError(
            "nothing trained", origin, "no token of this row would be trained: all are masked"
        )
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise FatalRowError(
            "two BOS tokens",
            origin,
            f"it begins with two BOS tokens ({tokenizer.bos_token})",
            "the chat template and the tokenizer both add one: remove it from the template",
        )
    if train_on == "all":
        return
    # The first end-of-turn token after a trained token must be trained too.
    stops = template_capabilities(tokenizer).stops
    ends = sorted(i for stop in stops for i in indices_of(ids, stop))
    for begin, end in pairwise([-1, *ends, len(ids)]):
        turn = labels[begin + 1 : end]
        closed = end < len(ids) and labels[end] != IGNORE
        if not closed and turn.count(IGNORE) < len(turn):
            last = next(label for label in reversed(turn) if label != IGNORE)
            raise FatalRowError(
                "answer without end of turn",
                origin,
                f"a trained part ends with {tokenizer.decode([last])!r}, not with an end-of-turn "
                "token: a model trained on it would not stop",
                "the chat template must close each answer with a special token",
            )
