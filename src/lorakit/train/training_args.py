"""Convert a recipe and a device to TRL's SFTConfig."""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from typing import Any

from trl import SFTConfig

from lorakit.errors import DependencyError, RecipeError, first_line
from lorakit.recipe.aliases import TRAINING_KEYS
from lorakit.recipe.loader import suggest
from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import RunDir
from lorakit.train.best_step import TaskScorer, metric_direction
from lorakit.types import Device

# transformers' names, where they differ from ours.
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit"}
# Packages of optimizers: the name to import, and the name to install.
_PACKAGES = {
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free_adamw": ("schedulefree", "schedulefree"),
    "schedule_free_radam": ("schedulefree", "schedulefree"),
    "schedule_free_sgd": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
}
# Modules of trackers whose name differs.
_TRACKER_MODULES = {"azure_ml": "azureml"}
# Fields of SFTConfig that are passed on as they are, and if they change the steps of a run.
FORWARDED = {
    "adam_beta1": True,
    "adam_beta2": True,
    "adam_epsilon": True,
    "lr_scheduler_kwargs": True,
    "neftune_noise_alpha": True,
    "optim_args": True,
    "tf32": True,
    "eval_delay": False,
    "eval_on_start": False,
    "logging_first_step": False,
    "project": False,
    "run_name": False,
    "trackio_bucket_id": False,
    "trackio_space_id": False,
    "trackio_static_space_id": False,
}
_REASONS = {
    "activation_offloading": "weight_offload and the memory plan decide it",
    "assistant_only_loss": "train_on decides which tokens carry loss",
    "completion_only_loss": "train_on decides which tokens carry loss",
    "dataloader_num_workers": "batches are prepared while the device computes",
    "data_seed": "seed decides the order",
    "deepspeed": "its engine owns the optimizer step; fsdp shards the base",
    "eval_strategy": "eval_every decides it",
    "fsdp": "the key fsdp of the recipe decides it",
    "fsdp_config": "the key fsdp of the recipe decides it",
    "gradient_checkpointing_kwargs": "the memory plan decides what is recomputed",
    "hub_model_id": "lorakit export --to hub uploads, once it is verified",
    "label_smoothing_factor": "the loss is computed on the supervised tokens alone",
    "loss_type": "the loss is computed on the supervised tokens alone",
    "push_to_hub": "lorakit export --to hub uploads, once it is verified",
    "save_only_model": "a checkpoint without optimizer state cannot resume exactly",
    "save_strategy": "save_every decides it",
    "torch_compile": "fused_layers decides it",
    "use_liger_kernel": "fused_layers decides it",
}


def check_training_settings(
    recipe: Recipe, device: Device, steps: int, held_out: bool = True
) -> None:
    """Refuse settings that cannot work or have no effect in a run of `steps` steps.

    Args:
        held_out: rows are held out.

    Raises:
        RecipeError: an optimizer for other devices, a warm-up that outlasts the run, or a best step
            without held-out losses.
        DependencyError: a tracker is not installed.
    """
    if recipe.optimizer.endswith("8bit") and device.kind != "cuda":
        raise RecipeError(
            f"optimizer: {recipe.optimizer} needs a CUDA GPU, this run is on {device.kind}",
            hint="set optimizer: adamw",
        )
    _check_forwarded(recipe)
    _check_schedule(recipe, steps)
    module, package = _PACKAGES.get(recipe.optimizer, ("", ""))
    if module and importlib.util.find_spec(module) is None:
        raise DependencyError(
            f"optimizer: {recipe.optimizer}: the package is not installed",
            hint=f"pip install {package}, or set optimizer: adamw",
        )
    for tracker in recipe.report_to:
        if importlib.util.find_spec(_TRACKER_MODULES.get(tracker, tracker)) is None:
            raise DependencyError(
                f"report_to: {tracker}: the package is not installed",
                hint=f"pip install {tracker}, or take it out of report_to",
            )
    if recipe.compares_steps:
        _check_best_step(recipe, steps, held_out)
    if recipe.eval_every and recipe.objective == "grpo":
        raise RecipeError(
            f"eval_every: {recipe.eval_every} has no effect with objective: grpo, whose reward is "
            "measured at each step",
            hint="leave eval_every out; held-out prompts (val_size) are scored at the end",
        )
    if recipe.eval_every and not held_out:
        raise RecipeError(
            f"eval_every: {recipe.eval_every} has no effect, because no rows are held out",
            hint="set val_size or val_data, or leave eval_every out",
        )
    if recipe.eval_tasks and not recipe.eval_every:
        raise RecipeError(
            "eval_tasks: needs eval_every, the steps between scores",
            hint="set eval_every; `lorakit eval RUN --tasks ...` scores a finished run",
        )
    warmup = recipe.warmup_steps or 0
    if warmup and recipe.lr_scheduler == "constant":
        raise RecipeError(
            f"warmup_steps: {warmup} has no effect with lr_scheduler: constant",
            hint="set lr_scheduler: constant_with_warmup, or leave warmup_steps out",
        )
    if warmup >= max(steps, 1):
        raise RecipeError(
            f"warmup_steps: {warmup}, but the run has {steps} step{'s' * (steps != 1)}: the "
            f"learning rate would end at {(steps - 1) / warmup:.0%} of {recipe.learning_rate:g}",
            hint=f"set warmup_steps below {steps}, or raise epochs or max_steps",
        )


def _check_forwarded(recipe: Recipe) -> None:
    """Refuse fields that SFTConfig does not have, or that have no effect here."""
    known = [*TRAINING_KEYS, *(field.name for field in fields(SFTConfig))]
    faults = []
    for name in recipe.training_args:
        if name not in known:
            faults.append(f"{name}: SFTConfig has no such field{suggest(name, known)}")
        elif name not in FORWARDED:
            reason = _REASONS.get(name, "it has no effect on lorakit's training loop")
            faults.append(f"{name} is not passed on: {reason}")
    if faults:
        raise RecipeError(
            "\n".join(f"training_args: {fault}" for fault in faults),
            hint=f"fields that are passed on: {', '.join(FORWARDED)}",
        )
    if recipe.training_args.get("neftune_noise_alpha") and recipe.packing:
        raise RecipeError(
            "training_args: neftune_noise_alpha scales its noise by the tokens of a row, and "
            "packed rows have the tokens of several examples",
            hint="set packing: false",
        )


def _check_schedule(recipe: Recipe, steps: int) -> None:
    """Build the schedule once, so that missing or wrong arguments of it are found early."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.learning_rate)
    more = recipe.training_args.get("lr_scheduler_kwargs")
    if not isinstance(more, dict | None):
        raise RecipeError(f"training_args: lr_scheduler_kwargs: expected a mapping (found: {more})")
    try:
        get_scheduler(recipe.lr_scheduler, optimizer, recipe.warmup_of(steps), steps, more or {})
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"lr_scheduler: {recipe.lr_scheduler}: {first_line(error)}",
            hint="its arguments are set by training_args: {lr_scheduler_kwargs: {...}}",
        ) from error


def _check_best_step(recipe: Recipe, steps: int, held_out: bool) -> None:
    key = "early_stopping_patience" if recipe.early_stopping_patience else "load_best_model_at_end"
    if not held_out:
        raise RecipeError(
            f"{key} needs held-out rows, and this run has none",
            hint="set val_size or val_data",
        )
    if recipe.eval_every is None or recipe.eval_every >= steps:
        found = f"eval_every is {recipe.eval_every}" if recipe.eval_every else "none is asked for"
        raise RecipeError(
            f"{key} compares scores during training, but {found} in {steps} steps",
            hint=f"set eval_every below {steps}, such as {max(1, steps // 10)}",
        )


class NoDevicePlacementConfig(SFTConfig):
    """SFTConfig with which neither transformers nor accelerate move the model."""

    @property
    def place_model_on_device(self) -> bool:
        """False for every model."""
        return False

    @property
    def n_gpu(self) -> int:
        """At most 1: with several visible GPUs transformers would use DataParallel."""
        return min(1, super().n_gpu)


def training_arguments(
    recipe: Recipe,
    device: Device,
    run: RunDir,
    steps: int,
    held_out: bool = False,
    scorer: TaskScorer | None = None,
) -> NoDevicePlacementConfig:
    """Convert the recipe; override every TRL default that would change data or learning rate.

    Args:
        scorer: tasks whose metrics may choose the best step.
    """
    arguments: dict[str, Any] = {
        "output_dir": str(run.path),
        # One batch of the loader is one optimizer step; `training_step` splits it.
        "per_device_train_batch_size": recipe.rows_per_step,
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.lr_scheduler,
        "warmup_steps": recipe.warmup_of(steps),
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "optim": OPTIMIZERS.get(recipe.optimizer, recipe.optimizer),
        # On a CPU with native bf16 autocast reduces a SmolLM2 step from 1.42 s to 1.24 s.
        "bf16": device.kind in ("cuda", "cpu") and device.dtype == "bfloat16",
        "fp16": device.kind == "cuda" and device.dtype == "float16",
        "use_cpu": device.kind == "cpu",
        "gradient_checkpointing": False,  # ours, without TRL's conversions
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "logging_steps": recipe.log_every,
        "logging_nan_inf_filter": False,  # the default shows a NaN loss as 0.0
        "save_strategy": "steps",
        # For saving by the clock see `TimedCheckpoint`; the last step is always saved.
        "save_steps": steps if isinstance(recipe.save_every, str) else recipe.save_every,
        "eval_strategy": "steps" if recipe.eval_every and held_out else "no",
        "eval_steps": recipe.eval_every,
        # `load_best_step` loads it: transformers demands equal intervals of saving and scoring.
        "metric_for_best_model": recipe.metric_for_best_model if recipe.compares_steps else None,
        "greater_is_better": metric_direction(recipe, scorer),
        "report_to": list(recipe.report_to),
        "run_name": run.path.name,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": device.kind == "cuda",
        "max_length": None,
        "packing": False,
        # transformers' own: its mask does not fit batches of generation (an exception in
        # evaluation). `train/router_loss.py` computes the recipe's.
        "router_aux_loss_coef": 0.0,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    try:
        return NoDevicePlacementConfig(**{**arguments, **recipe.training_args})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"training_args: {first_line(error)}") from error
