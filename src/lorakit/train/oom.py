"""An exception enters; whether memory ran out and what is missing leave, and a smaller layout.

Memory ends in many words: torch's own error, a RuntimeError of the CPU's allocator or of a CUDA
library, Python's MemoryError. Here they are one thing.

A step enters; its loss and gradients leave, in smaller micro-batches where memory runs out.

The examples of a step, their tokens and the sum stay: only how many go through the model at once
is halved, for this step and the rest of the run. The heaviest micro-batch may be tried beforehand.

Examples and a layout enter; the heaviest micro-batch that they can make leaves.

Run before the first step, it shows in a second what would else show in hour three, when the longest
examples happen to meet.
"""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorakit.data.batching import Layout, StepBatch, step_batches
from lorakit.data.dataset import lengths_of
from lorakit.distributed.process_group import DistributedContext
from lorakit.errors import WorkError
from lorakit.hardware import MemoryCap
from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import RunDir
from lorakit.types import EvalScore, Example, MemoryPlan

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


def describe_oom(error: BaseException) -> str | None:
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


def run_catching_oom(work: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """(result, None); or (None, what is missing) where memory ran out, with the caches free."""
    try:
        return work(), None
    except Exception as error:
        trouble = describe_oom(error)
        if trouble is None:
            raise
    # Not before here: the error's frames hold the tensors of the broken attempt.
    free_caches()
    return None, trouble


@contextmanager
def oom_as_error(doing: str, hint: str) -> Iterator[None]:
    """Memory that runs out inside becomes one message.

    Raises:
        WorkError: it ran out while `doing`.
    """
    try:
        yield
    except Exception as error:
        trouble = describe_oom(error)
        if trouble is None:
            raise
        raise WorkError(f"out of memory {doing}: {trouble}", hint) from error


@dataclass(frozen=True, slots=True)
class RngState:
    """Where the random generators stood, to draw the same once more."""

    host: Tensor
    card: Tensor | None

    @classmethod
    def now(cls) -> RngState:
        """The present states; reading them does not wait for a card."""
        card = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        return cls(torch.get_rng_state(), card)

    def restore(self) -> None:
        """Go back to them."""
        torch.set_rng_state(self.host)
        if self.card is not None:
            torch.cuda.set_rng_state(self.card)


def halve_micro_batches(step: StepBatch) -> StepBatch | None:
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


# CUDA loads kernels in the first steps; each is measured by NVML in about a millisecond.
MEASURED_STEPS = 8


class Stepping(Protocol):
    """The trainer, as seen from here."""

    layout: Layout
    recipe: Recipe
    plan: MemoryPlan
    run: RunDir
    state: Any
    model: Any
    optimizer: Any
    args: Any
    train_rows: Sequence[Example]
    val: Sequence[Example]
    eval_tokens: int
    ranks: DistributedContext

    @property
    def sharded(self) -> bool: ...

    def score(self, examples: Sequence[Example]) -> EvalScore: ...

    def last_checkpoint(self) -> str: ...

    def start_over(self) -> None: ...

    def _step_gradients(self, model: Any, step: StepBatch, scale: float) -> Tensor: ...

    def _save_checkpoint(self, model: Any, trial: Any) -> None: ...


class OomRetry:
    """Runs steps; owns the answer to memory that runs out in one."""

    def __init__(self, trainer: Stepping, note: Callable[[str], None], cap: MemoryCap) -> None:
        self.trainer, self.note, self.cap = trainer, note, cap
        self.to_measure = MEASURED_STEPS
        self.after: RngState | None = None  # the last step, as its checkpoint needs them

    def run(self, model: Any, step: StepBatch, scale: float) -> Tensor:
        """The gradients and the loss of one step.

        A second attempt has the same examples, no gradients of the first, and draws what it would
        have drawn at once.

        Raises:
            WorkError: memory runs out with one example at a time.
        """
        loss = self._fitted(model, step, scale)
        self.after = RngState.now()
        if self.to_measure:
            self.to_measure -= 1
            self.cap.tighten()
        return loss

    def _fitted(self, model: Any, step: StepBatch, scale: float) -> Tensor:
        trainer, start = self.trainer, RngState.now()
        while True:
            if step.layout != trainer.layout:  # laid out ahead, before the layout changed
                step = step_batches(step.examples, trainer.layout)
            work = functools.partial(trainer._step_gradients, model, step, scale)
            loss, trouble = run_catching_oom(work)
            if loss is not None:
                return loss
            model.zero_grad(set_to_none=True)
            start.restore()
            self._make_smaller(step, str(trouble))

    def probe(self, model: Any) -> None:
        """Run the heaviest micro-batches once: memory runs out now, or not for their sake.

        Weights, gradients and generators are afterwards as if this had not been.
        """
        trainer, start = self.trainer, RngState.now()
        room = room_for_optimizer(trainer.optimizer, trainer.plan, trainer.args.device)
        per_step = -(-trainer.recipe.examples_per_step // trainer.ranks.count)
        step = worst_step(trainer.train_rows, trainer.layout, per_step)
        self._fitted(model, step, 1 / max(1, step.supervised))
        model.zero_grad(set_to_none=True)
        del room
        self.cap.tighten()
        if trainer.val:
            trainer.score(longest_scored(trainer.val, trainer.eval_tokens))
            model.train()
        start.restore()
        words = "it fits"
        if trainer.args.device.type == "cuda":
            peak, here = torch.cuda.max_memory_reserved(), trainer.plan.available_bytes
            words = f"{peak / 2**30:.1f} of {here / 2**30:.1f} GiB"
        longest = max(step.examples, key=lambda e: len(e.input_ids))
        self.note(
            f"probe    {step.tokens:,} tokens at once, forward and backward, the longest from "
            f"{longest.origin}: {words}"
        )

    def _make_smaller(self, step: StepBatch, trouble: str) -> None:
        """Halve the micro-batches of this step and of all to come."""
        trainer = self.trainer
        number, made = trainer.state.global_step + 1, halve_micro_batches(step)
        if made is None:
            self._give_up(step, trouble)
        if trainer.sharded:  # the ranks gather layers in step: one alone cannot begin again
            raise WorkError(
                f"out of memory at step {number}: {trouble}; {trainer.last_checkpoint()}",
                hint="lower memory_limit: the plan then takes fewer tokens at once",
            )
        trainer.layout = made.layout
        trainer.start_over()
        self.note(
            f"step {number}: out of memory ({trouble}); it runs again, and all after it, in "
            f"smaller micro-batches: {len(made.micro)} instead of {len(step.micro)} for the same "
            f"{len(step.examples)} examples"
        )

    def _give_up(self, step: StepBatch, trouble: str) -> NoReturn:
        """Memory does not hold one example: keep what was trained, and say what would help."""
        trainer = self.trainer
        number = trainer.state.global_step
        alone = trainer.ranks.count == 1  # the others are in the middle of the step
        if alone and self.after is not None and not trainer.run.checkpoint(number).exists():
            self.after.restore()
            trainer._save_checkpoint(trainer.model, None)
        longest = max(step.examples, key=lambda e: len(e.input_ids))
        size = len(longest.input_ids)
        raise WorkError(
            f"out of memory at step {number + 1} with one example at a time: {trouble}\n"
            f"  the longest of the step is {longest.origin} with {size} tokens\n"
            f"  {trainer.last_checkpoint()}",
            hint=_cheaper(trainer.recipe, trainer.plan, size),
        )


def _cheaper(recipe: Recipe, plan: MemoryPlan, longest: int) -> str:
    """What would make one example of `longest` tokens fit, cheapest first."""
    ways = []
    if plan.keep and min(plan.keep) < 3:
        ways.append("go on with --resume --set gradient_checkpointing=true")
    if recipe.method == "lora":
        ways.append("start anew with method: qlora")
    ways.append(f"start anew with cutoff_len below {longest}, a lower lora_r or fewer layers")
    return "; or ".join(ways)


def worst_step(examples: Sequence[Example], layout: Layout, per_step: int) -> StepBatch:
    """A step of one micro-batch: the longest rows side by side, or a pack filled with the longest.

    Args:
        per_step: examples of an optimizer step; a micro-batch holds no more.
    """
    sizes = np.asarray(lengths_of(examples), np.int64)
    order = np.argsort(-sizes, kind="stable")
    if not layout.packed:
        chosen = order[: min(layout.rows, per_step)].tolist()
    else:
        chosen = _fill(sizes[order], order, layout.capacity, per_step)
    return step_batches([examples[i] for i in chosen], layout)


def longest_scored(examples: Sequence[Example], batch_tokens: int) -> list[Example]:
    """The heaviest batch that scoring these examples makes."""
    sizes = lengths_of(examples)
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    return [examples[i] for i in order[: max(1, batch_tokens // sizes[order[0]])]]


def room_for_optimizer(optimizer: Any, plan: MemoryPlan, device: torch.device) -> Tensor | None:
    """Memory that the first update will take, held until then; None where it is taken already."""
    if device.type != "cuda" or optimizer is None or optimizer.state:
        return None
    size = plan.parts.get("optimizer state", 0)
    return torch.empty(size, dtype=torch.uint8, device=device)


def _fill(
    sizes: NDArray[np.int64], order: NDArray[np.int64], capacity: int, count: int
) -> list[int]:
    """Longest first, each as long as room is left; the longest of all in any case."""
    chosen, room, place = [int(order[0])], capacity - int(sizes[0]), 1
    while len(chosen) < count and place < len(sizes):
        # Sizes fall: the first one that fits.
        place = max(place, int(np.searchsorted(-sizes, -room)))
        if place >= len(sizes):
            break
        chosen.append(int(order[place]))
        room -= int(sizes[place])
        place += 1
    return chosen
