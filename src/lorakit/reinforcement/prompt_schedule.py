"""Prompts of each rollout: a function of the seed and the number of the rollout."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.data.dataset import ConversationDataset, Examples
from lorakit.data.formats.prompts import FIELDS
from lorakit.types import Conversation, Origin


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt: its turns, ids, the columns of its row for reward functions, and its origin."""

    turns: list[dict[str, Any]]
    ids: list[int]
    fields: dict[str, Any]
    origin: Origin


def prompt_of(item: Conversation, ids: list[int]) -> Prompt:
    """The prompt of a conversation whose last turn has the columns of its row."""
    turns = [message.as_dict() for message in item.messages[:-1]]
    return Prompt(turns, ids, item.messages[-1].extra.get(FIELDS, {}), item.origin)


class PromptRows(Sequence[Prompt]):
    """Prepared prompts with the columns of their rows, read from disk on access."""

    def __init__(self, examples: Examples, items: ConversationDataset) -> None:
        self.examples, self.items = examples, items
        self.places = examples.column("item_index")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        place = np.array([self.places[number]], np.int64)
        item = self.items.select(place)[0]
        assert isinstance(item, Conversation)
        return prompt_of(item, self.examples[number].input_ids)


class PromptSchedule:
    """Rows of each rollout: all prompts in random order, then all in another order.

    Args:
        count: number of prompts.
        per_rollout: prompts of a rollout; the last ones of an epoch share a rollout with the next.
    """

    def __init__(self, count: int, per_rollout: int, seed: int) -> None:
        self.count, self.per_rollout, self.seed = count, per_rollout, seed

    def rows(self, rollout: int) -> list[int]:
        """Rows of rollout number `rollout`, from 0."""
        first = rollout * self.per_rollout
        places = range(first, first + self.per_rollout)
        return [self._order(place // self.count)[place % self.count] for place in places]

    @functools.lru_cache(maxsize=4)  # noqa: B019 (a schedule lives as long as its run)
    def _order(self, epoch: int) -> list[int]:
        order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return [int(row) for row in order]
