"""An exception enters; whether memory ran out and what is missing leave, and a smaller layout.

Memory ends in many words: torch's own error, a RuntimeError of the CPU's allocator or of a CUDA
library, Python's MemoryError. Here they are one thing.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from lorakit.data.batch import Layout, StepBatch, step_batches
from lorakit.errors import WorkError

_WORDS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "_status_alloc_failed",  # cuBLAS and cuDNN
)
_ASKED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)", re.IGNORECASE)
_ALLOWED = re.compile(r"([\d.]+) ?(bytes|KiB|MiB|GiB) allowed")
_FREE = re.compile(r"of which ([\d.]+) ?(bytes|KiB|MiB|GiB) is free")
Result = TypeVar("Result")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def memory_trouble(error: BaseException) -> str | None:
    """What was asked for and what was free, where `error` says that memory ran out; else None."""
    text = str(error)
    told = isinstance(error, RuntimeError) and any(word in text.lower() for word in _WORDS)
    if not (told or isinstance(error, MemoryError | torch.OutOfMemoryError)):
        return None
    asked, free = _bytes(_ASKED, text), _bytes(_FREE, text)
    allowed = _bytes(_ALLOWED, text)
    if asked is None:
        return "it does not say how much is missing"
    if allowed is not None:
        return f"{_told(asked)} more were asked for, memory_limit allows {_told(allowed)}"
    if free is None:
        return f"{_told(asked)} more were asked for"
    return f"{_told(asked)} more were asked for, {_told(free)} were free"


def free_caches() -> None:
    """Give back what only the broken attempt still holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attempt(work: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """(result, None); or (None, what is missing) where memory ran out, with the caches free."""
    try:
        return work(), None
    except Exception as error:
        trouble = memory_trouble(error)
        if trouble is None:
            raise
    # Not before here: the error's frames hold the tensors of the broken attempt.
    free_caches()
    return None, trouble


@contextmanager
def memory_told(doing: str, hint: str) -> Iterator[None]:
    """Memory that runs out inside becomes one message.

    Raises:
        WorkError: it ran out while `doing`.
    """
    try:
        yield
    except Exception as error:
        trouble = memory_trouble(error)
        if trouble is None:
            raise
        raise WorkError(f"out of memory {doing}: {trouble}", hint) from error


@dataclass(frozen=True, slots=True)
class Generators:
    """Where the random generators stood, to draw the same once more."""

    host: Tensor
    card: Tensor | None

    @classmethod
    def now(cls) -> Generators:
        """The present states; reading them does not wait for a card."""
        card = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        return cls(torch.get_rng_state(), card)

    def restore(self) -> None:
        """Go back to them."""
        torch.set_rng_state(self.host)
        if self.card is not None:
            torch.cuda.set_rng_state(self.card)


def smaller(step: StepBatch) -> StepBatch | None:
    """The step's examples in micro-batches of half the size; None where each holds one example.

    Rows are halved, and a packed micro-batch's tokens with them, until the step is cut more finely
    than before: a half of what the step did not fill anyway would change nothing.
    """
    layout = step.layout
    while len(step.micro) < len(step.examples):
        layout = _half(layout)
        made = step_batches(step.examples, layout)
        if len(made.micro) > len(step.micro):
            return made
    return None


def _half(layout: Layout) -> Layout:
    rows = max(1, layout.rows // 2)
    # As a recipe with that many rows has it; below one row, what is shorter than a row.
    capacity = layout.capacity * rows // layout.rows if layout.rows > 1 else layout.capacity // 2
    return replace(layout, rows=rows, capacity=capacity)


def _bytes(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.search(text)
    if found is None:
        return None
    unit = next(u for u in _UNITS if u.lower() == found[2].lower())
    return int(float(found[1]) * _UNITS[unit])


def _told(size: int) -> str:
    unit = next((u for u in ("GiB", "MiB", "KiB") if size >= _UNITS[u]), "bytes")
    return f"{size / _UNITS[unit]:,.1f} {unit}" if unit != "bytes" else f"{size} bytes"
