"""A model and a conversation enter; its next answer leaves, piece by piece or as a whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.data.template import prompt_ids, stop_token_ids
from lorakit.records import Message


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int | None = None


@contextlib.contextmanager
def base_answers(model: Any) -> Iterator[None]:
    with model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext():
        yield


@torch.no_grad()
def replies(model, tokenizer, conversations: Sequence[Sequence[Message]], settings, batch_size: int = 8) -> list[str]:
    was = model.training
    model.eval()
    stops = stop_token_ids(tokenizer, model.generation_config)
    out = []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    for c in conversations:
        ids = torch.tensor([prompt_ids(tokenizer, c)], device=model.device)
        got = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=settings.max_new_tokens, do_sample=False, eos_token_id=stops, pad_token_id=pad, use_cache=True)
        new = got[0, ids.shape[1]:].tolist()
        new = [t for t in new if t not in stops]
        out.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    model.train(was)
    return out
