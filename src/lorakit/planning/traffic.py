"""A plan for several GPUs enters; what a step sends over the wires, and how long, leaves.

    gradients   2 (N-1)/N * 4 P bytes           a ring over all N ranks, once a step, waited for
    weights     2 * (n-1)/n * frozen bytes      a ring over the n ranks of a node, up and down,
                                                behind the layers before: it costs what sticks out

These are a ring's bytes, the least there are (Patarasuk and Yuan 2009, J. Parallel Distrib. Comput.
69); seconds are bytes over the slowest link, the time of a message itself left out. P trained
numbers travel in float32. A ring crosses each node's network once, so all its GPUs share that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorakit.model.sizes import Sizes
from lorakit.planning.cards import Card
from lorakit.recipe import Recipe
from lorakit.records import Device, MemoryPlan


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one GPU sends, and receives, in a step; seconds where the links are known.

    `link`: which wire the gradients wait for.
    """

    gradients_bytes: int
    weights_bytes: int
    gradients_seconds: float | None
    weights_seconds: float | None
    link: str


NONE = Traffic(0, 0, 0.0, 0.0, "")


def traffic(
    recipe: Recipe, config: Any, device: Device, plan: MemoryPlan, card: Card | None
) -> Traffic:
    """What a step sends; nothing with one rank."""
    if device.ranks == 1:
        return NONE
    sizes, shards = Sizes.of(recipe, config, device), plan.placement.shards
    gradients = int(2 * (device.ranks - 1) / device.ranks * 4 * sizes.adapter)
    weights = int(2 * (shards - 1) / shards * sizes.frozen_bytes)
    if device.kind != "cuda" or card is None:
        return Traffic(gradients, weights, None, None, "unknown")
    inside, network = card.ring_gbs * 1e9, device.network_gbits / 8 * 1e9
    between = device.nodes > 1 and (device.per_node == 1 or network < inside)
    slowest = network if between else inside
    link = (
        f"network, {device.network_gbits:g} Gbit/s a node"
        if between
        else f"{card.ring}, {card.ring_gbs:g} GB/s"
    )
    return Traffic(gradients, weights, gradients / slowest, weights / inside, link)
