"""A model and a conversation enter; the next answer leaves, piece by piece or as a whole.

Prompts are made by the same code as training examples (`data.template.prompt_ids`), and answers end
at the tokens that training taught as the end of a turn.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from lorakit.data.tokenize.encode import prompt_ids, stop_token_ids
from lorakit.errors import DataError, WorkError
from lorakit.model.eval_mode import device_of, evaluating
from lorakit.train.oom import describe_oom, run_catching_oom
from lorakit.types import Message

BATCH = 8


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How answers are drawn. `temperature` 0 is greedy: the same answer every time."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None


@contextlib.contextmanager
def base_answers(model: Any) -> Iterator[None]:
    """While open, `model` answers as its base: adapter off, trained biases as they were before.

    peft's own switch leaves biases trained with `bias: all` or `lora_only` in place.
    """
    if not hasattr(model, "disable_adapter"):
        yield
        return
    before = getattr(model, "base_biases", {})
    tuned = {n: p.data for n, p in model.named_parameters() if n in before}
    with model.disable_adapter():
        try:
            _set_data(model, before)
            yield
        finally:
            _set_data(model, tuned)


def replies(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Sequence[Message]],
    settings: GenerationSettings,
    tools: Sequence[Sequence[dict[str, Any]]] = (),
) -> list[str]:
    """One answer to each conversation, in order; prompts are padded on the left in batches.

    Where memory runs out, that batch and the next are of half the size.

    Args:
        tools: the schemas of the functions that each conversation may call, if any.

    Raises:
        WorkError: memory does not hold one conversation.
    """
    tools = tools or [()] * len(conversations)
    prompts = [
        fit_prompt(model, tokenizer, turns, settings, known)[0]
        for turns, known in zip(conversations, tools, strict=True)
    ]
    found: list[str] = []
    size = BATCH
    with evaluating(model):
        while len(found) < len(prompts):
            part = prompts[len(found) : len(found) + size]
            answer = functools.partial(_answers, model, tokenizer, part, settings)
            texts, trouble = run_catching_oom(answer)
            if texts is not None:
                found += texts
            elif len(part) == 1:
                raise _too_long(len(part[0]), settings, trouble)
            else:
                size = len(part) // 2
    return found


def _answers(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], settings: GenerationSettings
) -> list[str]:
    """One answer to each prompt, all at once."""
    batch = left_padded(prompts, _pad_id(tokenizer), device_of(model))
    out = model.generate(**batch, **_arguments(model, tokenizer, settings))
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _too_long(prompt: int, settings: GenerationSettings, trouble: str | None) -> WorkError:
    return WorkError(
        f"out of memory answering a prompt of {prompt} tokens with up to "
        f"{settings.max_new_tokens} more: {trouble}",
        hint="ask something shorter, or lower max_new_tokens",
    )


def left_padded(prompts: Sequence[list[int]], pad: int, device: Any) -> dict[str, torch.Tensor]:
    """Prompts side by side as `generate` takes them: ids and mask [B, T], all ending together."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(p)) + p for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def stream_reply(
    model: Any, tokenizer: Any, messages: Sequence[Message], settings: GenerationSettings
) -> Iterator[str]:
    """Pieces of one answer as they come. Leaving the loop (Ctrl-C too) ends the generation.

    Raises:
        DataError: the last question alone does not fit the model's context.
        WorkError: nor does memory hold it.
    """
    prompt, _ = fit_prompt(model, tokenizer, messages, settings)
    ids = torch.tensor([prompt], device=device_of(model))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    left = threading.Event()
    failure: list[BaseException] = []

    def work() -> None:
        try:
            with evaluating(model):
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_Left(left)]),
                    **_arguments(model, tokenizer, settings),
                )
        except BaseException as error:  # handed to the reader, whatever it is
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        left.set()
        thread.join()
    if failure:
        trouble = describe_oom(failure[0])
        if trouble is not None:
            raise _too_long(len(prompt), settings, trouble) from failure[0]
        raise failure[0]


def fit_prompt(
    model: Any,
    tokenizer: Any,
    messages: Sequence[Message],
    settings: GenerationSettings,
    tools: Sequence[dict[str, Any]] = (),
) -> tuple[list[int], int]:
    """Prompt ids that leave room for an answer, and how many old messages were left out for it.

    Raises:
        DataError: the last question alone does not fit.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    # A model of little context keeps at least half of it for the prompt.
    room = max(limit - settings.max_new_tokens, limit // 2)
    head = [m for m in messages if m.role == "system"]
    turns = [m for m in messages if m.role != "system"]
    dropped = 0
    while True:
        ids = prompt_ids(tokenizer, [*head, *turns], tools)
        if len(ids) <= room:
            return ids, dropped
        later = [i for i, m in enumerate(turns) if m.role == "user" and i]
        if not later:
            raise DataError(
                f"the question takes {len(ids)} tokens, this model reads {limit}",
                hint="ask something shorter, or lower max_new_tokens",
            )
        turns, dropped = turns[later[0] :], dropped + later[0]


class _Left(StoppingCriteria):
    """Stops generation once the reader has gone."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Any, *_: Any, **__: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def _arguments(model: Any, tokenizer: Any, settings: GenerationSettings) -> dict[str, Any]:
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    sampling = settings.temperature > 0
    drawn = (
        {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        if sampling
        # None, not absent: a model's own defaults would warn beside greedy decoding.
        else {"temperature": None, "top_p": None, "top_k": None}
    )
    return {
        "max_new_tokens": settings.max_new_tokens,
        "do_sample": sampling,
        "repetition_penalty": settings.repetition_penalty,
        "eos_token_id": stop_token_ids(tokenizer, model.generation_config),
        "pad_token_id": _pad_id(tokenizer),
        "use_cache": True,
        **drawn,
    }


def _pad_id(tokenizer: Any) -> int:
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _set_data(model: Any, values: dict[str, Any]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        parameters[name].data = value
