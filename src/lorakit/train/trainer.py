"""Train adapters with TRL's SFTTrainer; write checkpoints and metrics.

Differences from SFTTrainer: rows arrive tokenized and masked and are not modified, a step's
examples are divided into micro-batches here, the loss covers supervised tokens and weighs tokens
(not micro-batches), adapters stay float32, checkpoints are complete or absent, and a step that
runs out of memory or is not finite changes nothing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback

from lorakit.data.batching import Batch, Layout, decide_packing, saved_share
from lorakit.data.dataset import as_dataset, sequence_lengths
from lorakit.distributed.process_group import SINGLE_PROCESS, DistributedContext
from lorakit.engine.decoder_layer import SavedActivations
from lorakit.engine.token_objective import TokenObjective, loss_and_sums, model_inputs
from lorakit.errors import RunError, WorkError
from lorakit.hardware import MemoryCap
from lorakit.model.start_adapter import start_folder
from lorakit.recipe.schema import PREFERENCE_OBJECTIVES, Recipe
from lorakit.storage.run_dir import RunDir
from lorakit.train.best_step import (
    EarlyStopping,
    SaveBestStep,
    TaskScorer,
)
from lorakit.train.callbacks import MetricsCallback, SafeTracker, StopOnSignal, TimedCheckpoint
from lorakit.train.diagnostics import RunMonitor, planned_rate
from lorakit.train.eval_loss import BATCH_TOKENS, combined, not_finite, score
from lorakit.train.fsdp import with_equal_micro_batches
from lorakit.train.gradient_sync import GradientSync, keep_steps_complete, local_examples
from lorakit.train.loss import AttachResult, attach_loss, base_of, detach_loss
from lorakit.train.oom import (
    OomRetry,
    RngState,
    describe_oom,
    free_caches,
    longest_scored,
    reserve_optimizer_memory,
    worst_step,
)
from lorakit.train.packing import in_turn_reason
from lorakit.train.preference_run import PreferenceRun, chosen_only
from lorakit.train.progress import TrainingProgress
from lorakit.train.resumable_trainer import ResumableTrainer
from lorakit.train.signals import StopRequest
from lorakit.train.stability import StepGuard
from lorakit.train.step_inputs import StepInputs, step_inputs
from lorakit.train.step_runner import StepRunner, choose_step_runner
from lorakit.train.training_args import total_steps, training_arguments
from lorakit.types import Device, EvalScore, Example, MemoryPlan


class LoraTrainer(ResumableTrainer):
    """SFTTrainer on tokenized examples: `train[i]` goes to the model unchanged."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        recipe: Recipe,
        device: Device,
        plan: MemoryPlan,
        run: RunDir,
        train: Sequence[Example],
        val: Sequence[Example],
        progress: TrainingProgress,
        stop: StopRequest,
        fingerprint: Mapping[str, Any] | None = None,
        ranks: DistributedContext = SINGLE_PROCESS,
        callbacks: Sequence[Any] = (),
        scorer: TaskScorer | None = None,
    ) -> None:
        self.sync, self.ranks, self.scorer = GradientSync(ranks, stop), ranks, scorer
        self.run, self.recipe, self.train_rows, self.val, self.plan = run, recipe, train, val, plan
        self.progress = progress
        self.pad_id: int = pad_token_id(tokenizer)
        self.stability = StepGuard(
            recipe, progress.note, self.rows_not_finite, self.last_checkpoint
        )
        self.oom_retry = OomRetry(
            recipe,
            plan,
            first_layout(recipe, plan, self.pad_id),
            MemoryCap(recipe.memory_limit_bytes, device),
            progress.note,
            self.last_checkpoint,
            self._save_unsaved,
            alone=not self.sharded,
        )
        self.fingerprint, self.loaded = fingerprint, dict[str, Any]()
        steps = total_steps(recipe, len(train))
        # SFTTrainer rounds the adapters of a 4-bit base to bf16; restore their float32 values.
        masters = {n: p.data.clone() for n, p in model.named_parameters() if p.requires_grad}
        super().__init__(
            model=model,
            args=training_arguments(recipe, device, run, steps, bool(val), scorer),
            processing_class=tokenizer,
            train_dataset=as_dataset(train),
            eval_dataset=as_dataset(val) if val else None,
            data_collator=self._collate,
            callbacks=[
                self.stability,
                self.oom_retry,
                MetricsCallback(self, progress, self._monitor()),
                StopOnSignal(self.sync),
                *callbacks,
            ],
        )
        self._add_callbacks()
        self._add_objective(torch.device(device.kind))
        for name, parameter in self.model.named_parameters():
            if name in masters:
                parameter.data = masters[name]
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        keep_steps_complete(self.accelerator, ranks)
        self.accelerator.device_placement = False  # parts may be in host memory on purpose
        on, aux = torch.device(device.kind), recipe.router_aux_loss_coef
        self.attached = attach_loss(
            self.model, recipe.layers, on, plan.placement, ranks, aux, recipe.policy_temperature
        )
        recompute(self.model, self.attached, plan, recipe)
        self.packing = self._packing(train, device)
        self.step_tokens, self.eval_tokens = 0, BATCH_TOKENS
        self.to_probe = (
            device.kind == "cuda" if recipe.memory_probe == "auto" else recipe.memory_probe
        )
        self.runner = self._choose_runner()

    def _monitor(self) -> Any:
        """Checks on the rows of metrics."""
        return RunMonitor(self.recipe, planned_rate(self.run), self._why_slow)

    def _choose_runner(self) -> StepRunner:
        return choose_step_runner(
            self._forward_backward,
            self.attached,
            self.trained,
            self.plan.placement,
            self.args.device,
            loss_scaler=self.args.fp16,
            ranks=self.ranks.world_size,
            objective=self.objective,
        )

    def _add_objective(self, device: torch.device) -> None:
        """Add what an objective other than supervised fine-tuning needs."""
        self.objective: TokenObjective | None = None
        self.preferences: PreferenceRun | None = None
        if self.recipe.objective in PREFERENCE_OBJECTIVES:
            self.preferences = PreferenceRun(
                self.recipe,
                self.run,
                self.train_rows,
                self.val,
                self.pad_id,
                device,
                self.ranks,
                (self.fingerprint or {}).get("start"),
                self.sharded,
                self.progress.note,
            )
            self.objective = self.preferences.objective
            self.train_dataset = self.preferences.trainer_rows

    def prepare_reference(self, resuming: bool) -> None:
        """Compute the reference values of preference data, unless the run has them.

        Args:
            resuming: the model is not yet the one that training started from, if that had an
                adapter.
        """
        if self.preferences is not None:
            wants_start = resuming and self.recipe.from_adapter is not None
            self.preferences.prepare(self.model, self._load_start if wants_start else None)

    def _load_start(self) -> None:
        folder = start_folder(self.recipe)
        if folder is None:
            raise RunError(
                f"from_adapter: {self.recipe.from_adapter} is gone, and {self.run.reference.name} "
                "of this run is missing or of other data",
                hint="restore the adapter, or start a new run with --output",
            )
        self._load_adapter(folder)

    def _add_callbacks(self) -> None:
        """Add the callbacks that the recipe asks for, and isolate trackers."""
        recipe, progress = self.recipe, self.progress
        self.remove_callback(PrinterCallback)
        if recipe.early_stopping_patience is not None:
            self.add_callback(EarlyStopping(recipe.early_stopping_patience, progress.note))
        if recipe.compares_steps:
            self.add_callback(SaveBestStep())
        if recipe.save_minutes is not None:
            self.add_callback(TimedCheckpoint(recipe.save_minutes, self.sync.agree_to_save))
        self.callback_handler.callbacks = shelter(self.callback_handler.callbacks, progress)

    def describe(self) -> dict[str, str]:
        """Describe the chosen parts in words."""
        attached = self.attached
        return {"layers": attached.layers, "loss": attached.loss, "packing": self.packing}

    @property
    def layout(self) -> Layout:
        """Layout of the next step's micro-batches."""
        return self.oom_retry.layout

    def create_optimizer(self, *args: Any) -> Any:
        """Create the optimizer, with a higher rate for lora_B where the recipe asks for LoRA+."""
        optimizer = super().create_optimizer(*args)
        if self.recipe.loraplus_lr_ratio is not None:
            rate = self.recipe.learning_rate * self.recipe.loraplus_lr_ratio
            b_factors = {id(p) for n, p in self.model.named_parameters() if "lora_B" in n}
            for group in list(optimizer.param_groups):
                ours = [p for p in group["params"] if id(p) in b_factors]
                if ours:
                    group["params"] = [p for p in group["params"] if id(p) not in b_factors]
                    optimizer.add_param_group({**group, "params": ours, "lr": rate})
        return optimizer

    def training_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """Run forward and backward of one optimizer step's micro-batches; return its mean loss.

        The loss is divided by the step's supervised tokens (or its preference pairs), so gradients
        of micro-batches are simply added: they do not depend on how the examples were divided.
        """
        model.train()
        if self.to_probe:
            self.to_probe = False
            self._probe()
        ready: StepInputs = inputs["ready"]()
        number, weight = self.state.global_step + 1, self._loss_divisor(ready)
        if self.preferences is not None:
            self.preferences.begin(self.model, ready.examples, ready.own.examples)
        result = self.oom_retry.run(self.runner, ready.own, 1 / max(1, weight), number)
        loss, sums = loss_and_sums(result, self.objective)
        if self.ranks.world_size > 1:
            more = [] if sums is None else [sums]
            loss = self.sync.add([*self.runner.gradients, *more], loss)
        if sums is not None:
            self._add_sums(sums, loss)
        self.step_tokens += ready.tokens
        self.step_loss, self.step_examples = loss, ready.examples
        self.next_step()  # while the GPU computes: 4 ms for 8 rows of 2,048 tokens
        self.ranks.at(number, self.last_checkpoint, self.run.path)
        # The log sums losses; the guard counts those that are not finite.
        return torch.where(torch.isfinite(loss), loss, 0.0)

    def _loss_divisor(self, ready: StepInputs) -> int:
        """Number by which the losses of a step are divided: its tokens, or its preferences."""
        return ready.supervised if self.preferences is None else len(ready.examples)

    def _add_sums(self, sums: Tensor, loss: Tensor) -> None:
        """Add the objective's sums of a step to those of the next row of metrics."""
        if self.preferences is not None:
            self.preferences.add(sums, loss)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """The gradient norm if finite; otherwise the step's gradients are dropped.

        Raises:
            WorkError: the second step within a short time that is not finite.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        scaled = self.accelerator.scaler is not None
        number = self.state.global_step + 1
        return self.stability.check(
            self.model, number, self.step_loss, norm, self.step_examples, scaled
        )

    def _probe(self) -> None:
        """Run the heaviest micro-batches, and the heaviest evaluation, before the first step."""
        per_step = -(-self.recipe.examples_per_step // self.ranks.world_size)
        device = self.args.device

        def score() -> None:
            self.model.zero_grad(set_to_none=True)
            if self.val:
                self.score(longest_scored(self.val, self.eval_tokens))
                self.model.train()

        self.oom_retry.probe(
            self.runner,
            worst_step(self.train_rows, self.layout, per_step),
            self.state.global_step + 1,
            lambda: reserve_optimizer_memory(self.optimizer, self.plan, device),
            score,
            device,
        )

    def _forward_backward(self, micro: Batch, scale: Any) -> Tensor:
        objective, sums = self.objective, None
        with self.compute_loss_context_manager():
            if objective is None:
                loss = self.model(**micro, use_cache=False).loss_sum * scale
            else:
                inputs = model_inputs(objective, micro)
                losses = self.model(**inputs, use_cache=False, per_token=True).token_losses
                loss, sums = objective(losses, micro)
                loss = loss * scale
        self.accelerator.backward(loss)
        return loss.detach() if sums is None else torch.cat([loss.detach().view(1), sums])

    def _save_unsaved(self) -> None:
        """Save a checkpoint of the last step, unless it exists or other ranks are in a step."""
        saved = self.run.checkpoint(self.state.global_step).exists()
        if self.ranks.world_size == 1 and not saved:
            self._save_checkpoint(self.model, None)

    def _packing(self, train: Sequence[Example], device: Device) -> str:
        """Decide whether documents share micro-batches; return the reason."""
        packed, words = self._decide_packing(train, device)
        self.oom_retry.layout = replace(self.layout, packed=packed)
        return words

    def _decide_packing(self, train: Sequence[Example], device: Device) -> tuple[bool, str]:
        rows, seed = self.recipe.micro_batch_size * self.recipe.sequences, self.recipe.seed
        saved = saved_share(sequence_lengths(train), rows, seed)
        packed, words = decide_packing(saved, self.recipe.packing, device.kind == "cpu")
        if packed and not self.attached.packs:
            return False, self.attached.packing
        if packed and device.kind == "cuda" and self.attached.engine is None:
            reason = in_turn_reason(base_of(self.model))
            return reason is None, reason or words
        return packed, words

    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        """Token-weighted held-out loss, by the same code as `lorakit eval`."""
        result = self.score(self.val)
        metrics = {"eval_loss": result.loss, "eval_perplexity": result.perplexity}
        scores = self.score_preferences() or {}
        metrics |= {f"eval_{name}": value for name, value in scores.items()}
        if self.scorer is not None:
            metrics |= self._score_tasks(self.scorer)
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def score_preferences(self) -> dict[str, float] | None:
        """Loss, rewards and accuracy of the held-out pairs; None without any."""
        if self.preferences is None or self.preferences.val is None:
            return None
        return self.preferences.score(self.model)

    def _score_tasks(self, scorer: TaskScorer) -> dict[str, float]:
        """Score the recipe's tasks on rank 0, or on all ranks if they share the base."""
        draws = RngState.capture()
        model = self.accelerator.unwrap_model(self.model)
        try:
            if self.sharded:
                return scorer.score(model)
            return self.ranks.run_on_main_and_broadcast(lambda: scorer.score(model))
        finally:
            draws.restore()  # dropout of the next step draws as without an evaluation

    def score(self, examples: Sequence[Example]) -> EvalScore:
        """Held-out loss; after an OOM batches become smaller for the rest of the run.

        Of preference data the chosen answers are scored.
        """
        examples = chosen_only(examples)
        local = examples if self.sharded else local_examples(examples, self.ranks)
        result = score(
            self.model, local, self.pad_id, self.eval_tokens, on_smaller=self._score_smaller
        )
        return result if self.sharded else combined(self.ranks.all_gather_object(result))

    def _score_smaller(self, tokens: int) -> None:
        self.eval_tokens = tokens
        self.progress.note(
            f"out of memory in evaluation; continuing with {tokens:,} tokens a batch"
        )

    def rows_not_finite(self, examples: Sequence[Example]) -> list[Example]:
        """The examples of a step whose loss alone is NaN or infinite."""
        local = examples if self.sharded else local_examples(examples, self.ranks)
        result = not_finite(self.model, local, self.pad_id)
        self.model.train()
        return (
            result if self.sharded else list(itertools.chain(*self.ranks.all_gather_object(result)))
        )

    @property
    def sharded(self) -> bool:
        """True if the ranks pass through the base together."""
        return self.plan.placement.shards > 1 or self.recipe.fsdp is not None

    def last_checkpoint(self) -> str:
        """Name the checkpoint to resume from, for messages."""
        kept = self.run.list_checkpoints()
        return f"{kept[-1].name} is the last checkpoint" if kept else "there is no checkpoint yet"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log rows to trackers and metrics.jsonl; skipped steps are excluded from the mean loss."""
        if "loss" in logs:
            logs.update(self.stability.row(logs["loss"]))
            logs.update(self.preferences.row() if self.preferences is not None else {})
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train to the end.

        Raises:
            WorkError: an OOM with one example, in the update or in a save; or two steps within a
                short time are not finite.
        """
        try:
            return super().train(*args, **kwargs)
        except Exception as error:
            fault = describe_oom(error)
            if fault is None:
                raise
            raise WorkError(
                f"out of memory after step {self.state.global_step}, in the update, a save or the "
                f"next batch: {fault}; {self.last_checkpoint()}",
                hint="lower micro_batch_size or lora_r, or set optimizer: adamw_8bit on a CUDA GPU",
            ) from error

    def _collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A step that is prepared at its first call; accelerate fetches it one step ahead."""
        self.next_step: Callable[[], Any] = functools.cache(functools.partial(self._ready, rows))
        return {"ready": self.next_step}

    def _ready(self, rows: Sequence[dict[str, Any]]) -> StepInputs:
        ready = step_inputs(rows, self.layout, self.ranks)
        if self.recipe.fsdp is None:
            return ready
        return with_equal_micro_batches(ready, self.layout, self.ranks)

    def _why_slow(self) -> str:
        """The likeliest reason for few tokens/s."""
        if self.layout.rows < first_layout(self.recipe, self.plan, self.pad_id).rows:
            return "micro-batches were reduced after running out of memory"
        if self.runner.slow_reason:
            return self.runner.slow_reason
        if self.args.device.type == "cuda" and self.attached.own_layers:
            return f"the fast layers are off ({self.attached.layers})"
        if not self.layout.packed and self.recipe.micro_batch_size > 1:
            return (
                f"check for another program on this device, or for padding (packing {self.packing})"
            )
        return "check for another program on this device (nvidia-smi, top) or overheating"

    def close(self) -> Any:
        """Detach the trainer from the trained model, and return the model.

        Graphs, gradients and optimizer state are released first: an embedding may need the memory
        to return to the GPU.
        """
        del self.runner
        self.optimizer = self.lr_scheduler = None
        self.model.zero_grad(set_to_none=True)
        free_caches()
        detach_loss(self.model)
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)


def first_layout(recipe: Recipe, plan: MemoryPlan, pad_id: int) -> Layout:
    """Micro-batches of the recipe's rows, or of the tokens that the plan processes at once."""
    rows, longest = recipe.micro_batch_size, recipe.cutoff_len * recipe.sequences
    if plan.placement.layerwise:
        rows = max(1, plan.placement.tokens_at_once // longest)
    return Layout(pad_id, rows, rows * longest, packed=False)


def recompute(model: Any, attached: AttachResult, plan: MemoryPlan, recipe: Recipe) -> None:
    """Configure activation checkpointing according to the plan.

    A plan that was not made for the present layers is ignored.
    """
    if attached.engine is not None:
        attached.engine.set_checkpointing([SavedActivations(level) for level in plan.keep])
    elif attached.compiled is not None:
        attached.compiled.recompute = any(plan.keep)
    elif any(plan.keep) or (plan.engine and recipe.gradient_checkpointing == "auto"):
        base_of(model).gradient_checkpointing_enable({"use_reentrant": False})


def shelter(callbacks: list[Any], progress: TrainingProgress) -> list[Any]:
    """Isolate the trackers of transformers.integrations; return other callbacks unchanged."""
    return [
        SafeTracker(c, progress.note) if "integrations" in type(c).__module__ else c
        for c in callbacks
    ]


def pad_token_id(tokenizer: Any) -> int:
    """An id for padding; labels are masked by position, so it may be the end-of-turn token."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0):
        if candidate is not None:
            return int(candidate)
    raise AssertionError("unreachable: 0 is not None")
