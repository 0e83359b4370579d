"""A tokenizer and a base enter; in silence, or refused where one knows tokens that the other lacks.

Tokens added to a tokenizer have no row in the base's embedding: looked up, they end in an index
error, on a card in one that names nothing.
"""

from __future__ import annotations

from typing import Any

from lorakit.errors import ModelError


def check_vocabulary(tokenizer: Any, base: Any) -> None:
    """Every token of `tokenizer` has a row in the embedding of `base`.

    Raises:
        ModelError: names the first that has none.
    """
    rows = base.get_input_embeddings().weight.shape[0]
    beyond = sorted((i, t) for t, i in tokenizer.get_vocab().items() if i >= rows)
    if beyond:
        number, token = beyond[0]
        raise ModelError(
            f"the tokenizer has {len(beyond)} token{'s' * (len(beyond) > 1)} that the base has no "
            f"embedding for (first: {token!r}, number {number}; the base has {rows:,} rows)",
            hint="use the tokenizer that came with the base, or a base whose embedding was resized "
            "and trained for these tokens",
        )
