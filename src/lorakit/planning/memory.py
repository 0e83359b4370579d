"""Predict the bytes of a training step by part, without loading weights.

Shapes come from the model built on the meta device, so every architecture that transformers knows
is counted exactly. Weights, adapters, gradients and optimizer state are arithmetic; activations
kept for backward are counted tensor by tensor for the engine and estimated for a model's own
layers. With several GPUs the plan is that of one rank: its part of each step, and its shard of the
base.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lorakit.hardware import CUDA_CONTEXT_BYTES
from lorakit.model.architectures import FAST_FAMILIES
from lorakit.model.param_counts import lora_target_layers
from lorakit.planning.placement import check_placement, placement_candidates
from lorakit.planning.rank_workload import NF4_BYTES, RankWorkload
from lorakit.recipe.schema import Recipe
from lorakit.types import OPTIMIZER_BYTES, Device, MemoryPlan, Placement

# Left free of a complete device, for other programs too (a desktop takes 0.3 to 1 GiB); and within
# memory_limit on a GPU, for gaps between torch's blocks: 176 MiB of 15 GiB, 79 of 4 on an H200.
RESERVE_OF_DEVICE, RESERVE_OF_LIMIT, LEAST_RESERVE_BYTES = 0.05, 0.015, 96 * 1024**2

# NCCL's buffers: each of two H100 processes took this much more than one alone (scale_lora-*.json).
NCCL_BYTES = 780 * 1024**2


def plan_memory(recipe: Recipe, config: Any, device: Device) -> MemoryPlan:
    """Predict the peak of a training run on `device`, and choose what is recomputed to make it fit.

    Args:
        recipe: with `target_modules` resolved. `gradient_checkpointing` false keeps everything,
            true keeps only each layer's input, `auto` recomputes as little as the budget allows.
        config: the transformers config of the base model.
        device: where it will run; its memory, or the recipe's `memory_limit`, is the budget of
            each rank.

    Raises:
        RecipeError: `weight_offload: on` or `sharding: on` is not possible.
    """
    sizes = RankWorkload.of(recipe, config, device)
    engine = _engine(sizes)
    check_placement(sizes, engine)
    budget = budget_of(recipe, device)
    plan = None
    for keep, placement in placement_candidates(sizes, engine):
        plan = _planned(sizes, keep, placement, device)
        if plan.total_bytes <= budget:
            filled = _fill(placement, sizes, budget - plan.total_bytes)
            plan = replace(_planned(sizes, keep, filled, device), fits=True)
            break
    assert plan is not None
    return plan


def budget_of(recipe: Recipe, device: Device) -> int:
    """Bytes that one rank may use."""
    limit = recipe.memory_limit_bytes
    if limit is None:
        return int((1 - RESERVE_OF_DEVICE) * device.rank_bytes)
    if device.kind != "cuda":
        return limit
    return limit - max(int(RESERVE_OF_LIMIT * limit), LEAST_RESERVE_BYTES)


def reserve_note(recipe: Recipe, device: Device, plan: MemoryPlan) -> str:
    """Note the reserved bytes if only the reserve keeps the plan from fitting."""
    has = recipe.memory_limit_bytes or device.rank_bytes
    if plan.fits or plan.total_bytes > has:
        return ""
    return f", of which {(has - budget_of(recipe, device)) / 2**30:.1f} GiB stay free"


def _planned(
    sizes: RankWorkload, keep: tuple[int, ...], placement: Placement, device: Device
) -> MemoryPlan:
    engine = _engine(sizes)
    parts = _fixed_parts(sizes, placement, engine)
    if placement.layerwise:
        parts |= _layerwise_parts(sizes, placement)
    else:
        parts |= _working_parts(sizes, keep, engine)
    host = _host_parts(sizes, placement)
    return MemoryPlan(parts, device.rank_bytes, False, keep, placement, host, engine)


def _fill(placement: Placement, sizes: RankWorkload, free_bytes: int) -> Placement:
    """Keep the inputs of as many layers on the GPU as fit in the free bytes."""
    if not placement.layerwise:
        return placement
    count = (free_bytes + _under_way(sizes, placement)) // sizes.inputs_bytes
    return replace(placement, inputs_on_gpu=min(sizes.layers, count))


def _engine(sizes: RankWorkload) -> bool:
    return engine_supported(sizes.recipe, sizes.config, sizes.fast)


def engine_supported(recipe: Recipe, config: Any, fast: bool) -> bool:
    """True if the engine is likely to support the run; `attach_engine` decides on the real model.

    Args:
        config: of the text model.
        fast: the device is a GPU with kernels, on which `auto` selects the engine.
    """
    if recipe.fsdp is not None:
        return False
    requested = fast or "on" in (recipe.fused_layers, recipe.weight_offload, recipe.sharding)
    plain = not recipe.use_dora and recipe.bias == "none"
    return (
        requested and recipe.fused_layers != "off" and plain and config.model_type in FAST_FAMILIES
    )


def _fixed_parts(sizes: RankWorkload, placement: Placement, engine: bool) -> dict[str, int]:
    """Bytes that are resident during the complete run."""
    recipe, width = sizes.recipe, sizes.width
    embedding = _embedding(sizes) if placement.embedding_on_host else 0
    layers, two_layers = sizes.layers, 2 * sizes.frozen_bytes // sizes.layers
    shards = placement.shards if recipe.fsdp is None else sizes.ranks
    shard = -(-sizes.frozen_bytes // shards)
    parts = {
        "frozen weights": two_layers if placement.base_on_host else shard,
        "embeddings, head and norms": int((sizes.non_linear_params - embedding) * width),
    }
    if shards > 1:
        parts["two layers, gathered"] = two_layers
    parts |= expert_parts(sizes)
    if placement.adapters_on_host:
        # Values and gradients of two layers are double-buffered.
        parts["adapters and gradients of two layers"] = 4 * 4 * sizes.adapter // layers
    else:
        parts |= _adapter_parts(sizes)
    if engine:
        copies = sizes.adapter // layers if placement.adapters_on_host else sizes.adapter
        parts["adapters (copy in the base's type)"] = copies * width
        if recipe.method == "qlora":
            parts["one layer dequantized"] = sizes.linear // layers * width
    if sizes.cuda:
        parts["CUDA context"] = sizes.context_bytes or CUDA_CONTEXT_BYTES
    if sizes.cuda and sizes.ranks > 1:
        parts["NCCL buffers"] = NCCL_BYTES
    return parts


def expert_parts(sizes: RankWorkload) -> dict[str, int]:
    """Bytes of raw expert tensors: in NF4 with QLoRA, as far as their products are known."""
    counted = sizes.counted
    four_bit = counted.grouped_experts if sizes.recipe.method == "qlora" else 0
    parts = {}
    if four_bit:
        parts["experts (NF4)"] = int(four_bit * NF4_BYTES)
    if counted.experts > four_bit:
        parts["experts (not quantized)"] = (counted.experts - four_bit) * sizes.width
    return parts


def _adapter_parts(sizes: RankWorkload) -> dict[str, int]:
    return {
        "adapters (float32)": sizes.adapter * 4,
        "gradients (float32)": sizes.adapter * 4,  # summed over ranks in place
        "optimizer state": int(sizes.adapter * OPTIMIZER_BYTES[sizes.recipe.optimizer]),
    }


def _host_parts(sizes: RankWorkload, placement: Placement) -> dict[str, int]:
    """Bytes in host memory instead of GPU memory."""
    parts = {}
    if placement.base_on_host:
        parts["frozen weights"] = sizes.frozen_bytes
    if placement.adapters_on_host:
        parts |= _adapter_parts(sizes)
    if placement.embedding_on_host:
        parts["embedding"] = _embedding(sizes) * sizes.width
    if placement.layerwise:
        parts["inputs of layers"] = (sizes.layers - placement.inputs_on_gpu) * sizes.inputs_bytes
    return parts


def _embedding(sizes: RankWorkload) -> int:
    return int(sizes.config.vocab_size * sizes.config.hidden_size)


def _micro_tokens(sizes: RankWorkload, placement: Placement) -> int:
    rows = max(1, placement.tokens_at_once // sizes.recipe.cutoff_len)
    return min(rows * sizes.recipe.cutoff_len, sizes.step_tokens)


def _under_way(sizes: RankWorkload, placement: Placement) -> int:
    """Inputs of this micro-batch and two prefetched (`activation_offload.PREFETCH_DEPTH`)."""
    return 3 * _micro_tokens(sizes, placement) * int(sizes.config.hidden_size) * sizes.width


def _layerwise_parts(sizes: RankWorkload, placement: Placement) -> dict[str, int]:
    """Bytes of a layer-by-layer step over all its micro-batches."""
    model, qkv, out, inner = _widths(sizes)
    micro = _micro_tokens(sizes, placement)
    chunk = min(placement.tokens_at_once, micro)
    rank, width = sizes.recipe.lora_r, sizes.width
    keys = getattr(sizes.config, "num_key_value_heads", None) or sizes.config.num_attention_heads
    share = min(1.0, placement.heads_at_once / keys)
    # During the complete backward pass: qkv, attention's output and its gradient, for all tokens.
    standing = (qkv + 2 * out + 3 * rank + _normed(sizes)) * width
    # On top of that, the products of one chunk, or attention's gradients of one group of heads.
    products = (6 * inner + 2 * model + 3 * rank) * width
    attention = share * (2 * qkv * width + 4 * out)
    head = min(chunk * 4 * model * 4 + _logits_bytes(sizes, True), chunk * 64 * model)
    return {
        "hidden states of a step": sizes.inputs_bytes,
        # Prefetched inputs need memory only once the resident ones are used up.
        "inputs of layers": max(
            _under_way(sizes, placement), placement.inputs_on_gpu * sizes.inputs_bytes
        ),
        "work of one layer, or the loss": int(
            max(micro * standing + max(chunk * products, micro * attention), head)
        ),
    }


def _working_parts(sizes: RankWorkload, keep: tuple[int, ...], engine: bool) -> dict[str, int]:
    """Bytes of a micro-batch: kept activations, and the work of one layer or the loss."""
    tokens = sizes.tokens
    logits = _logits_bytes(sizes, engine)
    if not engine:
        kept = tokens * _own_activation_bytes(sizes, bool(keep[0]))
        return {"activations (estimate)": int(kept), "logits of one chunk": logits}
    kept = tokens * sum(_kept_bytes(sizes, level) for level in keep)
    work = tokens * max(_work_bytes(sizes, level) for level in keep)
    return {
        "activations kept for backward": int(kept),
        "work of one layer, or the loss": int(max(work, logits)),
    }


def _widths(sizes: RankWorkload) -> tuple[int, int, int, int]:
    """(model, q+k+v, attention output, inner) widths of one layer."""
    c = sizes.config
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    queries = head * c.num_attention_heads
    keys = head * (getattr(c, "num_key_value_heads", None) or c.num_attention_heads)
    return c.hidden_size, queries + 2 * keys, queries, c.intermediate_size


def _normed(sizes: RankWorkload) -> int:
    """Numbers per token of normed queries and keys, kept in addition to the raw ones (Qwen3)."""
    _, qkv, out, _ = _widths(sizes)
    return (qkv + out) // 2 if str(sizes.config.model_type).startswith("qwen3") else 0


def _kept_bytes(sizes: RankWorkload, level: int) -> float:
    """Bytes per token that one engine layer keeps, by level of `decoder_layer.SavedActivations`."""
    model, qkv, out, inner = _widths(sizes)
    rank = sizes.recipe.lora_r
    numbers = model + rank
    if level < 3:
        numbers += model + rank
    if level < 2:
        numbers += qkv + out + 3 * rank + _normed(sizes)
    if level < 1:
        numbers += 2 * inner + 2 * rank
    scalars = 8 + (4 * sizes.config.num_attention_heads if level < 2 else 0)
    return numbers * sizes.width + scalars


def _work_bytes(sizes: RankWorkload, level: int) -> float:
    """Bytes per token that the backward pass of one layer needs beyond the kept ones."""
    model, qkv, out, inner = _widths(sizes)
    numbers = 4 * model + 4 * inner  # dh, h, d(gate/up), residual gradients and norms
    if level >= 1:
        numbers += 2 * inner
    if level >= 2:
        numbers += qkv + out + _normed(sizes)
    return numbers * sizes.width


def _own_activation_bytes(sizes: RankWorkload, recompute: bool) -> float:
    """Bytes per token that a model's own layers save for backward.

    Without recomputation a layer keeps, per target, its input after dropout and the mask, and per
    layer the norms' inputs and outputs, q, k, v, the attention output, gate and up. With
    recomputation only the layer's input is kept, plus the working set of one layer.
    """
    layers, hidden, width = sizes.layers, sizes.config.hidden_size, sizes.width
    dropout = width + 1 if sizes.recipe.lora_dropout > 0 else 0
    inputs = sum(i for _, i, _ in lora_target_layers(sizes.recipe, sizes.counted)) / layers
    outputs = sum(o for _, _, o in sizes.shapes) / layers
    per_layer = inputs * dropout + outputs * width + 6 * hidden * width
    if recompute:
        return layers * hidden * width + 1.5 * per_layer
    return layers * per_layer


def _logits_bytes(sizes: RankWorkload, engine: bool) -> int:
    """Logits of one chunk; with a frozen plain head their gradient overwrites them."""
    from lorakit.ops.cross_entropy import LOGITS_BYTES

    float32 = min(LOGITS_BYTES, sizes.tokens * sizes.config.vocab_size * 4)
    if not engine:
        return float32 * 3
    hidden = 2 * sizes.tokens * sizes.config.hidden_size * sizes.width
    return float32 * sizes.width // 4 + hidden
