"""Plan the memory of a training run from a recipe, a config and a device.

The engine's layers are planned in `planning/memory.py`. For a model's own layers, as in every CPU
run, `planning/activations.py` counts the activations; on a CPU the complete process is planned,
libraries included.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lorakit.engine.cuda_graphs import TOKENS_STEP
from lorakit.model.param_counts import count
from lorakit.planning.activations import simulate
from lorakit.planning.memory import budget_of, engine_supported, plan_memory
from lorakit.planning.rank_workload import examples_of_rank
from lorakit.recipe.schema import Recipe
from lorakit.types import Device, MemoryPlan

# Parts of `planning/memory.py` that the simulation replaces.
EXPERTS = ("experts (NF4)", "experts (not quantized)")
ESTIMATED = ("activations (estimate)", "logits of one chunk")

# Resident after the imports of a run: torch 2.13 for CPU, transformers, peft, trl, bitsandbytes.
LIBRARIES_BYTES = 610 * 1024**2
# Memory that malloc holds on a CPU beyond the tensors, as a share of all layers' activations, with
# and without recomputation: torch's aligned blocks do not fit into freed blocks of the same size
# (glibc 2.36). Mapping every block instead (MALLOC_MMAP_THRESHOLD_) halved the speed.
HEAP_GAPS, HEAP_GAPS_RECOMPUTED = 0.40, 0.35


def plan_training(recipe: Recipe, config: Any, device: Device) -> MemoryPlan:
    """Predict the peak of a training run on `device`, and what is recomputed to make it fit.

    Args:
        recipe: with `target_modules` resolved.
        config: the transformers config of the base model.
        device: where it will run; its memory, or the recipe's `memory_limit`, is the budget.
    """
    recipe = in_sequences(recipe)
    if recipe.weight_offload == "on" and streams_experts(recipe, config, device):
        return _streamed_experts(recipe, config, device)
    requested = "on" in (recipe.weight_offload, recipe.sharding)
    if requested or engine_supported(recipe, config.get_text_config(), device.fast):
        plan = plan_memory(recipe, config, device)
        return (
            plan
            if device.kind == "cuda"
            else _with_parts(plan, _process(plan.parts), recipe, device)
        )
    chosen = recipe.gradient_checkpointing
    if chosen != "auto":
        return _own_layers(recipe, config, device, chosen)
    kept = _own_layers(recipe, config, device, recompute=False)
    return kept if kept.fits else _recomputed(recipe, config, device)


def in_sequences(recipe: Recipe) -> Recipe:
    """The recipe whose examples are the sequences of its pairs."""
    rows = recipe.micro_batch_size * recipe.sequences
    return recipe.model_copy(update={"micro_batch_size": rows, "objective": "sft"})


def _recomputed(recipe: Recipe, config: Any, device: Device) -> MemoryPlan:
    """Recompute all layers; if a GPU without kernels cannot hold it, stream the engine's layers."""
    recomputed = _own_layers(recipe, config, device, recompute=True)
    streamed = recipe.model_copy(update={"weight_offload": "on"})
    if recomputed.fits or device.kind != "cuda" or recipe.weight_offload == "off":
        return recomputed
    if streams_experts(recipe, config, device):
        return _streamed_experts(recipe, config, device)
    served = engine_supported(streamed, config.get_text_config(), device.fast)
    whole = recipe.modules_to_save is not None or bool(recipe.trainable_tokens)
    if not served or whole or recipe.sharding == "on":
        return recomputed
    plan = plan_memory(streamed, config, device)
    return plan if plan.fits else recomputed


def streams_experts(recipe: Recipe, config: Any, device: Device) -> bool:
    """True if a run can keep its experts in host memory: a mixture on its own layers."""
    text = config.get_text_config()
    served = engine_supported(recipe, text, device.fast) or recipe.fsdp is not None
    return bool(count(config).grouped_experts) and not served and recipe.sharding != "on"


def _streamed_experts(recipe: Recipe, config: Any, device: Device) -> MemoryPlan:
    """Plan all layers recomputed, with the experts of two layers in the device's memory."""
    alone = recipe.model_copy(update={"weight_offload": "off"})
    plan = _own_layers(alone, config, device, recompute=True)
    parts, weights = dict(plan.parts), count(config).expert_weights
    held = sum(parts.pop(name, 0) for name in EXPERTS)
    layers = len({weight.name.rpartition(".")[0] for weight in weights})
    parts["experts of two layers"] = 2 * -(-held // layers)
    plan = replace(plan, placement=replace(plan.placement, experts_on_host=True))
    host = {**plan.host_parts, "experts": held}
    return _with_parts(replace(plan, host_parts=host), parts, recipe, device)


def plan_for_data(
    recipe: Recipe, config: Any, device: Device, longest: int
) -> tuple[Recipe, MemoryPlan]:
    """Plan a run on the data at hand, with rows as long as these examples get.

    Short examples do not fill a micro-batch: one of 8,192 tokens gets 1,120 from 16 examples of 70,
    and a 7B model's layers then need no recomputation on a T4.

    Args:
        longest: tokens of the longest example.

    Returns:
        (recipe with the shortened `cutoff_len`, plan).
    """
    short = longest_rows(recipe, longest, device)
    plan = plan_training(short, config, device)
    if plan.placement.layerwise:  # divides its micro-batches by `cutoff_len`
        short, plan = recipe, plan_training(recipe, config, device)
    return short, plan


def longest_rows(recipe: Recipe, longest: int, device: Device) -> Recipe:
    """Shorten `cutoff_len` to the longest micro-batch row that the data at hand can produce.

    Packed rows are filled with the examples of one optimizer step, and padded to the sizes of CUDA
    graphs on a GPU.
    """
    if longest < 1:
        return recipe
    micros = -(-examples_of_rank(recipe, device.ranks) // recipe.micro_batch_size)
    step = TOKENS_STEP if device.kind == "cuda" else 1
    length = -(-longest * (micros if recipe.packing else 1) // step) * step
    return recipe.model_copy(update={"cutoff_len": min(recipe.cutoff_len, max(8, length))})


def _own_layers(recipe: Recipe, config: Any, device: Device, recompute: bool) -> MemoryPlan:
    unfused = recipe.model_copy(update={"fused_layers": "off", "gradient_checkpointing": recompute})
    rows = min(recipe.micro_batch_size, examples_of_rank(recipe, device.ranks))
    micro = unfused.model_copy(update={"micro_batch_size": rows})
    plan = plan_memory(unfused, config, device)
    parts = dict(plan.parts)
    counted = simulate(micro, config, device, recompute)
    if counted is not None:
        for name in ESTIMATED:
            parts.pop(name)
        parts["activations kept for backward"] = counted.kept
        parts["work of one layer, or the loss"] = counted.work
    if device.kind != "cuda":
        layers = simulate(micro, config, device, recompute=False)
        if layers is not None:
            parts["gaps in the heap"] = int(
                (HEAP_GAPS_RECOMPUTED if recompute else HEAP_GAPS) * layers.in_heap
            )
        parts = _process(parts)
    return _with_parts(plan, parts, recipe, device)


def _with_parts(
    plan: MemoryPlan, parts: dict[str, int], recipe: Recipe, device: Device
) -> MemoryPlan:
    return replace(plan, parts=parts, fits=sum(parts.values()) <= budget_of(recipe, device))


def _process(parts: dict[str, int]) -> dict[str, int]:
    """Add the memory of Python and the libraries, which a run on the host shares."""
    return {**parts, "Python and libraries": LIBRARIES_BYTES}
