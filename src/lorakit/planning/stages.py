"""Bytes per part around training: evaluation, generation, merging, host RAM and disk."""

from __future__ import annotations

from typing import Any

from lorakit.model.param_counts import count, count_trainable
from lorakit.ops.cross_entropy import LOGITS_BYTES
from lorakit.planning.planner import LIBRARIES_BYTES
from lorakit.planning.rank_workload import BYTES, NF4_BYTES
from lorakit.recipe.schema import Recipe
from lorakit.train.eval_loss import BATCH_TOKENS
from lorakit.types import OPTIMIZER_BYTES, Device, MemoryPlan

Parts = dict[str, int]

# Parts that stay in the device's memory in every stage.
RESIDENT_PARTS = {
    "frozen weights",
    "two layers, gathered",
    "embeddings, head and norms",
    "experts (NF4)",
    "experts (not quantized)",
    "experts of two layers",
    "adapters (float32)",
    "adapters (copy in the base's type)",
    "one layer dequantized",
    "CUDA context",
    "NCCL buffers",
    "Python and libraries",
}
# `lorakit eval` answers four questions at once, 96 tokens each (`inference/evaluate.py`).
ANSWERS, ANSWER_TOKENS = 4, 96
# Resident with torch's CUDA build and its context; read from a process list, not measured here.
CUDA_HOST_BYTES = 3 * 2**30
# Memory of a process before training, beyond its memory during training.
LOADING = "base, while it is loaded"
# A Llama-2-7B shape merged tensor by tensor peaked at 3.8 GB (benchmarks/results/export_memory_7b).
MERGE_TENSORS = 24


def phases(recipe: Recipe, config: Any, device: Device, training: MemoryPlan) -> dict[str, Parts]:
    """Bytes per part in the device's memory: training, evaluation, generation."""
    resident = {n: s for n, s in training.parts.items() if n in RESIDENT_PARTS}
    c, width, layers = config.get_text_config(), BYTES[device.dtype], count(config).layers
    rows = max(1, BATCH_TOKENS // recipe.cutoff_len)
    tokens = rows * recipe.cutoff_len
    layer_numbers = max(int(w.queries + w.keys_values + 3 * w.inner) for w in layers)
    layer_numbers = (6 * c.hidden_size + layer_numbers) * width
    logits = min(LOGITS_BYTES, tokens * c.vocab_size * 4)
    evaluation = {
        **resident,
        "optimizer state": training.parts.get("optimizer state", 0),
        "one layer of a batch": tokens * layer_numbers,
        "logits of one chunk": logits if device.kind == "cuda" else int(2.5 * logits),
    }
    context = recipe.cutoff_len + ANSWER_TOKENS
    generation = {
        **resident,
        "keys and values": ANSWERS * context * sum(w.keys_values for w in layers) * width,
        "one layer of a prompt": ANSWERS * context * layer_numbers,
    }
    trains = split_weight_parts(recipe, config, device, training)
    return {"training": trains, "evaluation": evaluation, "generation": generation}


def split_weight_parts(recipe: Recipe, config: Any, device: Device, training: MemoryPlan) -> Parts:
    """Split the training plan's weights into finer parts; the sum is unchanged."""
    counted, width = count(config), BYTES[device.dtype]
    parts = dict(training.parts)
    frozen, others = parts.pop("frozen weights"), parts.pop("embeddings, head and norms")
    on_host = training.placement.base_on_host
    weights: Parts = {"frozen weights of two layers" if on_host else "frozen weights": frozen}
    if recipe.method == "qlora" and not on_host:
        shards = training.placement.shards
        constants = int((NF4_BYTES - 0.5) * counted.in_linear / shards)
        weights = {
            "frozen weights (4-bit)": frozen - constants,
            "quantization constants": constants,
        }
    embedding = 0 if training.placement.embedding_on_host else counted.embedding * width
    head = counted.head * width
    if others >= embedding + head:
        weights["embedding" if counted.head else "embedding, also the head"] = embedding
        weights["head"] = head
        weights["norms and other weights"] = others - embedding - head
    else:
        weights["embeddings, head and norms"] = others
    return {name: size for name, size in (weights | parts).items() if size}


def host_parts(recipe: Recipe, device: Device, training: MemoryPlan) -> Parts:
    """Host RAM per machine while its GPUs train; empty for a CPU, whose plan already is host RAM.

    Each rank is a separate process and shares none of it.
    """
    if device.kind != "cuda":
        return {}
    parts = {"Python and libraries": CUDA_HOST_BYTES, **training.host_parts}
    if recipe.optimizer.startswith("paged"):
        parts["optimizer pages"] = training.parts.get("optimizer state", 0)
    totals = {name: device.per_node * size for name, size in parts.items()}
    if training.placement.shards > 1:
        later = device.per_node * training.host_bytes
        totals[LOADING] = max(0, _loaded_bytes(training) - later)
    return totals


def _loaded_bytes(training: MemoryPlan) -> int:
    """Bytes while one process after another loads the complete base and keeps only its shard."""
    parts = training.parts
    on_gpu = training.placement.shards * parts["frozen weights"]
    on_gpu += parts["embeddings, head and norms"]
    return on_gpu + training.host_parts.get("embedding", 0)


def merge_parts(config: Any) -> Parts:
    """RAM of `export --to merged`: one tensor at a time; the check holds two float32 models."""
    counted = count(config)
    largest = max([counted.embedding, *(i * o for _, i, o in counted.linear)])
    return {
        "Python and libraries": LIBRARIES_BYTES,
        "one tensor in float32, and a shard": min(MERGE_TENSORS * largest, 2 * counted.total),
        "check in float32 (else by tensor)": 8 * counted.total,
    }


def disk_parts(recipe: Recipe, config: Any, local: bool) -> dict[str, int]:
    """Bytes on disk: downloads, and files that a run writes."""
    counted = count(config)
    adapter = trained_elements(recipe, config) * 4
    state = int(adapter / 4 * OPTIMIZER_BYTES[recipe.optimizer])
    return {
        "download (16-bit weights)": 0 if local else 2 * counted.total,
        f"checkpoints ({recipe.kept_checkpoints}, and one being written)": (adapter + state)
        * (recipe.kept_checkpoints + 1),
        "adapter": adapter,
        "merged export (16-bit)": 2 * counted.total,
    }


def trained_elements(recipe: Recipe, config: Any) -> int:
    """Trainable parameters of the recipe."""
    return count_trainable(recipe, count(config))
