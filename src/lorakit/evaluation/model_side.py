"""Ask one model, base or tuned: generated answers and log-likelihoods, batched and kept.

Requests run longest first, so that memory ends at the start or not at all; a batch that does not
fit is halved. Each batch is kept at once, and is not asked again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from lorakit.errors import WorkError
from lorakit.evaluation.answer_store import AnswerStore, request_keys
from lorakit.evaluation.eval_progress import EvalProgress
from lorakit.inference.generate import GenerationSettings, answer_batch
from lorakit.model.eval_mode import device_of, evaluating
from lorakit.train.loss import base_of
from lorakit.train.oom import run_catching_oom

# Rows of a batch of generation; each keeps a cache of its tokens.
ROWS, ROWS_ON_GPU = 8, 32
# Padded tokens of a batch of log-likelihoods, as in `train/eval_loss.py`.
BATCH_TOKENS = 4096
Pair = tuple[list[int], list[int]]
Answer = TypeVar("Answer")


class ModelSide:
    """A model with its tokenizer and the store of its answers to the present task."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        store: AnswerStore | None = None,
        progress: EvalProgress | None = None,
        name: str = "tuned",
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.store = store or AnswerStore()
        self.progress = progress or EvalProgress(None)
        gpu = device_of(model).type == "cuda"
        self.rows, self.tokens = (ROWS_ON_GPU if gpu else ROWS), BATCH_TOKENS

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        config = base_of(self.model).config.get_text_config()
        limit: int = getattr(config, "max_position_embeddings", None) or 2**20
        return limit

    def generate(
        self,
        prompts: Sequence[list[int]],
        settings: GenerationSettings,
        until: Sequence[str] = (),
    ) -> list[str]:
        """Generate an answer to each prompt; prompts that are too long lose their first tokens.

        Answers end before the first text of `until`.

        Raises:
            WorkError: one prompt alone does not fit into memory.
        """
        room = max(1, self.context - settings.max_new_tokens)
        cut = [prompt[-room:] for prompt in prompts]

        def answers(batch: Sequence[list[int]]) -> list[str]:
            texts = answer_batch(self.model, self.tokenizer, batch, settings, until)
            return [_before(text, until) for text in texts]

        keys = request_keys("generate", cut, [asdict(settings), list(until)])
        return self._ask(keys, cut, len, answers, lambda longest: self.rows, "rows")

    def loglikelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and if it is the greedy one.

        Raises:
            WorkError: one pair alone does not fit into memory.
        """
        limit = self.context + 1
        cut = [((c + a)[-limit:], min(len(a), limit - 1)) for c, a in pairs]
        keys = request_keys("loglikelihood", cut)
        size = lambda pair: len(pair[0])  # noqa: E731
        found = self._ask(
            keys, cut, size, self._scored, lambda n: max(1, self.tokens // n), "tokens"
        )
        return [(float(value), bool(greedy)) for value, greedy in found]

    def _ask(
        self,
        keys: Sequence[str],
        requests: Sequence[Any],
        size: Callable[[Any], int],
        compute: Callable[[Sequence[Any]], Sequence[Any]],
        rows: Callable[[int], int],
        limit: str,
    ) -> list[Any]:
        """Answer what is not in the store, longest first."""
        known = self.store.answers
        left = [i for i, key in enumerate(keys) if key not in known]
        # Equal lengths in the order of the ids: options that share a row are adjacent.
        left.sort(key=lambda i: (-size(requests[i]), requests[i]))
        done = len(keys) - len(left)
        with self.progress.stage(self.name, len(keys), done) as advance, evaluating(self.model):
            while left:
                longest = size(requests[left[0]])
                batch = left[: rows(longest)]
                asked = [requests[i] for i in batch]
                found, fault = run_catching_oom(functools.partial(compute, asked))
                if found is not None:
                    self.store.add([keys[i] for i in batch], found)
                    left = left[len(batch) :]
                    advance(len(batch))
                elif len(batch) == 1:
                    raise WorkError(
                        f"out of memory on a task's request of {longest} tokens alone: {fault}",
                        hint="evaluate on a larger GPU; the answers so far are kept",
                    )
                else:
                    half = len(batch) // 2
                    setattr(self, limit, half if limit == "rows" else half * longest)
        return [known[key] for key in keys]

    @torch.no_grad()
    def _scored(self, batch: Sequence[tuple[list[int], int]]) -> list[list[Any]]:
        """Sum of the log-probabilities of the last tokens of each sequence, and if each is best.

        Rows are padded on the right, which causal attention never reads, so no mask is needed.
        Sequences that differ in their last token alone, such as the letters of a choice, are one
        row.
        """
        width = max(len(ids) for ids, _ in batch) - 1
        unique = {tuple(ids[:-1]): None for ids, _ in batch}
        place = {ids: number for number, ids in enumerate(unique)}
        inputs = [[*ids, *[0] * (width - len(ids))] for ids in unique]
        first = min(len(ids) - 1 - count for ids, count in batch)
        options = {"logits_to_keep": width - first} if self._keeps_few else {}
        given = torch.tensor(inputs, device=device_of(self.model))
        logits = self.model(input_ids=given, use_cache=False, **options).logits
        first = first if logits.shape[1] < width else 0
        found = []
        for ids, count in batch:
            end = len(ids) - 1 - first
            row = logits[place[tuple(ids[:-1])], end - count : end]
            picked = torch.log_softmax(row.float(), dim=-1)
            wanted = torch.tensor(ids[len(ids) - count :], device=picked.device)
            total = picked.gather(1, wanted[:, None]).sum()
            found.append([float(total), bool((picked.argmax(-1) == wanted).all())])
        return found

    @functools.cached_property
    def _keeps_few(self) -> bool:
        """True if the model computes logits for the last positions alone on request."""
        return "logits_to_keep" in inspect.signature(type(base_of(self.model)).forward).parameters


def _before(text: str, until: Sequence[str]) -> str:
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text
