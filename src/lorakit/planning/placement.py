"""List where weights, adapters and activations can be placed, fastest choice first.

on the GPU, recomputing more and more -> sharded over the GPUs of a node -> in host memory
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from lorakit.errors import RecipeError
from lorakit.planning.rank_workload import RankWorkload
from lorakit.types import ON_GPU, Placement

# From this length on attention processes heads in groups: buffers for all heads would take GBs, and
# one group saturates a GPU (benchmarks/results/time_link.json).
LONG_ROW = 32768

Choice = tuple[tuple[int, ...], Placement]
# Optimizers that can update adapters in host memory; bitsandbytes' are made for GPUs.
_ON_HOST = ("adamw", "adafactor", "adagrad", "rmsprop", "sgd")


def check_placement(sizes: RankWorkload, engine: bool) -> None:
    """Reject placements that the recipe requests explicitly but that are not possible.

    Raises:
        RecipeError: `weight_offload: on` or `sharding: on` where the engine does not support the
            recipe, both at once, or `sharding: on` with one GPU per machine.
    """
    recipe = sizes.recipe
    requested = [key for key in ("weight_offload", "sharding") if getattr(recipe, key) == "on"]
    if len(requested) == 2:
        raise RecipeError(
            "weight_offload: on and sharding: on: a layer's weights come from host memory or from "
            "the other GPUs, not from both",
            hint="set one of them to auto",
        )
    for key in requested:
        if not engine or recipe.modules_to_save is not None or recipe.trainable_tokens:
            raise RecipeError(
                f"{key}: on needs the fast layers, and they do not serve this recipe (model family "
                f"{sizes.config.model_type}, fused_layers: {recipe.fused_layers}; DoRA, trained "
                "biases, modules_to_save and trainable_tokens do not go with them)",
                hint=f"set {key}: auto, and memory_limit if it must fit",
            )
    if "sharding" in requested and sizes.per_node == 1:
        gpus = "there is one" if sizes.ranks == 1 else f"each of {sizes.ranks} nodes has one"
        raise RecipeError(
            f"sharding: on needs several GPUs in a machine, {gpus}",
            hint="give --gpus N with N of 2 or more, or set sharding: auto",
        )


def placement_candidates(sizes: RankWorkload, engine: bool) -> Iterator[Choice]:
    """Yield (levels kept per layer, placement), fastest first."""
    recipe, layers = sizes.recipe, sizes.layers
    if recipe.weight_offload == "on":
        yield from _layerwise(sizes, (True,))
        return
    if recipe.sharding == "on":
        yield from _layerwise(sizes, (False,), sizes.per_node)
        return
    chosen = recipe.gradient_checkpointing
    if chosen != "auto":
        yield (3 if chosen else 0,) * layers, ON_GPU
        return
    if not engine:
        yield (0,) * layers, ON_GPU
        yield (3,) * layers, ON_GPU
        return
    yield (0,) * layers, ON_GPU
    for level in range(3):
        for more in range(1, layers + 1):
            yield (level + 1,) * more + (level,) * (layers - more), ON_GPU
    if sizes.cuda and sizes.counted.head and not recipe.trainable_tokens:
        yield (3,) * layers, Placement(embedding_on_host=True)
    if not sizes.cuda or recipe.modules_to_save is not None or recipe.trainable_tokens:
        return
    if recipe.sharding == "auto" and sizes.per_node > 1:
        yield from _layerwise(sizes, (False,), sizes.per_node)
    if recipe.weight_offload == "auto":
        yield from _layerwise(sizes, (False, True))


def _layerwise(
    sizes: RankWorkload, base_on_host: tuple[bool, ...], shards: int = 1
) -> Iterator[Choice]:
    """Yield layer-by-layer placements with less and less on the GPU and fewer tokens at once."""
    recipe = sizes.recipe
    adapters = (False, True) if recipe.optimizer in _ON_HOST else (False,)
    heads = getattr(sizes.config, "num_key_value_heads", None) or sizes.config.num_attention_heads
    if recipe.cutoff_len >= LONG_ROW:
        heads = max(1, heads * LONG_ROW // (2 * recipe.cutoff_len))
    # Streaming the base overlaps with computation; the optimizer on the host does not. Within 4 GiB
    # 4,096 tokens and adapters on the GPU ran at 12,943 tokens/s, 8,192 and on the host at 12,198.
    for at_once in ((8192, 4096), (2048, 1024)):
        for adapters_on_host, on_host, tokens in itertools.product(adapters, base_on_host, at_once):
            yield (
                (3,) * sizes.layers,
                Placement(
                    layerwise=True,
                    embedding_on_host=sizes.counted.head > 0,
                    base_on_host=on_host,
                    adapters_on_host=adapters_on_host,
                    tokens_at_once=min(tokens, sizes.step_tokens),
                    heads_at_once=heads,
                    shards=shards,
                ),
            )
