"""A step enters; its loss and gradients leave, in smaller micro-batches where memory runs out.

The examples of a step, their tokens and the sum stay: only how many go through the model at once
is halved, for this step and the rest of the run. The heaviest micro-batch may be tried beforehand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from lorakit.data.batch import Layout, StepBatch, step_batches
from lorakit.errors import WorkError
from lorakit.gpu_memory import MemoryCap
from lorakit.ranks import Ranks
from lorakit.recipe import Recipe
from lorakit.records import EvalScore, Example, MemoryPlan
from lorakit.run_dir import RunDir
from lorakit.train.out_of_memory import Generators, attempt, smaller
from lorakit.train.probe import longest_scored, room_for_optimizer, worst_step

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
    ranks: Ranks

    @property
    def sharded(self) -> bool: ...

    def score(self, examples: Sequence[Example]) -> EvalScore: ...

    def last_checkpoint(self) -> str: ...

    def start_over(self) -> None: ...

    def _step_gradients(self, model: Any, step: StepBatch, scale: float) -> Tensor: ...

    def _save_checkpoint(self, model: Any, trial: Any) -> None: ...


class WithinMemory:
    """Runs steps; owns the answer to memory that runs out in one."""

    def __init__(self, trainer: Stepping, note: Callable[[str], None], cap: MemoryCap) -> None:
        self.trainer, self.note, self.cap = trainer, note, cap
        self.to_measure = MEASURED_STEPS
        self.after: Generators | None = None  # the last step, as its checkpoint needs them

    def run(self, model: Any, step: StepBatch, scale: float) -> Tensor:
        """The gradients and the loss of one step.

        A second attempt has the same examples, no gradients of the first, and draws what it would
        have drawn at once.

        Raises:
            WorkError: memory runs out with one example at a time.
        """
        loss = self._fitted(model, step, scale)
        self.after = Generators.now()
        if self.to_measure:
            self.to_measure -= 1
            self.cap.tighten()
        return loss

    def _fitted(self, model: Any, step: StepBatch, scale: float) -> Tensor:
        trainer, start = self.trainer, Generators.now()
        while True:
            if step.layout != trainer.layout:  # laid out ahead, before the layout changed
                step = step_batches(step.examples, trainer.layout)
            work = functools.partial(trainer._step_gradients, model, step, scale)
            loss, trouble = attempt(work)
            if loss is not None:
                return loss
            model.zero_grad(set_to_none=True)
            start.restore()
            self._make_smaller(step, str(trouble))

    def probe(self, model: Any) -> None:
        """Run the heaviest micro-batches once: memory runs out now, or not for their sake.

        Weights, gradients and generators are afterwards as if this had not been.
        """
        trainer, start = self.trainer, Generators.now()
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
        number, made = trainer.state.global_step + 1, smaller(step)
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
