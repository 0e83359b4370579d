"""Tokens of the recipe that stay one token in turns and whose embedding rows train.

Special tokens in a turn are otherwise encoded as plain text. A token of `trainable_tokens` becomes
an added token that is not special, in training and in the tokenizer that is saved with the adapter,
so chat, exports and other engines read and print it in the same way. Tokens that the chat template
or the tokenizer itself uses keep their part: only their rows train.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from lorakit.errors import RecipeError
from lorakit.recipe.schema import Recipe
from lorakit.types import Example


def keep_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Make each of `tokens` one token of `tokenizer` in any text; new ones are added.

    Raises:
        RecipeError: the tokenizer is not one of the `tokenizers` library.
    """
    if not tokens:
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise RecipeError(
            f"trainable_tokens: {type(tokenizer).__name__} is a Python tokenizer, expected one "
            "with a tokenizer.json",
            hint="convert the tokenizer with transformers, or leave trainable_tokens out",
        )
    from tokenizers import AddedToken, Tokenizer

    free = [token for token in tokens if not _has_a_part(tokenizer, token)]
    values = json.loads(backend.to_str())
    special = [e for e in values["added_tokens"] if e["content"] in free and e["special"]]
    if special:
        for entry in special:
            entry["special"] = False
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(values))
        listed = tokenizer.extra_special_tokens
        tokenizer.extra_special_tokens = [token for token in listed if str(token) not in free]
    known = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    new = [token for token in free if token not in known]
    if new:
        tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in new])


def token_rows(tokenizer: Any, recipe: Recipe) -> list[int]:
    """Ids of the recipe's `trainable_tokens`, sorted."""
    return sorted({int(tokenizer.convert_tokens_to_ids(t)) for t in recipe.trainable_tokens})


def check_token_rows(tokenizer: Any, recipe: Recipe, config: Any) -> None:
    """Refuse tokens without a row in the base's embedding, before weights are loaded.

    Raises:
        RecipeError: names the tokens and the rows.
    """
    rows = config.get_text_config().vocab_size
    names = recipe.trainable_tokens
    missing = [t for t in names if tokenizer.convert_tokens_to_ids(t) >= rows]
    if missing:
        raise RecipeError(
            f"trainable_tokens: {', '.join(missing)}: not in the tokenizer, and the base's "
            f"embedding of {rows:,} rows has none left for {'it' if len(missing) == 1 else 'them'}",
            hint="enlarge the base once: tokenizer.add_tokens([...]); "
            "model.resize_token_embeddings(len(tokenizer)); save both to a folder",
        )
    embeddings = {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out"}
    targets = recipe.target_modules if isinstance(recipe.target_modules, list) else []
    whole = embeddings & {*(recipe.modules_to_save or []), *targets}
    if names and whole:
        raise RecipeError(
            f"trainable_tokens: {', '.join(sorted(whole))} is trained already by modules_to_save "
            "or target_modules",
            hint="leave out one of them",
        )


def check_tokens_occur(tokenizer: Any, recipe: Recipe, examples: Iterable[Example]) -> None:
    """Refuse a token that no training example contains: its row would never change.

    Raises:
        RecipeError: names the tokens.
    """
    unseen = set(token_rows(tokenizer, recipe))
    for example in examples:
        if not unseen:
            return
        unseen.difference_update(example.input_ids)
    if unseen:
        names = [t for t in recipe.trainable_tokens if tokenizer.convert_tokens_to_ids(t) in unseen]
        raise RecipeError(
            f"trainable_tokens: {', '.join(names)}: in no training example",
            hint="correct the spelling, or leave them out",
        )


def token_indices(base: Any, rows: Sequence[int]) -> dict[str, list[int]] | None:
    """Build peft's `trainable_token_indices`: the rows of the embedding, and of an own head."""
    if not rows:
        return None
    names = {id(module): name for name, module in base.named_modules()}
    table, head = base.get_input_embeddings(), base.get_output_embeddings()
    indices = {names[id(table)].rpartition(".")[2]: list(rows)}
    if head is not None and head.weight is not table.weight:
        indices[names[id(head)].rpartition(".")[2]] = list(rows)
    return indices


def _has_a_part(tokenizer: Any, token: str) -> bool:
    """True for a token that the tokenizer or its chat template uses itself."""
    named = {str(value) for value in tokenizer.special_tokens_map.values()}
    return token in named or token in str(tokenizer.chat_template or "")
