"""Detect out-of-memory errors, retry a step in smaller micro-batches, and probe the heaviest one.

OOM is raised as several exception types: torch's own error, a RuntimeError of the CPU's allocator
or of a CUDA library, Python's MemoryError. `describe_oom` detects all of them.

A retried step keeps its examples, tokens and sum: only the number of examples that go through the
model at once is halved, for this step and the rest of the run.

The probe runs the heaviest micro-batch before the first step. It shows within a second an OOM that
would otherwise occur hours later, when the longest examples happen to meet.
"""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lorakit.data.batching import Layout, StepBatch, step_batches
from lorakit.data.dataset import lengths_of
from lorakit.errors import WorkError
from lorakit.hardware import MemoryCap
from lorakit.recipe.schema import Recipe
from lorakit.train.step_runner import StepRunner
from lorakit.types import Example, MemoryPlan

_OOM_TEXTS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "_status_alloc_failed",  # cuBLAS and cuDNN
)
_REQUESTED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)", re.IGNORECASE)
_ALLOWED = re.compile(r"([\d.]+) ?(bytes|KiB|MiB|GiB) allowed")
_FREE = re.compile(r"of which ([\d.]+) ?(bytes|KiB|MiB|GiB) is free")
Result = TypeVar("Result")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def describe_oom(error: BaseException) -> str | None:
    """Describe the requested and the free memory if `error` is an OOM; None for other errors."""
    text = str(error)
    by_text = isinstance(error, RuntimeError) and any(t in text.lower() for t in _OOM_TEXTS)
    if not (by_text or isinstance(error, MemoryError | torch.OutOfMemoryError)):
        return None
    requested, free = _bytes(_REQUESTED, text), _bytes(_FREE, text)
    allowed = _bytes(_ALLOWED, text)
    if requested is None:
        return "requested size unknown"
    if allowed is not None:
        return f"{_size(requested)} more requested, memory_limit allows {_size(allowed)}"
    if free is None:
        return f"{_size(requested)} more requested"
    return f"{_size(requested)} more requested, {_size(free)} free"


def free_caches() -> None:
    """Release memory that only the failed attempt still holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_catching_oom(work: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """Run `work`; on OOM empty the caches and return (None, description) instead."""
    try:
        return work(), None
    except Exception as error:
        fault = describe_oom(error)
        if fault is None:
            raise
    # Not inside `except`: the error's frames hold the tensors of the failed attempt.
    free_caches()
    return None, fault


@contextmanager
def oom_as_error(doing: str, hint: str) -> Iterator[None]:
    """Convert an OOM inside the block to one message.

    Raises:
        WorkError: memory ran out while `doing`.
    """
    try:
        yield
    except Exception as error:
        fault = describe_oom(error)
        if fault is None:
            raise
        raise WorkError(f"out of memory {doing}: {fault}", hint) from error


@dataclass(frozen=True, slots=True)
class RngState:
    """States of the random generators, to repeat a step with the same draws."""

    host: Tensor
    cuda: Tensor | None

    @classmethod
    def capture(cls) -> RngState:
        """Read the present states, without synchronizing with the GPU."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        return cls(torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Set the generators to these states."""
        torch.set_rng_state(self.host)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


def halve_micro_batches(step: StepBatch) -> StepBatch | None:
    """Split the step's examples into micro-batches of half the size; None if each holds one.

    Rows are halved, and a packed micro-batch's tokens with them, until the step has more
    micro-batches than before: halving a capacity that the step did not fill would change nothing.
    """
    layout = step.layout
    while len(step.micro) < len(step.examples):
        layout = _half(layout)
        smaller = step_batches(step.examples, layout)
        if len(smaller.micro) > len(step.micro):
            return smaller
    return None


def _half(layout: Layout) -> Layout:
    rows = max(1, layout.rows // 2)
    # As in a recipe with that many rows; below one row, a fraction of a row.
    capacity = layout.capacity * rows // layout.rows if layout.rows > 1 else layout.capacity // 2
    return replace(layout, rows=rows, capacity=capacity)


def _bytes(pattern: re.Pattern[str], text: str) -> int | None:
    match = pattern.search(text)
    if match is None:
        return None
    unit = next(u for u in _UNITS if u.lower() == match[2].lower())
    return int(float(match[1]) * _UNITS[unit])


def _size(size: int) -> str:
    unit = next((u for u in ("GiB", "MiB", "KiB") if size >= _UNITS[u]), "bytes")
    return f"{size / _UNITS[unit]:,.1f} {unit}" if unit != "bytes" else f"{size} bytes"


# CUDA loads kernels during the first steps; NVML measures each step in about a millisecond.
MEASURED_STEPS = 8


class OomRetry(TrainerCallback, ExportableState):
    """Run steps, and retry those that run out of memory.

    A checkpoint stores the size of the micro-batches, so a resumed run starts with it.

    Args:
        layout: layout of the run's first micro-batches.
        cap: limit of the process's memory.
        note: prints a line.
        last_checkpoint: names the checkpoint to resume from, for messages.
        save: saves a checkpoint of the last step before the run ends.
        alone: False if the ranks gather layers together: one alone cannot retry.

    Attributes:
        layout: layout of the micro-batches of all further steps.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: MemoryPlan,
        layout: Layout,
        cap: MemoryCap,
        note: Callable[[str], None],
        last_checkpoint: Callable[[], str],
        save: Callable[[], None],
        alone: bool = True,
    ) -> None:
        self.recipe, self.plan, self.layout, self.cap, self.note = recipe, plan, layout, cap, note
        self.last_checkpoint, self.save, self.alone = last_checkpoint, save, alone
        self.to_measure = MEASURED_STEPS
        self.rng_after_step: RngState | None = None  # states that the step's checkpoint needs

    def state(self) -> dict[str, Any]:
        """The state kept in `trainer_state.json`."""
        configured, layout = self.recipe.micro_batch_size, self.layout
        kept = {"asked": configured, "rows": layout.rows, "capacity": layout.capacity}
        return {"args": {}, "attributes": kept}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore the checkpoint's layout, unless the user changed `micro_batch_size` since."""
        kept = state.stateful_callbacks.get(type(self).__name__)
        if kept is not None and kept["attributes"]["asked"] == self.recipe.micro_batch_size:
            rows, capacity = (kept["attributes"][n] for n in ("rows", "capacity"))
            self.layout = replace(self.layout, rows=rows, capacity=capacity)

    def run(self, runner: StepRunner, step: StepBatch, scale: float, number: int) -> Tensor:
        """Compute the gradients and the loss of step `number`.

        A second attempt has the same examples, discards the gradients of the first, and draws the
        same random numbers.

        Raises:
            WorkError: memory runs out with one example at a time.
        """
        loss = self._run_with_retry(runner, step, scale, number)
        self.rng_after_step = RngState.capture()
        if self.to_measure:
            self.to_measure -= 1
            self.cap.tighten()
        return loss

    def _run_with_retry(
        self, runner: StepRunner, step: StepBatch, scale: float, number: int
    ) -> Tensor:
        start = RngState.capture()
        while True:
            if step.layout != self.layout:  # prepared before the layout changed
                step = step_batches(step.examples, self.layout)
            loss, fault = run_catching_oom(functools.partial(runner, step.micro, scale))
            if loss is not None:
                return loss
            runner.reset()
            start.restore()
            self._make_smaller(step, str(fault), number)

    def probe(
        self,
        runner: StepRunner,
        step: StepBatch,
        number: int,
        reserve: Callable[[], Tensor | None],
        score: Callable[[], None],
        device: torch.device,
    ) -> None:
        """Run the heaviest micro-batches once, so that an OOM occurs now rather than later.

        Weights and generators are unchanged afterwards; gradients are left to `score`.

        Args:
            reserve: allocates the memory of the first update.
            score: drops the gradients, and runs the heaviest evaluation.
        """
        start, reserved = RngState.capture(), reserve()
        self._run_with_retry(runner, step, 1 / max(1, step.supervised), number)
        del reserved
        score()
        self.cap.tighten()
        start.restore()
        usage = "it fits"
        if device.type == "cuda":
            peak, available = torch.cuda.max_memory_reserved(), self.plan.available_bytes
            usage = f"{peak / 2**30:.1f} of {available / 2**30:.1f} GiB"
        longest = max(step.examples, key=lambda e: len(e.input_ids))
        self.note(
            f"probe    {step.tokens:,} tokens at once, forward and backward, the longest from "
            f"{longest.origin}: {usage}"
        )

    def _make_smaller(self, step: StepBatch, fault: str, number: int) -> None:
        """Halve the micro-batches of this step and of all later ones."""
        smaller = halve_micro_batches(step)
        if smaller is None:
            self._give_up(step, fault, number)
        if not self.alone:
            raise WorkError(
                f"out of memory at step {number}: {fault}; {self.last_checkpoint()}",
                hint="lower memory_limit: the plan then takes fewer tokens at once",
            )
        self.layout = smaller.layout
        self.note(
            f"step {number}: out of memory ({fault}); retrying; all further steps use smaller "
            f"micro-batches: {len(smaller.micro)} instead of {len(step.micro)} for the same "
            f"{len(step.examples)} examples"
        )

    def _give_up(self, step: StepBatch, fault: str, number: int) -> NoReturn:
        """Save the progress and raise, because memory does not hold a single example."""
        if self.rng_after_step is not None:
            self.rng_after_step.restore()
            self.save()
        longest = max(step.examples, key=lambda e: len(e.input_ids))
        size = len(longest.input_ids)
        raise WorkError(
            f"out of memory at step {number} with one example at a time: {fault}\n"
            f"  the longest of the step is {longest.origin} with {size} tokens\n"
            f"  {self.last_checkpoint()}",
            hint=_cheaper(self.recipe, self.plan, size),
        )


def _cheaper(recipe: Recipe, plan: MemoryPlan, longest: int) -> str:
    """Settings that would make an example of `longest` tokens fit, cheapest first."""
    ways = []
    if plan.keep and min(plan.keep) < 3:
        ways.append("resume with --resume --set gradient_checkpointing=true")
    if recipe.method == "lora":
        ways.append("start a new run with method: qlora")
    ways.append(f"start a new run with cutoff_len below {longest}, a lower lora_r or fewer layers")
    return "; or ".join(ways)


def worst_step(examples: Sequence[Example], layout: Layout, per_step: int) -> StepBatch:
    """A step of one micro-batch: the longest rows, or a pack filled with the longest.

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
    """The heaviest batch that occurs when scoring these examples."""
    sizes = lengths_of(examples)
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    return [examples[i] for i in order[: max(1, batch_tokens // sizes[order[0]])]]


def reserve_optimizer_memory(
    optimizer: Any, plan: MemoryPlan, device: torch.device
) -> Tensor | None:
    """Reserve the memory of the first update; None if it is already allocated."""
    if device.type != "cuda" or optimizer is None or optimizer.state:
        return None
    size = plan.parts.get("optimizer state", 0)
    return torch.empty(size, dtype=torch.uint8, device=device)


def _fill(
    sizes: NDArray[np.int64], order: NDArray[np.int64], capacity: int, count: int
) -> list[int]:
    """Fill a pack with the longest examples first; the longest of all is always included."""
    chosen, free, index = [int(order[0])], capacity - int(sizes[0]), 1
    while len(chosen) < count and index < len(sizes):
        # Sizes descend: continue with the first one that fits.
        index = max(index, int(np.searchsorted(-sizes, -free)))
        if index >= len(sizes):
            break
        chosen.append(int(order[index]))
        free -= int(sizes[index])
        index += 1
    return chosen
