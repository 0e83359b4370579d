"""Shard the frozen base over the ranks with torch's FSDP2, for models without fused layers.

Only the frozen weights of the decoder layers are sharded. Adapters stay complete on every rank, so
that the loss, checkpoints, resume and exports are those of a run without FSDP. Every rank gathers
each layer in the same order: a rank with fewer micro-batches runs ones without targets.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lorakit.data.batching import Batch, Layout, lay_out, step_batches, tokens_of
from lorakit.distributed.launch_env import launch_environment
from lorakit.distributed.process_group import DistributedContext
from lorakit.errors import RecipeError, RunError
from lorakit.model.base_class import text_decoder
from lorakit.recipe.loader import ResolvedRecipe, suggest
from lorakit.recipe.schema import Recipe
from lorakit.train.gradient_sync import partition_examples
from lorakit.train.loss import base_of
from lorakit.train.step_inputs import StepInputs
from lorakit.types import Device

DEFAULTS = {"reshard_after_forward": True, "cpu_offload": False}
_REASONS = {
    "activation_checkpointing": "gradient_checkpointing decides it",
    "activation_checkpointing_offload": "gradient_checkpointing decides it",
    "auto_wrap_policy": "decoder layers are sharded one by one",
    "min_num_params": "decoder layers are sharded one by one",
    "mixed_precision_policy": "dtype decides it",
    "state_dict_type": "adapters are saved as on one GPU",
    "transformer_layer_cls_to_wrap": "decoder layers are sharded one by one",
    "version": "it is always FSDP2",
}
DEEPSPEED = (
    "DeepSpeed's engine owns backward pass, clipping and optimizer step, which lorakit needs for "
    "retried and skipped steps and exact checkpoints"
)
# Other ways of accelerate to change a run: variable, value that leaves it off, reason.
_REFUSED = (
    ("ACCELERATE_USE_DEEPSPEED", "false", DEEPSPEED),
    ("ACCELERATE_USE_MEGATRON_LM", "false", "lorakit trains transformers' models"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "false", "every rank computes complete rows"),
    ("ACCELERATE_DYNAMO_BACKEND", "no", "fused_layers decides how layers are compiled"),
)


def with_launcher_settings(resolved: ResolvedRecipe) -> ResolvedRecipe:
    """Take `fsdp` from the options of `accelerate launch`; refuse what lorakit cannot do.

    Raises:
        RunError: an option that has no place in lorakit's step, or contradicts the recipe.
    """
    if not launch_environment():
        return resolved
    for name, off, reason in _REFUSED:
        if os.environ.get(name, off).lower() not in (off, ""):
            raise RunError(
                f"{name}={os.environ[name]} of accelerate launch is not supported: {reason}",
                hint="start with torchrun or accelerate launch --multi_gpu; fsdp shards the base",
            )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return resolved
    found = {
        "reshard_after_forward": _flag("FSDP_RESHARD_AFTER_FORWARD", True),
        "cpu_offload": _flag("FSDP_OFFLOAD_PARAMS", False),
    }
    if os.environ.get("FSDP_VERSION", "2") != "2":
        raise RunError("accelerate launch asks for FSDP 1", hint="set --fsdp_version 2")
    if _flag("FSDP_ACTIVATION_CHECKPOINTING", False):
        raise RunError(
            "fsdp_activation_checkpointing of accelerate launch: gradient_checkpointing of the "
            "recipe decides it",
            hint="turn it off, and set gradient_checkpointing: true",
        )
    given = resolved.recipe.fsdp
    if given is not None and {**DEFAULTS, **given} != found:
        raise RunError(
            f"fsdp has two sources: the recipe has {given}, accelerate launch {found}",
            hint="leave fsdp out of the recipe, or start with torchrun",
        )
    return resolved.derive("accelerate launch", fsdp=found)


def _flag(name: str, default: bool) -> bool:
    text = os.environ.get(name, str(default)).lower()
    return text in ("1", "true", "yes", "full_shard")


def check_launch(recipe: Recipe, device: Device) -> None:
    """Refuse settings that contradict FSDP, or the precision of `accelerate launch`.

    Raises:
        RecipeError: names the setting.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    names = {"no": device.dtype, "bf16": "bfloat16", "fp16": "float16"}
    if launch_environment() and names.get(asked, asked) != device.dtype:
        raise RecipeError(
            f"dtype has two sources: it is {device.dtype} in this run, and accelerate launch has "
            f"mixed_precision {asked}",
            hint="start with --mixed_precision no, or set dtype",
        )
    if recipe.fsdp is None:
        return
    for key, value in recipe.fsdp.items():
        if key not in DEFAULTS:
            why = _REASONS.get(key) or f"unknown field{suggest(key, [*DEFAULTS, *_REASONS])}"
            raise RecipeError(f"fsdp: {key}: {why}", hint=f"fields: {', '.join(DEFAULTS)}")
        if not isinstance(value, bool):
            raise RecipeError(f"fsdp: {key}: expected true or false (found: {value!r})")
    if device.ranks == 1:
        raise RecipeError(
            "fsdp shards the base over several ranks, and this run has one",
            hint="start with --gpus N, torchrun or accelerate launch, or leave fsdp out",
        )
    if recipe.method == "qlora":
        raise RecipeError(
            "fsdp: method: qlora is not supported: the packed 4-bit weights are bytes, which FSDP2 "
            "does not shard",
            hint="set sharding: on for a family with fused layers, or method: lora",
        )
    for key in ("fused_layers", "sharding", "weight_offload"):
        if getattr(recipe, key) == "on":
            raise RecipeError(
                f"fsdp and {key}: on both decide where the base is", hint="keep one of them"
            )
    if recipe.fsdp.get("cpu_offload") and device.kind == "cpu":
        raise RecipeError("fsdp: cpu_offload has no effect on a CPU", hint="leave it out")


def shard_base(model: Any, settings: Mapping[str, bool], device: Device) -> None:
    """Shard the frozen weights of the decoder layers over all ranks, in place.

    Everything else is moved to the device. All ranks call this, and each forward pass, together.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    chosen = {**DEFAULTS, **settings}
    mesh = init_device_mesh(device.kind, (device.ranks,))
    base, decoder = base_of(model), text_decoder(base_of(model))
    layers = [
        module
        for module in decoder.modules()
        if type(module).__name__ in set(base._no_split_modules or ())
    ]
    if not layers:
        raise RecipeError(
            f"fsdp: {type(base).__name__} does not name its decoder layers (_no_split_modules)",
            hint="leave fsdp out",
        )
    inside = {id(p): p for layer in layers for p in layer.parameters() if not p.requires_grad}
    ignored = {p for p in base.parameters() if id(p) not in inside}
    # Parameters of other places and buffers, which FSDP leaves where they are.
    target = torch.device(device.kind)
    for tensor in (*ignored, *base.buffers()):
        tensor.data = tensor.data.to(target)
    for module in [*layers, decoder]:
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=chosen["reshard_after_forward"],
            offload_policy=CPUOffloadPolicy() if chosen["cpu_offload"] else OffloadPolicy(),
            ignored_params=ignored,
        )


def with_equal_micro_batches(
    ready: StepInputs, layout: Layout, ranks: DistributedContext
) -> StepInputs:
    """Add micro-batches without targets, so that every rank runs as many forward passes."""
    lengths = [tokens_of(example) for example in ready.examples]
    counts = [
        len(step_batches([ready.examples[i] for i in part], layout).micro)
        for part in partition_examples(lengths, ranks.world_size)
    ]
    shortest = min(ready.examples, key=tokens_of)
    missing = max(counts) - counts[ranks.rank]
    idle = [_without_targets(lay_out([shortest], replace(layout, packed=False)))] * missing
    return replace(ready, own=replace(ready.own, micro=[*ready.own.micro, *idle]))


def _without_targets(batch: Batch) -> Batch:
    about_targets = ("positions", "targets", "sequence", "counts", "reference", "good")
    return {k: v[:0] if k in about_targets else v for k, v in batch.items()}
