"""A PEFT model and examples enter; trained adapter weights, checkpoints and metrics leave.

TRL's SFTTrainer, with six things of our own: rows arrive tokenized and masked and are touched by
nothing after, a step's examples are laid out in micro-batches here, the loss covers supervised
tokens and weighs tokens (not micro-batches), adapters stay float32, checkpoints are whole or
absent, and a step that memory does not hold or that is not finite leaves no trace.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback

from lorakit.data.batching import Batch, Layout, StepBatch, packing_words, saved_share, step_batches
from lorakit.data.dataset import lengths_of
from lorakit.distributed.process_group import SINGLE_PROCESS, DistributedContext
from lorakit.engine.chunked_layer import ChunkSize
from lorakit.engine.cuda_graphs import GraphedMicroSteps, to_bucket
from lorakit.engine.decoder_layer import SavedActivations
from lorakit.engine.layerwise import LayerwiseSchedule
from lorakit.engine.lora_linear import FlatGradients
from lorakit.errors import DataError, WorkError
from lorakit.hardware import MemoryCap
from lorakit.ops.backend import has_matrix_kernels
from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import RunDir
from lorakit.train.callbacks import MetricsCallback, SafeTracker, StopOnSignal, TimedCheckpoint
from lorakit.train.diagnostics import RunMonitor, planned_rate
from lorakit.train.eval_loss import BATCH_TOKENS, combined, not_finite, score
from lorakit.train.gradient_sync import GradientSync, local_examples
from lorakit.train.loss import AttachResult, attach_loss, base_of, detach_loss
from lorakit.train.oom import OomRetry, describe_oom, free_caches
from lorakit.train.progress import TrainingProgress
from lorakit.train.resumable_trainer import ResumableTrainer
from lorakit.train.signals import StopRequest
from lorakit.train.stability import StepGuard
from lorakit.train.training_args import total_steps, training_arguments
from lorakit.types import Device, EvalScore, Example, MemoryPlan


@dataclass(frozen=True, slots=True)
class StepInputs:
    """All examples of a step, and those of this rank laid out."""

    own: StepBatch
    examples: list[Example]
    tokens: int
    supervised: int


class LoraTrainer(ResumableTrainer):
    """SFTTrainer on examples that are ready: `train[i]` goes to the model as it is."""

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
    ) -> None:
        self.sync, self.ranks = GradientSync(ranks, stop), ranks
        self.run, self.recipe, self.train_rows, self.val, self.plan = run, recipe, train, val, plan
        self.progress = progress
        self.pad_id: int = pad_token_id(tokenizer)
        self.layout = first_layout(recipe, plan, self.pad_id)
        self.stability = StepGuard(self, progress.note)
        cap = MemoryCap(recipe.memory_limit_bytes, device)
        self.oom_retry = OomRetry(self, progress.note, cap)
        watch = RunMonitor(recipe, planned_rate(run), self._why_slow)
        self.fingerprint, self.loaded = fingerprint, dict[str, Any]()
        # SFTTrainer rounds the adapters of a 4-bit base to bf16; ours go back to what they were.
        masters = {n: p.data.clone() for n, p in model.named_parameters() if p.requires_grad}
        super().__init__(
            model=model,
            args=training_arguments(
                recipe, device, run, total_steps(recipe, len(train)), bool(val)
            ),
            processing_class=tokenizer,
            # The data set holds row numbers; examples are looked up when a step is made.
            train_dataset=Dataset.from_dict({"index": list(range(len(train)))}),
            eval_dataset=Dataset.from_dict({"index": list(range(len(val)))}) if val else None,
            data_collator=self._collate,
            callbacks=[
                self.stability,
                MetricsCallback(self, progress, watch),
                StopOnSignal(self.sync),
            ],
        )
        self.remove_callback(PrinterCallback)
        if recipe.save_minutes is not None:
            self.add_callback(TimedCheckpoint(recipe.save_minutes, self.sync.agree_to_save))
        self.callback_handler.callbacks = shelter(self.callback_handler.callbacks, progress)
        for name, parameter in self.model.named_parameters():
            if name in masters:
                parameter.data = masters[name]
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.accelerator.device_placement = False  # parts may lie on the host on purpose
        where = torch.device(device.kind)
        self.attached = attach_loss(self.model, recipe.fused_layers, where, plan.placement, ranks)
        recompute(self.model, self.attached, plan, recipe)
        packed, self.packing = self._packing(train, device)
        self.layout = replace(self.layout, packed=packed)
        self.step_tokens, self.eval_tokens = 0, BATCH_TOKENS
        self.to_probe = (
            device.kind == "cuda" if recipe.memory_probe == "auto" else recipe.memory_probe
        )
        self.graphs = self._graphed()
        self.layerwise = self._layerwise()
        self.flat = self._flat()

    def training_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """Forward and backward of all micro-batches of one optimizer step; its mean loss.

        The loss is divided by the step's supervised tokens, so gradients of micro-batches just add
        up: they do not depend on how the examples were laid out.
        """
        model.train()
        if self.to_probe:
            self.to_probe = False
            self.oom_retry.probe(model)
        ready: StepInputs = inputs["ready"]()
        loss = self.oom_retry.run(model, ready.own, 1 / max(1, ready.supervised))
        if self.ranks.world_size > 1:
            loss = self.sync.add(self._gradients(), loss)
        self.step_tokens += ready.tokens
        self.step_loss, self.step_examples = loss, ready.examples
        self.next_step()  # while the card computes: 4 ms for 8 rows of 2,048 tokens
        self.ranks.at(self.state.global_step + 1, self.last_checkpoint, self.run.path)
        # The log adds losses up; what is not finite is counted by the guard.
        return torch.where(torch.isfinite(loss), loss, 0.0)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """The gradient norm, known to be finite: else the step's gradients are dropped here.

        Raises:
            WorkError: the second step in short time that is not finite.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        scaled = self.accelerator.scaler is not None
        return self.stability.check(self.model, self.step_loss, norm, self.step_examples, scaled)

    def _step_gradients(self, model: Any, step: StepBatch, scale: float) -> Tensor:
        """Add the gradients of the step's mean loss; returns that loss."""
        if self.layerwise is not None:
            return self.layerwise((self._to_device(micro) for micro in step.micro), scale)
        total = torch.zeros((), device=self.args.device)
        if self.graphs is not None:
            self.graphs.begin(scale)
            for micro in step.micro:
                total += self.graphs(self._to_device(to_bucket(micro)))
            return total
        if self.flat is not None:
            self.flat.begin()
        for micro in step.micro:
            total += self._forward_backward(model, self._to_device(micro), scale)
        return total

    def _gradients(self) -> list[Tensor]:
        """The buffers that hold the step's gradients."""
        engine = self.attached.engine
        if engine is not None and engine.host_adapters is not None:
            return [room.bytes.view(torch.float32) for room in engine.host_adapters.grads]
        for part in (self.graphs, self.layerwise):
            if part is not None and part.gradients is not None:
                return [part.gradients.flat]
        assert self.flat is not None
        return [self.flat.flat]

    def _to_device(self, micro: Batch) -> Batch:
        """The micro-batch on the device; embedded here where the embedding lies on the host."""
        engine, device = self.attached.engine, self.args.device
        if engine is not None and engine.embedding_on_host:
            ids = micro["input_ids"]
            micro = {k: v for k, v in micro.items() if k != "input_ids"}
            micro["inputs_embeds"] = engine.embed_on_host(ids)
        return {
            k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v
            for k, v in micro.items()
        }

    def _forward_backward(self, model: Any, micro: Batch, scale: Any) -> Tensor:
        with self.compute_loss_context_manager():
            loss = model(**micro, use_cache=False).loss_sum * scale
        self.accelerator.backward(loss)
        return loss.detach()

    def describe_graphs(self) -> str:
        """Whether micro-batches run as CUDA graphs, and why not."""
        if self.graphs is None:
            return "no CUDA graphs"
        if self.graphs.failed:
            return f"no CUDA graphs: {self.graphs.failed}"
        return f"{len(self.graphs.graphs)} CUDA graphs"

    def _packing(self, train: Sequence[Example], device: Device) -> tuple[bool, str]:
        """Whether documents share micro-batches, and why."""
        rows, seed = self.recipe.micro_batch_size, self.recipe.seed
        share = saved_share(lengths_of(train), rows, seed)
        packed, words = packing_words(share, self.recipe.packing, device.kind == "cpu")
        if packed and not self.attached.packs:
            return False, self.attached.packing
        return packed, words

    def _graphed(self) -> GraphedMicroSteps | None:
        """Graphs where every part of a micro-batch runs on the card by fixed shapes."""
        engine = self.attached.engine
        if (
            engine is None
            or self.plan.placement.layerwise
            or not self.attached.frozen_head
            or self.args.fp16
        ):
            return None
        if not has_matrix_kernels(self.trained[0]) or engine.layers[0].qkv.dtype == torch.float32:
            # Packed documents in float32 attend one by one: as many shapes as there are steps.
            return None
        return GraphedMicroSteps(
            lambda micro, scale: self._forward_backward(self.model, micro, scale),
            self.trained,
            engine.groups,
        )

    def _layerwise(self) -> LayerwiseSchedule | None:
        """The schedule by layers, where the plan asks for it."""
        placement, engine = self.plan.placement, self.attached.engine
        if not placement.layerwise or engine is None:
            return None
        cut = ChunkSize(placement.tokens_at_once, placement.heads_at_once)
        return LayerwiseSchedule(
            engine, self.attached.head, self.trained, cut, placement.inputs_on_gpu
        )

    def _flat(self) -> FlatGradients | None:
        """One buffer to sum over the ranks, where no part above has one of its own."""
        if self.ranks.world_size == 1 or self.graphs is not None or self.layerwise is not None:
            return None
        groups = self.attached.engine.groups if self.attached.engine else []
        return FlatGradients(self.trained, groups)

    def reset_after_oom(self) -> None:
        """Forget what a broken step left: captured graphs and their memory, kept layer inputs."""
        if self.graphs is not None:
            self.graphs = self._graphed()
        if self.layerwise is not None:
            self.layerwise = self._layerwise()

    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        """Token-weighted held-out loss, by the same code as `lorakit eval`."""
        result = self.score(self.val)
        metrics = {"eval_loss": result.loss, "eval_perplexity": result.perplexity}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def score(self, examples: Sequence[Example]) -> EvalScore:
        """Held-out loss; batches become smaller, and stay so, where memory runs out."""
        own = examples if self.sharded else local_examples(examples, self.ranks)
        found = score(
            self.model, own, self.pad_id, self.eval_tokens, on_smaller=self._score_smaller
        )
        return found if self.sharded else combined(self.ranks.all_gather_object(found))

    def _score_smaller(self, tokens: int) -> None:
        self.eval_tokens = tokens
        self.progress.note(
            f"out of memory in evaluation; it goes on with {tokens:,} tokens a batch"
        )

    def rows_not_finite(self, examples: Sequence[Example]) -> list[Example]:
        """Those of a step's examples whose own loss is NaN or infinite."""
        own = examples if self.sharded else local_examples(examples, self.ranks)
        found = not_finite(self.model, own, self.pad_id)
        self.model.train()
        return (
            found if self.sharded else list(itertools.chain(*self.ranks.all_gather_object(found)))
        )

    @property
    def sharded(self) -> bool:
        """Every pass through the base is one of all ranks together."""
        return self.plan.placement.shards > 1

    def last_checkpoint(self) -> str:
        """Where one can go on from, in words."""
        kept = self.run.list_checkpoints()
        return f"{kept[-1].name} is the last checkpoint" if kept else "there is no checkpoint yet"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Rows for trackers and metrics.jsonl; skipped steps do not count in the mean loss."""
        if "loss" in logs:
            logs.update(self.stability.row(logs["loss"]))
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train to the end.

        Raises:
            WorkError: memory does not hold one example, the update or a save; or two steps in
                short time are not finite.
        """
        try:
            return super().train(*args, **kwargs)
        except Exception as error:
            trouble = describe_oom(error)
            if trouble is None:
                raise
            raise WorkError(
                f"out of memory after step {self.state.global_step}, in the update, a save or the "
                f"next batch: {trouble}; {self.last_checkpoint()}",
                hint="lower micro_batch_size or lora_r; adamw_8bit keeps less on a CUDA card",
            ) from error

    def _collate(self, rows: Sequence[dict[str, int]]) -> dict[str, Any]:
        """A step that is made ready at its first call; accelerate asks for it one step ahead."""
        self.next_step = functools.cache(functools.partial(self._ready, rows))
        return {"ready": self.next_step}

    def _ready(self, rows: Sequence[dict[str, int]]) -> StepInputs:
        """Raises:
        DataError: an example cannot be read.
        """
        examples = []
        for row in rows:
            try:
                examples.append(self.train_rows[row["index"]])
            except (OSError, ValueError, IndexError, KeyError) as error:
                raise DataError(
                    f"example {row['index'] + 1} of the prepared data cannot be read: {error}; "
                    f"{self.last_checkpoint()}",
                    hint="is the disk with the cache still there? go on with --resume, which "
                    "prepares it anew",
                ) from error
        return StepInputs(
            step_batches(local_examples(examples, self.ranks), self.layout),
            examples,
            sum(len(e.input_ids) for e in examples),
            sum(e.trained_tokens for e in examples),
        )

    def _why_slow(self) -> str:
        """The likeliest reason for few tokens/s."""
        if self.layerwise is not None:
            return "is the link to the card shared, or another program on this device (nvidia-smi)?"
        if self.layout.rows < self.recipe.micro_batch_size:
            return "micro-batches were made smaller when memory ran out"
        if self.graphs is not None and self.graphs.failed:
            return self.describe_graphs()
        if self.args.device.type == "cuda" and self.attached.engine is None:
            return f"the fast layers are off ({self.attached.layers})"
        if not self.layout.packed and self.recipe.micro_batch_size > 1:
            return f"is another program on this device? or is it padding (packing {self.packing})?"
        return "is another program on this device (nvidia-smi, top), or is it too hot?"

    def close(self) -> Any:
        """The trained model with its own forward back, free of the trainer's wrapping.

        Graphs, gradients and the optimizer's state are let go of first: an embedding may need the
        memory to return to the GPU.
        """
        self.graphs = self.layerwise = self.flat = None
        self.optimizer = self.lr_scheduler = None
        self.model.zero_grad(set_to_none=True)
        free_caches()
        detach_loss(self.model)
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)


def first_layout(recipe: Recipe, plan: MemoryPlan, pad_id: int) -> Layout:
    """Micro-batches as the recipe has them, or of so many tokens as the plan lets work at once."""
    rows = recipe.micro_batch_size
    if plan.placement.layerwise:
        rows = max(1, plan.placement.tokens_at_once // recipe.cutoff_len)
    return Layout(pad_id, rows, rows * recipe.cutoff_len, packed=False)


def recompute(model: Any, attached: AttachResult, plan: MemoryPlan, recipe: Recipe) -> None:
    """Let layers keep for backward what the plan says; nothing where it was not made for them."""
    if attached.engine is not None:
        attached.engine.set_checkpointing([SavedActivations(level) for level in plan.keep])
    elif any(plan.keep) or (plan.engine and recipe.gradient_checkpointing == "auto"):
        base_of(model).gradient_checkpointing_enable({"use_reentrant": False})


def shelter(callbacks: list[Any], progress: TrainingProgress) -> list[Any]:
    """Trackers behind a wall: those of transformers.integrations; all others as they are."""
    return [
        SafeTracker(c, progress.note) if "integrations" in type(c).__module__ else c
        for c in callbacks
    ]


def pad_token_id(tokenizer: Any) -> int:
    """An id to pad with. Labels are masked by position, so it may even be the end-of-turn token."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0):
        if candidate is not None:
            return int(candidate)
    raise AssertionError("unreachable: 0 is not None")
