"""GRPO on the trainer of fine-tuning: rollout, rewards, advantages, then a step of micro-batches.

    rollout n = completions of the prompts of n under the present adapter       (`rollouts`)
    rewards -> advantages                                                        (`rewards`, ...)
    loss of each micro-batch, through the same forward as fine-tuning            (`policy_loss`)

A rollout is a function of (seed, n, adapter), so a run that was killed between rollout and update
repeats it. With `num_iterations` above 1 a checkpoint between the steps of a rollout holds it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lorakit.data.batching import Batch, step_batches
from lorakit.errors import LorakitError, RunError, WorkError
from lorakit.reinforcement.log_probs import ReferenceWeights, completion_log_probs
from lorakit.reinforcement.policy_loss import (
    OLD,
    REFERENCE,
    VALUES,
    PolicyObjective,
    PolicySettings,
)
from lorakit.reinforcement.prompt_schedule import Prompt, PromptRows, PromptSchedule
from lorakit.reinforcement.rewards import Attempt, RewardSet
from lorakit.reinforcement.rollout_batch import (
    RolloutBatch,
    ScoredCompletion,
    plain_example,
    training_examples,
)
from lorakit.reinforcement.rollout_log import (
    loss_metrics,
    mean_metrics,
    rollout_metrics,
    shown_rollouts,
)
from lorakit.reinforcement.rollouts import Completion, Sampler, SamplingSettings, uniform_draws
from lorakit.storage.run_dir import read_metrics
from lorakit.train.gradient_sync import local_examples
from lorakit.train.oom import reserve_optimizer_memory
from lorakit.train.rollout_alarms import RolloutAlarms
from lorakit.train.step_inputs import StepInputs
from lorakit.train.trainer import LoraTrainer
from lorakit.types import IGNORE, Device, EvalScore, Example, ScoredExample

# Mean |log p of the trainer - log p of the sampler| in nats above which a run is refused: rounding
# of bfloat16 gives about 0.01, a wrong mask, position or template 0.5 and more.
MOST_DIFFERENCE = 0.1


class RolloutMemory(TrainerCallback, ExportableState):
    """State of rollouts for checkpoints: the sampler's batch, and a rollout that is in use."""

    def __init__(self, trainer: GrpoTrainer) -> None:
        self.trainer = trainer

    def state(self) -> dict[str, Any]:
        """The state kept in `trainer_state.json`."""
        trainer, kept = self.trainer, None
        batch, within = trainer.batch, trainer.state.global_step % trainer.recipe.num_iterations
        if batch is not None and within:
            kept = {"number": batch.number, "rows": [c.as_dict() for c in batch.completions]}
        return {"args": {}, "attributes": {"rows": trainer.sampler.rows, "batch": kept}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore the checkpoint's state."""
        kept = state.stateful_callbacks.get(type(self).__name__)
        if kept is None:
            return
        values, trainer = kept["attributes"], self.trainer
        trainer.sampler.rows = values["rows"]
        if values["batch"] is not None:
            rows = [ScoredCompletion.from_dict(row) for row in values["batch"]["rows"]]
            trainer.batch = RolloutBatch.of(values["batch"]["number"], rows, trainer.recipe)


class GrpoTrainer(LoraTrainer):
    """LoraTrainer whose examples are sampled completions.

    Args:
        rewards: functions that score completions.
        prompts: prompts with the columns of their rows.
    """

    def __init__(self, *args: Any, rewards: RewardSet, prompts: PromptRows, **kw: Any) -> None:
        self.rewards, self.prompts = rewards, prompts
        self.batch: RolloutBatch | None = None
        self.checked = self.signal = False
        self.metric_rows: list[dict[str, float]] = []
        self.shown: list[dict[str, Any]] = []
        super().__init__(*args, **kw)
        recipe = self.recipe
        if self.sharded:
            raise RunError(
                "objective: grpo: the base is sharded over the ranks, which sample completions of "
                "different lengths",
                hint="set sharding: off, leave fsdp out, or set method: qlora",
            )
        if self.plan.placement.layerwise and recipe.temperature != 1:
            raise RunError(
                f"temperature: {recipe.temperature:g}: the plan computes layer by layer from host "
                "memory, which supports 1 alone",
                hint="set temperature: 1, method: qlora, or a lower micro_batch_size",
            )
        self.reference = ReferenceWeights(self.trained) if recipe.beta_value else None
        self.schedule = PromptSchedule(len(prompts), recipe.rows_per_step, recipe.seed)
        settings = SamplingSettings(
            recipe.max_completion_length, recipe.temperature, recipe.top_p, recipe.top_k
        )
        self.sampler = Sampler(
            self.model,
            self.processing_class,
            settings,
            self.progress.note,
            recipe.examples_per_step,
            self.compute_loss_context_manager,
        )
        self.add_callback(RolloutMemory(self))

    # -- a step -----------------------------------------------------------------------------------

    def _collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The step's inputs are made when it begins: they depend on the adapter of then."""
        self.next_step = lambda: None
        return {"ready": self._inputs_of_step}

    def _inputs_of_step(self) -> StepInputs:
        number = self.state.global_step
        rollout = number // self.recipe.num_iterations
        if self.batch is None or self.batch.number != rollout:
            with self._keeping_last_step():
                self.batch = self._rollout(rollout)
        examples = training_examples(self.batch, self.recipe, self.ranks.world_size)
        self.signal = bool(np.any(self.batch.scores.advantages))
        own = [e for e in local_examples(examples, self.ranks) if isinstance(e, ScoredExample)]
        trained = sum(e.trained_tokens for e in examples)
        return StepInputs(step_batches(own, self.layout), [*examples], self.batch.tokens, trained)

    def _loss_divisor(self, ready: StepInputs) -> int:
        return 1  # the tokens' weights contain it

    def _add_objective(self, device: torch.device) -> None:
        self.preferences = None
        self.objective = PolicyObjective(PolicySettings.of(self.recipe))

    def _add_sums(self, sums: Tensor, loss: Tensor) -> None:
        self.metric_rows.append(loss_metrics(sums.tolist(), self.recipe.beta_value))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """The gradient norm; a step whose rewards are all equal may have no gradient."""
        guard = self.stability
        reached = guard.reached
        guard.reached = reached or not self.signal
        try:
            return super()._get_grad_norm(model, grad_norm)
        finally:
            guard.reached = guard.reached if self.signal else reached

    def _place(self, micro: Batch) -> Batch:
        """Copy a micro-batch to the device."""
        return self.attached.place(micro, self.args.device)

    # -- a rollout --------------------------------------------------------------------------------

    def _rollout(self, number: int) -> RolloutBatch:
        """Sample and score the completions of a rollout; each rank its share of the prompts."""
        began = time.perf_counter()
        size, rows = self.recipe.num_generations, self.schedule.rows(number)
        length = self.recipe.max_completion_length
        draws = uniform_draws(self.recipe.seed, number, len(rows) * size, length)
        mine = range(self.ranks.rank, len(rows), self.ranks.world_size)
        prompts = [self.prompts[rows[place]] for place in mine for _ in range(size)]
        picked = [place * size + member for place in mine for member in range(size)]
        completions = self.sampler.sample([p.ids for p in prompts], draws[picked])
        sampled = time.perf_counter()
        scored = self._scored(prompts, completions)
        rewarded = time.perf_counter()
        scored = self._with_log_probs(scored)
        parts = self.ranks.all_gather_object(scored)
        ordered = [
            parts[place % self.ranks.world_size][place // self.ranks.world_size * size + member]
            for place in range(len(rows))
            for member in range(size)
        ]
        batch = RolloutBatch.of(number, ordered, self.recipe)
        times = {
            "seconds/rollout": sampled - began,
            "seconds/rewards": rewarded - sampled,
            "seconds/log_probs": time.perf_counter() - rewarded,
        }
        self.metric_rows.append({**rollout_metrics(batch, self.rewards.names), **times})
        questions = [str(self.prompts[row].turns[-1]["content"]) for row in rows[:2]]
        self.shown = shown_rollouts(
            self.state.global_step + 1, batch, questions, self.rewards.names
        )
        return batch

    def _scored(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> list[ScoredCompletion]:
        if not prompts:
            return []
        decode = self.processing_class.decode
        texts = [decode(c.ids, skip_special_tokens=True).strip() for c in completions]
        attempts = [
            Attempt(p.turns, text, c.ids, p.fields)
            for p, text, c in zip(prompts, texts, completions, strict=True)
        ]
        rewards = self.rewards.score(attempts)
        return [
            ScoredCompletion(p.ids, p.origin, c, text, float(total), [float(v) for v in parts])
            for p, c, text, total, parts in zip(
                prompts, completions, texts, rewards.total, rewards.parts, strict=True
            )
        ]

    def _with_log_probs(self, scored: list[ScoredCompletion]) -> list[ScoredCompletion]:
        """Add the trainer's log p where later steps need it, and that of the reference."""
        examples = [plain_example(s.prompt_ids, s.completion, s.origin) for s in scored]
        if not self.checked or self.recipe.num_iterations > 1:
            old = self._completion_log_probs(examples)
            self._check_sampler(scored, old)
            if self.recipe.num_iterations > 1:
                scored = [
                    dataclasses.replace(s, old_log_p=values)
                    for s, values in zip(scored, old, strict=True)
                ]
        if self.reference is not None:
            with self.reference.active():
                found = self._completion_log_probs(examples)
            scored = [
                dataclasses.replace(s, reference_log_p=values)
                for s, values in zip(scored, found, strict=True)
            ]
        return scored

    def _completion_log_probs(self, examples: Sequence[ScoredExample]) -> list[list[float]]:
        def log_probs(micro: Batch) -> Tensor:
            with self.compute_loss_context_manager():
                out = self.model(**self._place(micro), per_token=True, use_cache=False)
            losses: Tensor = out.token_losses
            return -losses

        return (
            completion_log_probs(self.model, examples, self.layout, log_probs) if examples else []
        )

    def _check_sampler(self, scored: list[ScoredCompletion], old: list[list[float]]) -> None:
        """Compare the sampler's log p with the trainer's, before the first update of a session.

        Raises:
            WorkError: they differ by more than rounding.
        """
        if self.checked:
            return
        self.checked = True
        pairs = [
            (a, b)
            for s, values in zip(scored, old, strict=True)
            for a, b in zip(s.completion.log_probs, values, strict=True)
        ]
        differences = np.abs([a - b for a, b in pairs]) if pairs else np.zeros(1)
        mean, most = float(differences.mean()), float(differences.max())
        self.progress.note(
            f"sampler  mean |log p of the sampler - log p of the trainer| is {mean:.2g} over "
            f"{len(pairs):,} tokens, at most {most:.2g}"
        )
        if not mean <= MOST_DIFFERENCE:
            raise WorkError(
                f"sampler and trainer disagree: mean |log ratio| {mean:.3g} nats over "
                f"{len(pairs):,} tokens, expected at most {MOST_DIFFERENCE}",
                hint="set fused_layers: off or dtype: float32; if that helps, report the model",
            )

    @contextlib.contextmanager
    def _keeping_last_step(self) -> Iterator[None]:
        """Save the last step before a fault in a rollout ends the run."""
        try:
            yield
        except LorakitError as error:
            after = self.oom_retry.rng_after_step
            if after is not None:
                after.restore()
                self._save_unsaved()
            raise WorkError(
                f"step {self.state.global_step + 1}: {error.message}; {self.last_checkpoint()}",
                error.hint,
            ) from error

    # -- what is reported -------------------------------------------------------------------------

    def score(self, examples: Sequence[Example]) -> EvalScore:
        """Refuse to compare runs by losses, which prompts do not have."""
        if examples:
            raise RunError(
                "objective: grpo: prompts have no held-out loss to compare runs by",
                hint="sweep without --halving, or leave val_size and val_data out",
            )
        return super().score(examples)

    def _monitor(self) -> Any:
        alarms = RolloutAlarms(self.recipe, self.rewards.names)
        alarms.replay(read_metrics(self.run))
        return alarms

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of rollouts to a row, and write examples of the last one."""
        if "loss" in logs:
            logs.update(mean_metrics(self.metric_rows))
            self.metric_rows = []
            self.progress.examples(self.shown)
            self.shown = []
        super().log(logs, start_time)

    def _decide_packing(self, train: Sequence[Example], device: Device) -> tuple[bool, str]:
        """Pack on GPUs: the lengths of completions are not known before they are sampled."""
        if not self.recipe.packing:
            return False, "off (packing: false)"
        if device.kind == "cpu":
            return False, "off: on a CPU, completions of similar lengths go side by side"
        if not self.attached.packs:
            return False, self.attached.packing
        return True, "on: completions share micro-batches"

    def _probe(self) -> None:
        """Run the heaviest micro-batch: the longest prompt with the longest completions."""
        length = self.recipe.max_completion_length
        prompt = int(self.prompts.examples.lengths.max())
        values = {name: [0.0] * length for name in VALUES if name != OLD}
        if self.reference is None:
            del values[REFERENCE]
        ids, labels = [0] * (prompt + length), [IGNORE] * prompt + [0] * length
        longest = ScoredExample(ids, labels, self.prompts.examples.origin(0), token_values=values)
        layout, most = self.layout, self.recipe.examples_per_step
        rows = layout.capacity // len(ids) if layout.packed else layout.rows
        self.oom_retry.probe(
            self.runner,
            step_batches([longest] * max(1, min(rows, most)), layout),
            self.state.global_step + 1,
            lambda: reserve_optimizer_memory(self.optimizer, self.plan, self.args.device),
            lambda: self.model.zero_grad(set_to_none=True),
            self.args.device,
        )
