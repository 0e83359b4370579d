"""A recipe, a config, a device and its plan enter; bytes of all that surrounds a step leave.

Evaluation, generation and merging on the device, RAM of the host, and disk: bytes per part.
"""

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

# What stands in the device's memory whatever goes on there.
RESIDENT_PARTS = {
    "frozen weights",
    "two layers, gathered",
    "embeddings, head and norms",
    "experts (not quantized)",
    "adapters (float32)",
    "adapters (copy in the base's type)",
    "one layer dequantized",
    "CUDA context",
    "NCCL buffers",
    "Python and libraries",
}
# `lorakit eval` answers four questions side by side, 96 tokens each (`inference/evaluate.py`).
ANSWERS, ANSWER_TOKENS = 4, 96
# Resident with torch's CUDA build and its context; read off a process list, not measured here.
CUDA_HOST_BYTES = 3 * 2**30
# What a process holds before it trains, beyond what it holds then.
LOADING = "base, while it is loaded"
# A Llama-2-7B shape merged tensor by tensor peaked at 3.8 GB (benchmarks/results/export_memory_7b).
MERGE_TENSORS = 24


def phases(recipe: Recipe, config: Any, device: Device, training: MemoryPlan) -> dict[str, Parts]:
    """Bytes per part in the device's memory: training, evaluation, generation."""
    standing = {n: s for n, s in training.parts.items() if n in RESIDENT_PARTS}
    c, width, layers = config.get_text_config(), BYTES[device.dtype], count(config).layers
    rows = max(1, BATCH_TOKENS // recipe.cutoff_len)
    tokens = rows * recipe.cutoff_len
    passing = max(int(w.queries + w.keys_values + 3 * w.inner) for w in layers)
    passing = (6 * c.hidden_size + passing) * width
    logits = min(LOGITS_BYTES, tokens * c.vocab_size * 4)
    evaluation = {
        **standing,
        "optimizer state": training.parts.get("optimizer state", 0),
        "one layer of a batch": tokens * passing,
        "logits of one chunk": logits if device.kind == "cuda" else int(2.5 * logits),
    }
    context = recipe.cutoff_len + ANSWER_TOKENS
    generation = {
        **standing,
        "keys and values": ANSWERS * context * sum(w.keys_values for w in layers) * width,
        "one layer of a prompt": ANSWERS * context * passing,
    }
    trains = split_weight_parts(recipe, config, device, training)
    return {"training": trains, "evaluation": evaluation, "generation": generation}


def split_weight_parts(recipe: Recipe, config: Any, device: Device, training: MemoryPlan) -> Parts:
    """The training plan's parts with weights told apart; the sum is the same."""
    counted, width = count(config), BYTES[device.dtype]
    parts = dict(training.parts)
    frozen, others = parts.pop("frozen weights"), parts.pop("embeddings, head and norms")
    on_host = training.placement.base_on_host
    told: Parts = {"frozen weights of two layers" if on_host else "frozen weights": frozen}
    if recipe.method == "qlora" and not on_host:
        shards = training.placement.shards
        constants = int((NF4_BYTES - 0.5) * counted.in_linear / shards)
        told = {"frozen weights (4-bit)": frozen - constants, "quantization constants": constants}
    embedding = 0 if training.placement.embedding_on_host else counted.embedding * width
    head = counted.head * width
    if others >= embedding + head:
        told["embedding" if counted.head else "embedding, also the head"] = embedding
        told["head"] = head
        told["norms and other weights"] = others - embedding - head
    else:
        told["embeddings, head and norms"] = others
    return {name: size for name, size in (told | parts).items() if size}


def host_parts(recipe: Recipe, device: Device, training: MemoryPlan) -> Parts:
    """RAM of a machine beside its cards while they train; on a CPU that is the plan itself.

    Each rank is a process of its own, and shares nothing of it.
    """
    if device.kind != "cuda":
        return {}
    parts = {"Python and libraries": CUDA_HOST_BYTES, **training.host_parts}
    if recipe.optimizer.startswith("paged"):
        parts["optimizer pages"] = training.parts.get("optimizer state", 0)
    found = {name: device.per_node * size for name, size in parts.items()}
    if training.placement.shards > 1:
        later = device.per_node * training.host_bytes
        found[LOADING] = max(0, _loaded_bytes(training) - later)
    return found


def _loaded_bytes(training: MemoryPlan) -> int:
    """A base that is spread is loaded whole by one process after another; each keeps its part."""
    parts = training.parts
    on_card = training.placement.shards * parts["frozen weights"]
    on_card += parts["embeddings, head and norms"]
    return on_card + training.host_parts.get("embedding", 0)


def merge_parts(config: Any) -> Parts:
    """RAM for `export --to merged`: one tensor at a time; the check holds two float32 models."""
    counted = count(config)
    largest = max([counted.embedding, *(i * o for _, i, o in counted.linear)])
    return {
        "Python and libraries": LIBRARIES_BYTES,
        "one tensor in float32, and a shard": min(MERGE_TENSORS * largest, 2 * counted.total),
        "check in float32 (else by tensor)": 8 * counted.total,
    }


def disk_parts(recipe: Recipe, config: Any, local: bool) -> dict[str, int]:
    """Bytes on the disk: what is downloaded, and what a run leaves."""
    counted = count(config)
    adapter = trained_elements(recipe, config) * 4
    state = int(adapter / 4 * OPTIMIZER_BYTES[recipe.optimizer])
    return {
        "download (16-bit weights)": 0 if local else 2 * counted.total,
        f"checkpoints ({recipe.keep_checkpoints}, and one being written)": (adapter + state)
        * (recipe.keep_checkpoints + 1),
        "adapter": adapter,
        "merged export (16-bit)": 2 * counted.total,
    }


def trained_elements(recipe: Recipe, config: Any) -> int:
    """Trainable parameters of the recipe."""
    return count_trainable(recipe, count(config))
