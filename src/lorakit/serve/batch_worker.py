"""Requests enter a queue; a thread with the model answers them, several at a time, as they come.

Requests that wait for the same adapter with the same sampling share one batch (20 at once take 3
batches of 8, not 20 answers). Tokens leave as they are made. Shapes: B requests, T tokens.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from lorakit.data.tokenize.encode import stop_token_ids
from lorakit.inference.generate import base_answers, left_padded
from lorakit.model.eval_mode import device_of
from lorakit.model.multi_adapter import MultiAdapterModel

BATCH = 8


@dataclass
class Request:
    """One question: what was asked, and where the pieces of the answer go."""

    adapter: str | None  # None: the untuned base
    prompt: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop_texts: tuple[str, ...]
    send: Callable[[str | None], None]  # called from the worker's thread; None ends the answer
    ids: list[int] = field(default_factory=list)
    text: str = ""
    sent: int = 0
    finish: str | None = None  # "stop", "length", "cancelled" or "error"
    error: str | None = None

    def key(self) -> tuple[Any, ...]:
        """Requests of equal keys may share a batch; one with a seed of its own goes alone."""
        alone = id(self) if self.seed is not None else None
        return self.adapter, self.temperature, self.top_p, alone

    def cancel(self) -> None:
        """The reader has gone."""
        self.finish = self.finish or "cancelled"


class Worker:
    """The one thread that touches the model."""

    def __init__(self, several: MultiAdapterModel) -> None:
        self.several = several
        self.waiting: queue.Queue[Request | None] = queue.Queue()
        self.batches = 0
        self._put_back: list[Request] = []
        self._at_work: list[Request] = []
        self._stopping = False
        self._closed, self._closing = False, threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, request: Request) -> None:
        """Queue a request; its pieces come through `send`. A stopped worker cancels it at once."""
        with self._closing:
            if not self._closed:
                self.waiting.put(request)
                return
        request.cancel()
        request.send(None)

    def stop(self) -> None:
        """End answers that are under way and the thread."""
        self.cancel_all()
        self._thread.join(timeout=30)

    def cancel_all(self) -> None:
        """Cut short what is under way and what waits; returns at once."""
        self._stopping = True
        for request in [*self._at_work, *self._put_back]:
            request.cancel()
        self.waiting.put(None)

    def _run(self) -> None:
        while not self._stopping:
            batch = self._next_batch()
            if not batch:
                continue
            self._at_work = batch
            if self._stopping:  # since the batch was taken: `cancel_all` did not find it here
                for request in batch:
                    request.cancel()
            try:
                self._answer(batch)
            except Exception as error:  # one bad request must not end the server
                for request in batch:
                    request.error = request.error or f"{type(error).__name__}: {error}"
                    request.finish = "error"
            finally:
                self.batches += 1
                for request in batch:
                    request.send(None)
        with self._closing:
            self._closed = True
        while not self.waiting.empty():
            if (left := self.waiting.get()) is not None:
                self._put_back.append(left)
        for request in self._put_back:
            request.cancel()
            request.send(None)

    def _next_batch(self) -> list[Request]:
        """The oldest request and those waiting that may share its batch."""
        if not self._put_back:
            first = self.waiting.get()
            if first is None:
                return []
            self._put_back.append(first)
        while not self.waiting.empty():
            more = self.waiting.get()
            if more is not None:
                self._put_back.append(more)
        key = self._put_back[0].key()
        batch = [r for r in self._put_back if r.key() == key][:BATCH]
        self._put_back = [r for r in self._put_back if r not in batch]
        return batch

    def _answer(self, batch: list[Request]) -> None:
        first = batch[0]
        model = self.several.model
        tuned = self.several.switch(first.adapter or self.several.active)
        stops = stop_token_ids(tuned.tokenizer, model.generation_config)
        if first.adapter is None:
            with base_answers(model):
                self._generate(model, tuned.tokenizer, batch, stops)
        else:
            self._generate(model, tuned.tokenizer, batch, stops)

    def _generate(self, model: Any, tokenizer: Any, batch: list[Request], stops: list[int]) -> None:
        pad = stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        first = batch[0]
        if first.seed is not None:
            torch.manual_seed(first.seed)
        drawn = first.temperature > 0
        with torch.no_grad():
            model.generate(
                **left_padded([r.prompt for r in batch], pad, device_of(model)),
                max_new_tokens=max(r.max_tokens for r in batch),
                do_sample=drawn,
                temperature=first.temperature if drawn else None,
                top_p=first.top_p if drawn else None,
                top_k=0 if drawn else None,
                eos_token_id=stops,
                pad_token_id=pad,
                streamer=_Pieces(tokenizer, batch, frozenset(stops)),
                stopping_criteria=StoppingCriteriaList([_Done(batch)]),
            )


class _Done(StoppingCriteria):
    """Ends the rows whose answer is complete or whose reader has gone."""

    def __init__(self, batch: list[Request]) -> None:
        self.batch = batch

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        done = [r.finish is not None for r in self.batch]
        return torch.tensor(done, device=input_ids.device)


class _Pieces(BaseStreamer):
    """Takes one token of every row at a time; sends what became readable."""

    def __init__(self, tokenizer: Any, batch: list[Request], stops: frozenset[int]) -> None:
        self.tokenizer, self.batch, self.stops = tokenizer, batch, stops
        self.prompt = True

    def put(self, value: Any) -> None:
        if self.prompt:
            self.prompt = False
            return
        for request, token in zip(self.batch, value.tolist(), strict=True):
            if request.finish is None:
                self._take(request, token)

    def end(self) -> None:
        for request in self.batch:
            request.finish = request.finish or "length"
            self._send(request, len(request.text))

    def _take(self, request: Request, token: int) -> None:
        if token in self.stops:
            request.finish = "stop"
            self._send(request, len(request.text))
            return
        request.ids.append(token)
        request.text = self.tokenizer.decode(request.ids, skip_special_tokens=True)
        found = [i for s in request.stop_texts if (i := request.text.find(s)) >= 0]
        if found:
            request.text = request.text[: min(found)]
            request.finish = "stop"
        elif len(request.ids) >= request.max_tokens:
            request.finish = "length"
        ready = len(request.text)
        if request.finish is None:
            # Half a character, or what may turn out to be the start of a stop text, waits.
            ready -= len(request.text) - len(request.text.rstrip("\ufffd"))
            ready -= max((_overlap(request.text[:ready], s) for s in request.stop_texts), default=0)
        self._send(request, ready)

    def _send(self, request: Request, ready: int) -> None:
        if ready > request.sent:
            request.send(request.text[request.sent : ready])
            request.sent = ready


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
