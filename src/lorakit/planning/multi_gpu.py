"""Explain a plan for several GPUs: placement of the base and its reason, and cost of sharing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lorakit.distributed.process_group import DistributedContext
from lorakit.errors import WorkError
from lorakit.planning.gpus import Gpu
from lorakit.planning.planner import plan_training
from lorakit.planning.throughput import Speed, Traffic, expected_speed, traffic
from lorakit.recipe.schema import Recipe
from lorakit.storage.units import GIB
from lorakit.types import Device, MemoryPlan


@dataclass(frozen=True, slots=True)
class Scale:
    """A step on N ranks compared with a step on one.

    `waited_share`: share of a step spent waiting for other ranks. `efficiency`: tokens per second
    relative to `ranks` times those of one GPU with the same recipe, planned separately; None if
    that does not fit one GPU, or if the GPU is unknown.
    """

    ranks: int
    nodes: int
    network_gbits: float
    base: str
    split: str
    idle_share: float
    traffic: Traffic
    step_seconds: float | None
    waited_share: float | None
    one_gpu: float | None
    one_gpu_choices: str | None
    efficiency: float | None
    warnings: tuple[str, ...]


def scale(
    recipe: Recipe,
    config: Any,
    device: Device,
    plan: MemoryPlan,
    gpu: Gpu | None,
    speed: Speed | None,
) -> Scale | None:
    """Cost and gain of sharing a step; None for one GPU."""
    if device.ranks == 1:
        return None
    alone = replace(device, ranks=1, nodes=1)
    unsharded = recipe.model_copy(update={"sharding": "auto"})
    single = plan_training(unsharded, config, alone)
    rate = expected_speed(unsharded, config, alone, single, gpu) if single.fits else None
    efficiency = None
    if speed is not None and rate is not None:
        efficiency = speed.tokens_per_second / rate.tokens_per_second / device.ranks
    examples = recipe.examples_per_step
    split, idle = describe_split(examples, device), idle_share(examples, device.ranks)
    return Scale(
        ranks=device.ranks,
        nodes=device.nodes,
        network_gbits=device.network_gbits,
        base=_base(recipe, config, device, plan),
        split=split,
        idle_share=idle,
        traffic=traffic(recipe, config, device, plan, gpu),
        step_seconds=speed.step_seconds if speed else None,
        waited_share=_share(speed),
        one_gpu=rate.tokens_per_second if rate else None,
        one_gpu_choices=single.describe() if single.fits else None,
        efficiency=efficiency,
        warnings=(f"{split}; {_advice(examples, device)}",) if idle else (),
    )


def _share(speed: Speed | None) -> float | None:
    if speed is None or speed.waited_seconds is None:
        return None
    return speed.waited_seconds / speed.step_seconds


def idle_share(examples: int, ranks: int) -> float:
    """Share of all ranks' time that a step of equal examples does not use."""
    return 1 - examples / (ranks * -(-examples // ranks))


def describe_split(examples: int, device: Device) -> str:
    """Describe how a step's examples are divided among ranks."""
    ranks, each = device.ranks, examples // device.ranks
    summary = f"{examples} example{'s' * (examples != 1)} a step over {ranks} {_units(device)}"
    if examples % ranks == 0:
        return f"{summary}: {each} each"
    rest = f"does {each} and waits" if each else "has nothing to do"
    return f"{summary}: {each + 1} on {examples % ranks} of them, the rest {rest}"


def _advice(examples: int, device: Device) -> str:
    ranks = device.ranks
    up = ranks * -(-examples // ranks)
    fewer = next(n for n in range(min(ranks, examples), 0, -1) if examples % n == 0)
    return (
        f"{idle_share(examples, ranks):.0%} of the {_units(device)}' time is lost. {fewer} divide "
        f"a step evenly; {up} examples a step would too, which is another effective batch"
    )


def _base(recipe: Recipe, config: Any, device: Device, plan: MemoryPlan) -> str:
    """Describe the placement of the base and its reason."""
    placement, unit = plan.placement, _unit(device)
    if placement.shards > 1:
        where = (
            f"the {device.per_node} {_units(device)} of each node"
            if device.nodes > 1
            else f"all {device.per_node} {_units(device)}"
        )
        scheme = "FSDP's full shard" + (", replicas across nodes: HSDP" if device.nodes > 1 else "")
        why = _why_sharded(recipe, config, device)
        return f"sharded over {where}, 1/{placement.shards} each ({scheme}): {why}"
    if placement.base_on_host:
        return (
            f"in host memory, once for every {unit}, streamed: {_why_not_sharded(recipe, device)}"
        )
    return f"on every {unit} in full (as DDP): it {'fits' if plan.fits else 'does not fit'} one"


def _why_sharded(recipe: Recipe, config: Any, device: Device) -> str:
    if recipe.sharding == "on":
        return "sharding: on"
    unsharded = recipe.model_copy(update={"sharding": "off", "weight_offload": "off"})
    least = plan_training(unsharded, config, device).total_bytes / GIB
    has = f"has {device.rank_bytes / GIB:.1f} GiB"
    if recipe.memory_limit:
        has = f"may take {recipe.memory_limit}"
    return f"with all of it one {_unit(device)} needs {least:.1f} GiB, and {has}"


def _why_not_sharded(recipe: Recipe, device: Device) -> str:
    if recipe.weight_offload == "on":
        return "weight_offload: on"
    if recipe.sharding == "off":
        return "sharding: off"
    if device.per_node == 1:
        return "sharding needs at least two GPUs per node"
    return f"sharded over {device.per_node} it does not fit either"


def _unit(device: Device) -> str:
    return "process" if device.kind == "cpu" else "GPU"


def _units(device: Device) -> str:
    return "processes" if device.kind == "cpu" else "GPUs"


def shared_device(device: Device, ranks: DistributedContext) -> Device:
    """The device that every rank plans for, with the smallest memory of all.

    Raises:
        WorkError: the base would have different dtypes on the ranks.
    """
    if ranks.world_size == 1:
        return device
    devices = ranks.all_gather_object(device)
    dtypes = {other.dtype for other in devices}
    if len(dtypes) > 1:
        listed = ", ".join(f"rank {n}: {d.dtype} on {d.name}" for n, d in enumerate(devices))
        raise WorkError(
            f"the base would have different dtypes on the ranks: {listed}",
            hint="set dtype to one that all of them support: float16 or float32",
        )
    names = [
        f"{sum(d.name == name for d in devices)} x {name}" for name in {d.name for d in devices}
    ]
    on = f" on {ranks.nodes} machines" if ranks.nodes > 1 else ""
    return replace(
        min(devices, key=lambda other: other.memory_bytes),
        ranks=ranks.world_size,
        nodes=ranks.nodes,
        reasons={**device.reasons, "ranks": ", ".join(sorted(names)) + on},
    )
