"""A recipe and a model's config enter; a MemoryPlan leaves: bytes per part, without any weights.

Shapes come from the model built on the meta device, so every architecture transformers knows is
counted exactly. Weights, adapters, gradients and optimizer are arithmetic; what layers keep for
backward is counted tensor by tensor for the engine, and estimated for a model's own layers. Of
several GPUs the plan is that of one: its part of each step, and of the base where that is spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lorakit.hardware import CUDA_CONTEXT_BYTES
from lorakit.model.architectures import FAST_FAMILIES
from lorakit.model.param_counts import lora_target_layers
from lorakit.planning.placement import check_placement, placement_candidates
from lorakit.planning.rank_workload import RankWorkload
from lorakit.recipe.schema import Recipe
from lorakit.types import OPTIMIZER_BYTES, Device, MemoryPlan, Placement

# Left free of a whole device, for other programs too (a desktop takes 0.3 to 1 GiB); and within
# memory_limit on a GPU, for gaps between torch's blocks: 176 MiB of 15 GiB, 79 of 4 on an H200.
RESERVE_OF_DEVICE, RESERVE_OF_LIMIT, LEAST_RESERVE_BYTES = 0.05, 0.015, 96 * 1024**2

# NCCL's own: a process of two H100 took so much more than one alone (scale_lora-*.json).
NCCL_BYTES = 780 * 1024**2


def plan_memory(recipe: Recipe, config: Any, device: Device) -> MemoryPlan:
    """Predict the peak of a training run on `device`, and choose what is recomputed to make it fit.

    Args:
        recipe: with `target_modules` resolved. `gradient_checkpointing` false keeps everything,
            true keeps each layer's input alone, `auto` recomputes as little as the budget allows.
        config: the transformers config of the base model.
        device: where it will run; its memory, or the recipe's `memory_limit`, is the budget of
            each rank.

    Raises:
        RecipeError: `weight_offload: on` or `sharding: on` where it cannot be had.
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


def plan_of(
    recipe: Recipe, config: Any, device: Device, keep: Sequence[int], placement: Placement
) -> MemoryPlan:
    """The bytes of a choice made already, as a result carries it."""
    sizes = RankWorkload.of(recipe, config, device)
    plan = _planned(sizes, tuple(keep), placement, device)
    return replace(plan, fits=plan.total_bytes <= device.rank_bytes)


def budget_of(recipe: Recipe, device: Device) -> int:
    """Bytes that one rank may plan for."""
    limit = recipe.memory_limit_bytes
    if limit is None:
        return int((1 - RESERVE_OF_DEVICE) * device.rank_bytes)
    if device.kind != "cuda":
        return limit
    return limit - max(int(RESERVE_OF_LIMIT * limit), LEAST_RESERVE_BYTES)


def reserve_note(recipe: Recipe, device: Device, plan: MemoryPlan) -> str:
    """Says how much stays free, where nothing but that keeps the plan from fitting."""
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


def _fill(placement: Placement, sizes: RankWorkload, room: int) -> Placement:
    """Keep on the card the inputs of as many layers as there is room for."""
    if not placement.layerwise:
        return placement
    count = (room + _under_way(sizes, placement)) // sizes.inputs_bytes
    return replace(placement, inputs_on_gpu=min(sizes.layers, count))


def _engine(sizes: RankWorkload) -> bool:
    return engine_supported(sizes.recipe, sizes.config, sizes.fast)


def engine_supported(recipe: Recipe, config: Any, fast: bool) -> bool:
    """Whether the fast layers are likely to serve; `attach_engine` decides on the real model.

    Args:
        config: of the text model.
        fast: the device is a card with kernels, where `auto` takes them.
    """
    asked = fast or "on" in (recipe.fused_layers, recipe.weight_offload, recipe.sharding)
    plain = not recipe.use_dora and recipe.bias == "none"
    return asked and recipe.fused_layers != "off" and plain and config.model_type in FAST_FAMILIES


def _fixed_parts(sizes: RankWorkload, placement: Placement, engine: bool) -> dict[str, int]:
    """What stands in memory all the time."""
    recipe, width = sizes.recipe, sizes.width
    embedding = _embedding(sizes) if placement.embedding_on_host else 0
    layers, two_layers = sizes.layers, 2 * sizes.frozen_bytes // sizes.layers
    own = -(-sizes.frozen_bytes // placement.shards)
    parts = {
        "frozen weights": two_layers if placement.base_on_host else own,
        "embeddings, head and norms": int((sizes.non_linear_params - embedding) * width),
    }
    if placement.shards > 1:
        parts["two layers, gathered"] = two_layers
    if sizes.counted.experts:
        # Raw tensors, which bitsandbytes 0.50 leaves as they are: no NF4 for them.
        parts["experts (not quantized)"] = sizes.counted.experts * width
    if placement.adapters_on_host:
        # Two layers' values and gradients come and go.
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


def _adapter_parts(sizes: RankWorkload) -> dict[str, int]:
    return {
        "adapters (float32)": sizes.adapter * 4,
        "gradients (float32)": sizes.adapter * 4,  # with several ranks summed where they lie
        "optimizer state": int(sizes.adapter * OPTIMIZER_BYTES[sizes.recipe.optimizer]),
    }


def _host_parts(sizes: RankWorkload, placement: Placement) -> dict[str, int]:
    """What lies in host memory instead of the card's."""
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
    """Inputs of the micro-batch at work and of two that come (`layer_inputs.UNDER_WAY`)."""
    return 3 * _micro_tokens(sizes, placement) * int(sizes.config.hidden_size) * sizes.width


def _layerwise_parts(sizes: RankWorkload, placement: Placement) -> dict[str, int]:
    """What a step needs that goes layer by layer through all its micro-batches."""
    model, qkv, out, inner = _widths(sizes)
    micro = _micro_tokens(sizes, placement)
    chunk = min(placement.tokens_at_once, micro)
    rank, width = sizes.recipe.lora_r, sizes.width
    keys = getattr(sizes.config, "num_key_value_heads", None) or sizes.config.num_attention_heads
    share = min(1.0, placement.heads_at_once / keys)
    # Throughout the way down: qkv, attention's output and its gradient, for all tokens.
    standing = (qkv + 2 * out + 3 * rank + _normed(sizes)) * width
    # Then either the products of one chunk, or attention's gradients of one group of heads.
    products = (6 * inner + 2 * model + 3 * rank) * width
    attention = share * (2 * qkv * width + 4 * out)
    head = min(chunk * 4 * model * 4 + _logits_bytes(sizes, True), chunk * 64 * model)
    return {
        "hidden states of a step": sizes.inputs_bytes,
        # Those under way need room only once the kept ones are used up.
        "inputs of layers": max(
            _under_way(sizes, placement), placement.inputs_on_gpu * sizes.inputs_bytes
        ),
        "work of one layer, or the loss": int(
            max(micro * standing + max(chunk * products, micro * attention), head)
        ),
    }


def _working_parts(sizes: RankWorkload, keep: tuple[int, ...], engine: bool) -> dict[str, int]:
    """What a micro-batch needs: activations kept, and one layer's work or the loss."""
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
    """Numbers a token of queries and keys after norms of their own, beside those before (Qwen3)."""
    _, qkv, out, _ = _widths(sizes)
    return (qkv + out) // 2 if str(sizes.config.model_type).startswith("qwen3") else 0


def _kept_bytes(sizes: RankWorkload, level: int) -> float:
    """Bytes one layer of the engine keeps for a token, by level; see `fast_layer.Keep`."""
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
    """Bytes a token needs while one layer goes backward, beyond what was kept."""
    model, qkv, out, inner = _widths(sizes)
    numbers = 4 * model + 4 * inner  # dh, h and d(gate/up) beside residual gradients and norms
    if level >= 1:
        numbers += 2 * inner
    if level >= 2:
        numbers += qkv + out + _normed(sizes)
    return numbers * sizes.width


def _own_activation_bytes(sizes: RankWorkload, recompute: bool) -> float:
    """Bytes a model's own layers save for backward per token.

    Without recomputation a layer keeps, per target, its input after dropout and the mask, and per
    layer the norms' inputs and outputs, q, k, v, the attention output, gate and up. With it only
    the layer's input is kept, plus the working set of one layer.
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
    """Logits of one chunk; with a frozen plain head they become their own gradient."""
    from lorakit.ops.cross_entropy import LOGITS_BYTES

    float32 = min(LOGITS_BYTES, sizes.tokens * sizes.config.vocab_size * 4)
    if not engine:
        return float32 * 3
    hidden = 2 * sizes.tokens * sizes.config.hidden_size * sizes.width
    return float32 * sizes.width // 4 + hidden
