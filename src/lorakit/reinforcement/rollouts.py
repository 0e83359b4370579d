"""Sample completions of prompts from the model in training, with the log-probability of each token.

Completions of step n are a function of (seed, n, adapter): every completion draws from its own row
of uniform numbers, so that neither dropout, nor the size of the batch, nor another generator
changes its draws. Ids are kept as sampled; nothing is tokenized again.

    p = softmax(logits / temperature)       the policy, of which log p and entropy are recorded
    token = smallest i with sum_{j <= i} q_j > u        q = p, or p of the tokens in top_k and top_p

Shapes: N completions, T tokens so far, V vocabulary, L longest completion.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from lorakit.data.tokenize.encode import stop_token_ids
from lorakit.errors import WorkError
from lorakit.inference.generate import GenerationSettings, generation_arguments, left_padded
from lorakit.model.eval_mode import device_of, evaluating
from lorakit.train.oom import run_catching_oom


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """Sampling of completions; `top_k` 0 and `top_p` 1 draw from all tokens."""

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A sampled completion: ids with the end-of-turn token, log p of each, mean entropy in nats.

    `truncated`: it was cut before an end-of-turn token.
    """

    ids: list[int]
    log_probs: list[float]
    entropy: float
    truncated: bool


def uniform_draws(seed: int, rollout: int, count: int, length: int) -> Tensor:
    """Numbers in [0, 1) for each token of each completion of a rollout, float32 [N, L]."""
    state = np.random.SeedSequence([seed, rollout]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]) >> 1)
    return torch.rand(count, length, generator=generator)


class _Draw(LogitsProcessor):
    """Choose the next token of each row by its own draws, and record log p and entropy.

    `generate` runs greedily: the chosen token gets the only finite score.
    """

    def __init__(self, draws: Tensor, settings: SamplingSettings) -> None:
        self.draws, self.settings = draws, settings
        self.log_probs: list[Tensor] = []
        self.entropies: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        log_p = torch.log_softmax(scores.float() / self.settings.temperature, -1)
        p = log_p.exp()
        draw = self.draws[:, len(self.log_probs), None].to(p.device, torch.float64)
        token = inverse_cdf(self._allowed(p), draw)
        self.log_probs.append(log_p.gather(1, token).squeeze(1))
        self.entropies.append(-(p * log_p.masked_fill(p == 0, 0.0)).sum(-1))
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

    def _allowed(self, p: Tensor) -> Tensor:
        """Probabilities with those outside `top_k` and `top_p` set to 0."""
        top_k, top_p = self.settings.top_k, self.settings.top_p
        if top_k == 0 and top_p == 1:
            return p
        ordered, index = p.sort(dim=-1, descending=True, stable=True)
        if top_k:
            ordered = ordered.clone()
            ordered[:, top_k:] = 0
            ordered = ordered / ordered.sum(-1, keepdim=True)
        before = ordered.cumsum(-1) - ordered
        kept = ordered.masked_fill(before >= top_p, 0.0) if top_p < 1 else ordered
        return torch.zeros_like(p).scatter_(1, index, kept)


def inverse_cdf(weights: Tensor, draw: Tensor) -> Tensor:
    """Index of each row [N, 1] at which the sum of its weights [N, V] first exceeds its draw.

    Args:
        draw: numbers in [0, 1), [N, 1]; multiplied by the sum of the weights.
    """
    cdf = weights.double().cumsum(-1)
    token = torch.searchsorted(cdf, draw * cdf[:, -1:], right=True)
    return token.clamp(max=weights.shape[-1] - 1)


class _Batch(NamedTuple):
    prompts: Sequence[list[int]]
    draws: Tensor


class Sampler:
    """Samples completions in batches; memory that runs out halves the batch for the whole run.

    Args:
        note: prints a line.
        rows: most completions of a batch.
        autocast: context manager of the trainer's forward, so that both compute alike.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: SamplingSettings,
        note: Callable[[str], None],
        rows: int,
        autocast: Callable[[], Any],
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.note, self.rows, self.autocast = note, rows, autocast
        self.stops = sorted(stop_token_ids(tokenizer, model.generation_config))

    def sample(self, prompts: Sequence[list[int]], draws: Tensor) -> list[Completion]:
        """Sample one completion for each prompt, in order.

        Raises:
            WorkError: one completion alone does not fit into memory.
        """
        completions: list[Completion] = []
        with evaluating(self.model):
            while len(completions) < len(prompts):
                chosen = slice(len(completions), len(completions) + self.rows)
                batch = _Batch(prompts[chosen], draws[chosen])
                sampled, fault = run_catching_oom(functools.partial(self._batch, batch))
                if sampled is not None:
                    completions += sampled
                else:
                    self._halve(batch, str(fault))
        return completions

    def _halve(self, batch: _Batch, fault: str) -> None:
        longest = max(map(len, batch.prompts))
        if len(batch.prompts) == 1:
            raise WorkError(
                f"out of memory sampling one completion of {self.settings.max_completion_length} "
                f"tokens after a prompt of {longest}: {fault}",
                hint="lower max_completion_length or max_prompt_length, or set method: qlora",
            )
        self.rows = len(batch.prompts) // 2
        self.note(
            f"out of memory in a rollout ({fault}); retrying; all further rollouts sample "
            f"{self.rows} completions at once"
        )

    def _batch(self, batch: _Batch) -> list[Completion]:
        pad = self.tokenizer.pad_token_id
        inputs = left_padded(
            batch.prompts, self.stops[0] if pad is None else pad, device_of(self.model)
        )
        draw = _Draw(batch.draws, self.settings)
        greedy = GenerationSettings(self.settings.max_completion_length, temperature=0.0)
        arguments = generation_arguments(self.model, self.tokenizer, greedy)
        with self.autocast():
            out = self.model.generate(
                **inputs, **arguments, logits_processor=LogitsProcessorList([draw])
            )
        ids = out[:, inputs["input_ids"].shape[1] :].tolist()
        log_probs = torch.stack(draw.log_probs, 1).tolist()
        entropies = torch.stack(draw.entropies, 1).tolist()
        return [self._completion(*row) for row in zip(ids, log_probs, entropies, strict=True)]

    def _completion(
        self, ids: list[int], log_probs: list[float], entropies: list[float]
    ) -> Completion:
        stop = next((i for i, token in enumerate(ids) if token in self.stops), None)
        length = len(ids) if stop is None else stop + 1
        return Completion(
            ids[:length],
            log_probs[:length],
            sum(entropies[:length]) / length,
            truncated=stop is None,
        )
