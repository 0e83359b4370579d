"""A PEFT model and examples enter; trained adapter weights, checkpoints and metrics leave.

TRL's SFTTrainer, with five things of our own: rows arrive tokenized and masked and are touched by
nothing after, a step's examples are laid out in micro-batches here, the loss covers supervised
tokens and weighs tokens (not micro-batches), adapters stay float32, and checkpoints are whole or
absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback
from transformers.trainer_callback import ExportableState, TrainerState
from trl import SFTTrainer

from lorakit.data.batch import Batch, Layout, StepBatch, step_batches
from lorakit.data.pack import packing_words, saved_share
from lorakit.data.shelf import lengths_of
from lorakit.durable import staged
from lorakit.model.chunked_layer import Cut
from lorakit.model.fast_layer import Keep
from lorakit.ops.backend import has_kernels
from lorakit.recipe import Recipe
from lorakit.records import Device, Example, MemoryPlan
from lorakit.run_dir import RunDir
from lorakit.train.arguments import total_steps, training_arguments
from lorakit.train.callbacks import Reporter, Stopper
from lorakit.train.checkpoint import (
    checkpoint_bytes,
    checkpoint_step,
    rotate,
    save_adapter_files,
)
from lorakit.train.graphs import GraphedMicroSteps, to_bucket
from lorakit.train.layer_major import LayerMajor
from lorakit.train.loss import Attached, attach_loss, base_of, detach_loss
from lorakit.train.progress import TrainingProgress
from lorakit.train.save_clock import SaveClock
from lorakit.train.score import score
from lorakit.train.signals import StopRequest
from lorakit.train.state import (
    load_adapter,
    load_state,
    random_state,
    restore_random,
    restore_schedule,
    save_state,
)


class LoraTrainer(SFTTrainer):
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
        past: Mapping[str, Any] | None = None,
    ) -> None:
        self.run, self.recipe, self.val, self.plan = run, recipe, val, plan
        self.past, self.loaded = past, dict[str, Any]()
        self.pad_id = pad_token_id(tokenizer)
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
            data_collator=lambda rows: {
                "step": step_batches([train[r["index"]] for r in rows], self.layout)
            },
            callbacks=[Reporter(self, progress), Stopper(stop)],
        )
        self.remove_callback(PrinterCallback)
        if recipe.save_minutes is not None:
            self.add_callback(SaveClock(recipe.save_minutes))
        self.diverged_at: int | None = None
        for name, parameter in self.model.named_parameters():
            if name in masters:
                parameter.data = masters[name]
        self.accelerator.device_placement = False  # parts may lie on the host on purpose
        where = torch.device(device.kind)
        self.attached = attach_loss(self.model, recipe.engine, where, plan.placement)
        recompute(self.model, self.attached, plan)
        packed, self.packing = self._packing(train, device)
        rows = recipe.micro_batch_size
        if plan.placement.layer_major:
            rows = max(1, plan.placement.tokens_at_once // recipe.cutoff_len)
        self.layout: Layout = Layout(
            pad_id=self.pad_id, rows=rows, capacity=rows * recipe.cutoff_len, packed=packed
        )
        self.step_tokens = 0
        self.graphs = self._graphed()
        self.layer_major = self._layer_major()

    def training_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """Forward and backward of all micro-batches of one optimizer step; its mean loss.

        The loss is divided by the step's supervised tokens, so gradients of micro-batches just add
        up: they do not depend on how the examples were laid out.
        """
        model.train()
        step: StepBatch = inputs["step"]
        # DDP averages gradients over ranks: the count spans all, the factor undoes the mean.
        ranks = self.accelerator.num_processes
        scale = ranks / max(1, self._sum_over_ranks(step.supervised))
        self.step_tokens += step.tokens
        return self._step_gradients(model, step, scale)

    def _step_gradients(self, model: Any, step: StepBatch, scale: float) -> Tensor:
        """Add the gradients of the step's mean loss; returns that loss."""
        if self.layer_major is not None:
            return self.layer_major((self._to_device(micro) for micro in step.micro), scale)
        total = torch.zeros((), device=self.args.device)
        if self.graphs is not None:
            self.graphs.begin(scale)
            for micro in step.micro:
                total += self.graphs(self._to_device(to_bucket(micro)))
            return total
        for number, micro in enumerate(step.micro):
            last = number + 1 == len(step.micro)
            with nullcontext() if last else self.accelerator.no_sync(model):
                total += self._forward_backward(model, self._to_device(micro), scale)
        return total

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

    def graphs_in_words(self) -> str:
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
            or self.plan.placement.layer_major
            or not self.attached.frozen_head
            or self.args.fp16
            or self.accelerator.num_processes > 1
        ):
            return None
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not has_kernels(parameters[0]):
            return None
        return GraphedMicroSteps(
            lambda micro, scale: self._forward_backward(self.model, micro, scale),
            parameters,
            engine.groups,
        )

    def _layer_major(self) -> LayerMajor | None:
        """The schedule by layers, where the plan asks for it."""
        placement, engine = self.plan.placement, self.attached.engine
        if not placement.layer_major or engine is None:
            return None
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        cut = Cut(placement.tokens_at_once, placement.heads_at_once)
        return LayerMajor(engine, self.attached.head, parameters, cut, placement.inputs_on_card)

    def _sum_over_ranks(self, count: int) -> int:
        if self.accelerator.num_processes == 1:
            return count
        return int(self.accelerator.reduce(torch.tensor(count, device=self.args.device)))

    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        """Token-weighted held-out loss, by the same code as `lorakit eval`."""
        result = score(self.model, self.val, self.pad_id)
        metrics = {"eval_loss": result.loss, "eval_perplexity": result.perplexity}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def take_steps(self, checkpoint: str | None) -> None:
        """Train to the end, from a checkpoint on; one of the last step is loaded and no more.

        transformers would take a step beyond the last one.
        """
        folder = Path(checkpoint) if checkpoint else None
        if folder is None or checkpoint_step(folder) < self.args.max_steps:
            self.train(resume_from_checkpoint=checkpoint)
            return
        self._load_from_checkpoint(str(folder))
        self.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, weights = self.state.global_step, self.accelerator.unwrap_model(self.model)
        for part in [*self.callback_handler.callbacks, self.control]:
            if isinstance(part, ExportableState):
                self.state.stateful_callbacks[type(part).__name__] = part.state()
        facts = {"step": step, "steps": self.state.max_steps, "past": self.past}
        size = checkpoint_bytes(
            self.recipe, sum(p.numel() for p in weights.parameters() if p.requires_grad)
        )
        randoms = gather_object([random_state()])
        if self.args.should_save:
            with staged(self.run.checkpoint(step), facts, size) as folder:
                save_adapter_files(weights, folder, saves_embeddings(self.recipe))
                scaler = self.accelerator.scaler
                save_state(folder, self.optimizer, self.lr_scheduler, scaler, randoms)
                self.state.save_to_json(str(folder / "trainer_state.json"))
            rotate(self.run, self.recipe.keep_checkpoints, step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        engine = self.attached.engine
        if engine is not None and engine.host_adapters is not None:
            engine.host_adapters.rest()  # values and state are loaded where they live
        load_adapter(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))
        self.loaded = load_state(Path(resume_from_checkpoint))

    def _init_training_state(self, max_steps: int, *more: Any) -> Any:
        done = super()._init_training_state(max_steps, *more)
        # Intervals of saving, logging and scoring are the recipe's, not the checkpoint's.
        self.state.compute_steps(self.args, max_steps)
        return done

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.optimizer.load_state_dict(self.loaded.pop("optimizer"))
            restore_schedule(self.lr_scheduler, self.optimizer, self.loaded["scheduler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.loaded["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(self.loaded["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_random(self.loaded["random"][self.args.process_index])

    def close(self) -> Any:
        """The trained model with its own forward back, free of the trainer's wrapping."""
        detach_loss(self.model)
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)


def recompute(model: Any, attached: Attached, plan: MemoryPlan) -> None:
    """Let layers keep for backward what the plan says."""
    if attached.engine is not None:
        attached.engine.keep([Keep(level) for level in plan.keep])
    elif any(plan.keep):
        base_of(model).gradient_checkpointing_enable({"use_reentrant": False})


def pad_token_id(tokenizer: Any) -> int:
    """An id to pad with. Labels are masked by position, so it may even be the end-of-turn token."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0):
        if candidate is not None:
            return int(candidate)
    raise AssertionError("unreachable: 0 is not None")


def saves_embeddings(recipe: Recipe) -> bool:
    """True when an embedding or head trains, so that its weights must travel with the adapter."""
    names = (
        [recipe.target_modules] if isinstance(recipe.target_modules, str) else recipe.target_modules
    )
    return any(n in ("embed_tokens", "lm_head", "wte") for n in names)
