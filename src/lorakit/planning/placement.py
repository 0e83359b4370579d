"""A recipe and its sizes enter; what may lie where leaves, choice by choice, cheapest first.

on the card, recomputing more and more -> spread over the GPUs of a node -> in host memory
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from lorakit.errors import RecipeError
from lorakit.planning.rank_workload import RankWorkload
from lorakit.types import ON_CARD, Placement

# From here on heads go through attention in groups: its buffers for all would be GBs, and one group
# fills a card (benchmarks/results/time_link.json).
LONG_ROW = 32768

Choice = tuple[tuple[int, ...], Placement]


def check_placement(sizes: RankWorkload, engine: bool) -> None:
    """Stop what the recipe asks for by name and cannot have.

    Raises:
        RecipeError: `weight_offload: on` or `sharding: on` where the fast layers do not serve,
        both at     once, or `sharding: on` with one GPU to a machine.
    """
    recipe = sizes.recipe
    asked = [key for key in ("weight_offload", "sharding") if getattr(recipe, key) == "on"]
    if len(asked) == 2:
        raise RecipeError(
            "weight_offload: on and sharding: on: a layer's weights come from host memory or from the "
            "other GPUs, not from both",
            hint="set one of them to auto",
        )
    for key in asked:
        if not (engine and recipe.modules_to_save is None):
            raise RecipeError(
                f"{key}: on needs the fast layers, and they do not serve this recipe (model family "
                f"{sizes.config.model_type}, engine: {recipe.fused_layers}; DoRA, trained biases and "
                "modules_to_save do not go with them)",
                hint=f"set {key}: auto, and memory_limit if it must fit",
            )
    if "sharding" in asked and sizes.per_node == 1:
        found = "there is one" if sizes.ranks == 1 else f"each of {sizes.ranks} nodes has one"
        raise RecipeError(
            f"sharding: on needs several GPUs in a machine, {found}",
            hint="give --gpus N with N of 2 or more, or set sharding: auto",
        )


def placement_candidates(sizes: RankWorkload, engine: bool) -> Iterator[Choice]:
    """(what layers keep, what lies where), cheapest in speed first."""
    recipe, layers = sizes.recipe, sizes.layers
    if recipe.weight_offload == "on":
        yield from _layerwise(sizes, (True,))
        return
    if recipe.sharding == "on":
        yield from _layerwise(sizes, (False,), sizes.per_node)
        return
    chosen = recipe.gradient_checkpointing
    if chosen != "auto":
        yield (3 if chosen else 0,) * layers, ON_CARD
        return
    if not engine:
        yield (0,) * layers, ON_CARD
        yield (3,) * layers, ON_CARD
        return
    yield (0,) * layers, ON_CARD
    for level in range(3):
        for more in range(1, layers + 1):
            yield (level + 1,) * more + (level,) * (layers - more), ON_CARD
    if sizes.cuda and not sizes.config.tie_word_embeddings:
        yield (3,) * layers, Placement(embedding_on_host=True)
    if not sizes.cuda or recipe.modules_to_save is not None:
        return
    if recipe.sharding == "auto" and sizes.per_node > 1:
        yield from _layerwise(sizes, (False,), sizes.per_node)
    if recipe.weight_offload == "auto":
        yield from _layerwise(sizes, (False, True))


def _layerwise(
    sizes: RankWorkload, base_on_host: tuple[bool, ...], shards: int = 1
) -> Iterator[Choice]:
    """Step by step less on the card, and fewer tokens at once."""
    recipe = sizes.recipe
    # bitsandbytes' optimizers work on cards only.
    adapters = (False,) if recipe.optimizer.endswith("8bit") else (False, True)
    heads = getattr(sizes.config, "num_key_value_heads", None) or sizes.config.num_attention_heads
    if recipe.cutoff_len >= LONG_ROW:
        heads = max(1, heads * LONG_ROW // (2 * recipe.cutoff_len))
    # The base comes while the card computes; the optimizer on the host is waited for. Within 4 GiB
    # 4,096 tokens and adapters on the card ran at 12,943 tokens/s, 8,192 and on the host at 12,198.
    for at_once in ((8192, 4096), (2048, 1024)):
        for adapters_on_host, on_host, tokens in itertools.product(adapters, base_on_host, at_once):
            yield (
                (3,) * sizes.layers,
                Placement(
                    layerwise=True,
                    embedding_on_host=not sizes.config.tie_word_embeddings,
                    base_on_host=on_host,
                    adapters_on_host=adapters_on_host,
                    tokens_at_once=min(tokens, sizes.step_tokens),
                    heads_at_once=heads,
                    shards=shards,
                ),
            )
