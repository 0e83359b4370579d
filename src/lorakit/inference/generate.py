"""Generate answers to conversations, in batches or streamed.

Prompts are made by the same code as training examples (`data.tokenize.encode.prompt_ids`),
and answers end at the end-of-turn tokens of training.
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
    """Sampling settings; `temperature` 0 is greedy and gives the same answer every time."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None


@contextlib.contextmanager
def base_answers(model: Any) -> Iterator[None]:
    """Let `model` answer as its base: adapter disabled, original biases restored.

    peft's `disable_adapter` keeps biases trained with `bias: all` or `lora_only`.
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
    """Generate one answer to each conversation, in order, in left-padded batches.

    If memory runs out, that batch and the following ones use half the size.

    Args:
        tools: schemas of the functions that each conversation may call, if any.

    Raises:
        WorkError: one conversation alone does not fit into memory.
    """
    tools = tools or [()] * len(conversations)
    prompts = [
        fit_prompt(model, tokenizer, turns, settings, known)[0]
        for turns, known in zip(conversations, tools, strict=True)
    ]
    answers: list[str] = []
    batch_size = BATCH
    with evaluating(model):
        while len(answers) < len(prompts):
            batch = prompts[len(answers) : len(answers) + batch_size]
            generate_batch = functools.partial(answer_batch, model, tokenizer, batch, settings)
            texts, fault = run_catching_oom(generate_batch)
            if texts is not None:
                answers += [text.strip() for text in texts]
            elif len(batch) == 1:
                raise _too_long(len(batch[0]), settings, fault)
            else:
                batch_size = len(batch) // 2
    return answers


def answer_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
    until: Sequence[str] = (),
) -> list[str]:
    """Generate one answer to each prompt, in one batch.

    Args:
        until: texts at which an answer ends, in addition to the end-of-turn tokens; what follows
            the first of them in the returned text is not removed.
    """
    batch = left_padded(prompts, _pad_id(tokenizer), device_of(model))
    stops = {"stop_strings": list(until), "tokenizer": tokenizer} if until else {}
    out = model.generate(**batch, **stops, **generation_arguments(model, tokenizer, settings))
    texts: list[str] = tokenizer.batch_decode(
        out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return texts


def _too_long(prompt: int, settings: GenerationSettings, fault: str | None) -> WorkError:
    return WorkError(
        f"out of memory answering a prompt of {prompt} tokens with up to "
        f"{settings.max_new_tokens} more: {fault}",
        hint="ask something shorter, or lower max_new_tokens",
    )


def left_padded(prompts: Sequence[list[int]], pad: int, device: Any) -> dict[str, torch.Tensor]:
    """Pad prompts on the left for `generate`: ids and mask [B, T]."""
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
    """Yield pieces of one answer; ending the loop (also by Ctrl-C) stops the generation.

    Raises:
        DataError: the last question alone does not fit the model's context.
        WorkError: out of memory.
    """
    prompt, _ = fit_prompt(model, tokenizer, messages, settings)
    ids = torch.tensor([prompt], device=device_of(model))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    reader_gone = threading.Event()
    failure: list[BaseException] = []

    def generate() -> None:
        try:
            with evaluating(model):
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_ReaderGone(reader_gone)]),
                    **generation_arguments(model, tokenizer, settings),
                )
        except BaseException as error:  # raised again in the reading thread
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        reader_gone.set()
        thread.join()
    if failure:
        fault = describe_oom(failure[0])
        if fault is not None:
            raise _too_long(len(prompt), settings, fault) from failure[0]
        raise failure[0]


def fit_prompt(
    model: Any,
    tokenizer: Any,
    messages: Sequence[Message],
    settings: GenerationSettings,
    tools: Sequence[dict[str, Any]] = (),
) -> tuple[list[int], int]:
    """Build prompt ids that leave space for an answer, dropping old messages if needed.

    Returns:
        (ids, number of dropped messages).

    Raises:
        DataError: the last question alone does not fit.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    # With a short context, at least half of it is for the prompt.
    budget = max(limit - settings.max_new_tokens, limit // 2)
    head = [m for m in messages if m.role == "system"]
    turns = [m for m in messages if m.role != "system"]
    dropped = 0
    while True:
        ids = prompt_ids(tokenizer, [*head, *turns], tools)
        if len(ids) <= budget:
            return ids, dropped
        later = [i for i, m in enumerate(turns) if m.role == "user" and i]
        if not later:
            raise DataError(
                f"the question takes {len(ids)} tokens, the model's context is {limit}",
                hint="ask something shorter, or lower max_new_tokens",
            )
        turns, dropped = turns[later[0] :], dropped + later[0]


class _ReaderGone(StoppingCriteria):
    """Stop generation once the reader has stopped reading."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Any, *_: Any, **__: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def generation_arguments(
    model: Any, tokenizer: Any, settings: GenerationSettings
) -> dict[str, Any]:
    """Arguments of `model.generate` that replace every default of the model's own config."""
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    do_sample = settings.temperature > 0
    sampling_arguments = (
        {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        if do_sample
        # None, not absent: a model's sampling defaults would cause warnings in greedy decoding.
        else {"temperature": None, "top_p": None, "top_k": None}
    )
    return {
        "max_new_tokens": settings.max_new_tokens,
        "do_sample": do_sample,
        "repetition_penalty": settings.repetition_penalty,
        "eos_token_id": stop_token_ids(tokenizer, model.generation_config),
        "pad_token_id": _pad_id(tokenizer),
        "use_cache": True,
        **sampling_arguments,
    }


def _pad_id(tokenizer: Any) -> int:
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _set_data(model: Any, values: dict[str, Any]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        parameters[name].data = value
