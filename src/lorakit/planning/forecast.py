"""Forecast a run from a recipe, a config and a device, as `lorakit plan` shows it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, ModelError, WorkError
from lorakit.hardware import host_memory
from lorakit.model.param_counts import count
from lorakit.model.stored_quantization import UntrainableWeights, require_trainable_weights
from lorakit.planning.gpus import Gpu, match_gpu
from lorakit.planning.known_models import REPOSITORIES, SHAPES, shape_config
from lorakit.planning.memory import reserve_note
from lorakit.planning.multi_gpu import Scale, scale
from lorakit.planning.planner import plan_training
from lorakit.planning.stages import (
    LOADING,
    Parts,
    disk_parts,
    host_parts,
    merge_parts,
    phases,
    trained_elements,
)
from lorakit.planning.suggestions import Suggestion, fewest_gpus, find_changes, smallest_gpu
from lorakit.planning.throughput import Speed, estimate_speed
from lorakit.recipe.loader import suggest
from lorakit.recipe.schema import Recipe
from lorakit.types import Device, MemoryPlan


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predicted resources of a run on `device`, before anything is loaded.

    `device_parts` holds training, evaluation and generation in the device's memory; the others are
    host RAM during training, host RAM of a merge, and disk. All are bytes, for a device those of
    one rank. `scale` describes the run on several ranks; if the run does not fit, `fewest_gpus` is
    the number of GPUs of this kind that would hold it.
    """

    recipe: Recipe
    device: Device
    config_from: str
    parameters: int
    trainable: int
    training: MemoryPlan
    device_parts: dict[str, Parts]
    host: Parts
    merge: Parts
    disk: Parts
    speed: Speed | None
    no_speed: str  # reason if there is no estimate
    changes: tuple[Suggestion, ...]
    smallest_gpu: str | None
    fewest_gpus: int | None = None
    scale: Scale | None = None
    context: int | None = None

    @property
    def fits(self) -> bool:
        """True if training fits."""
        return self.training.fits

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "fits": self.fits,
            "model": self.recipe.model,
            "config": self.config_from,
            "parameters": self.parameters,
            "trainable": self.trainable,
            "device": {"name": self.device.name, "dtype": self.device.dtype},
            "training": self.training.as_dict(),
            "choices": self.training.describe(),
            "device_bytes": self.device_parts,
            "host_bytes": self.host,
            "merge_bytes": self.merge,
            "disk_bytes": self.disk,
            "tokens_per_second": _rounded(self.speed),
            "speed_basis": self.speed.basis if self.speed else None,
            "speed_missing": self.no_speed or None,
            "changes": [change.as_dict() for change in self.changes],
            "smallest_gpu": self.smallest_gpu,
            "fewest_gpus": self.fewest_gpus,
            "scale": asdict(self.scale) if self.scale else None,
            "context": self.context,
        }


def forecast(
    recipe: Recipe,
    config: Any,
    device: Device,
    gpu: Gpu | None = None,
    config_from: str = "config.json",
    local: bool = False,
) -> Forecast:
    """Plan memory, disk, speed and, if the run does not fit, changes that help.

    Args:
        recipe: with `target_modules` resolved.
        gpu: GPU type of `device`; by default derived from its name.
        local: True if the weights are already on this machine.
    """
    gpu = gpu or match_gpu(device.name, device.memory_bytes)
    plan = plan_training(recipe, config, device)
    fits = plan.fits
    small = None if fits or device.kind != "cuda" else smallest_gpu(recipe, config, device)
    speed, no_speed = estimate_speed(recipe, config, device, plan, gpu)
    return Forecast(
        recipe=recipe,
        device=device,
        config_from=config_from,
        parameters=count(config).total,
        trainable=trained_elements(recipe, config),
        training=plan,
        context=getattr(config.get_text_config(), "max_position_embeddings", None),
        device_parts=phases(recipe, config, device, plan),
        host=host_parts(recipe, device, plan),
        merge=merge_parts(config),
        disk=disk_parts(recipe, config, local),
        speed=speed,
        no_speed=no_speed,
        changes=_changes(recipe, config, device, plan, gpu),
        smallest_gpu=small.name if small else None,
        fewest_gpus=None if fits else fewest_gpus(recipe, config, device),
        scale=scale(recipe, config, device, plan, gpu, speed),
    )


def _changes(
    recipe: Recipe, config: Any, device: Device, plan: MemoryPlan, gpu: Gpu | None
) -> tuple[Suggestion, ...]:
    """Changes that make the run fit; if it fits only by streaming, changes that make it faster."""
    if plan.fits and not plan.placement.layerwise:
        return ()
    changes = find_changes(recipe, config, device, plan, gpu)
    if not plan.fits:
        return changes
    return tuple(c for c in changes if c.fits and c.slower is not None and c.slower < -0.05)


def planned_speed(
    recipe: Recipe, config: Any, device: Device, plan: MemoryPlan
) -> tuple[float | None, str]:
    """(tokens per second for `plan.json`, why there is no estimate)."""
    gpu = match_gpu(device.name, device.memory_bytes)
    speed, why = estimate_speed(recipe, config, device, plan, gpu)
    return _rounded(speed), why


def require_plan_fits(recipe: Recipe, config: Any, device: Device, plan: MemoryPlan) -> None:
    """Stop a run that cannot fit, before its weights are downloaded.

    Raises:
        WorkError: states the missing memory and the changes that would make the run fit.
    """
    if plan.fits:
        _refuse_host(recipe, device, plan)
        return
    gpu = match_gpu(device.name, device.memory_bytes)
    ways = find_changes(recipe, config, device, plan, gpu)
    lines = [f"\n  {way.flags}  ({saving(way)})" for way in ways if way.fits]
    more = fewest_gpus(recipe, config, device)
    lines += [f"\n  --gpus {more}  (the same result, the base sharded over them)"] if more else []
    options = "".join(["\nthis would make it fit:", *lines]) if lines else ""
    limit = f"memory_limit is {recipe.memory_limit}" if recipe.memory_limit else ""
    has = limit or f"{device.name} has {plan.available_bytes / 2**30:.1f} GiB"
    has += reserve_note(recipe, device, plan)
    raise WorkError(
        f"this run needs about {plan.total_bytes / 2**30:.1f} GiB, {has}: it does not fit{options}",
        hint="`lorakit plan` shows every part; --force trains all the same",
    )


def _refuse_host(recipe: Recipe, device: Device, plan: MemoryPlan) -> None:
    """Raise WorkError if the host memory that the plan uses is not available."""
    parts, has = host_parts(recipe, device, plan), host_memory()
    needs = sum(parts.values())
    if device.kind != "cuda" or needs <= has:
        return
    each = f" for {device.per_node} processes" if device.per_node > 1 else ""
    remedy = "set weight_offload: off to plan for the GPU alone"
    if plan.placement.shards > 1:
        each += f", {parts[LOADING] / 2**30:.1f} of it while the base is loaded"
        remedy = "method: qlora, or fewer GPUs on more nodes, take less of it"
    offloaded = ", ".join(plan.placement.describe(len(plan.keep)))
    raise WorkError(
        f"this run fits {device.name} with {offloaded} in host memory: {needs / 2**30:.1f} GiB of "
        f"it{each}; this machine has {has / 2**30:.1f} GiB",
        hint=f"`lorakit plan` shows every part; {remedy}; --force trains all the same",
    )


def saving(change: Suggestion) -> str:
    """Summary of a change: bytes, speed and price."""
    facts = [f"{change.total_bytes / 2**30:.1f} GiB", f"saves {change.saved_bytes / 2**30:.1f}"]
    if change.slower is not None:
        facts.append("no slower" if change.slower < 0.01 else f"{change.slower:.0%} slower")
    return ", ".join([*facts, change.cost])


def find_config(recipe: Recipe, folders: Any) -> tuple[Any, str, bool]:
    """Find the config of the recipe's model.

    A name in the table of shapes needs no network. A repository in the table that is gated or
    unreachable is planned by its published values.

    Returns:
        (config, source of the config, True if the weights are on this machine).

    Raises:
        ModelError: the folder or repository does not exist, or is unreachable and not in the table;
            or the recipe's method cannot train on its quantized weights.
    """
    from lorakit.model.load import load_config, locate_model

    if recipe.model in SHAPES:
        config = shape_config(recipe.model)
        require_trainable_weights(recipe, config)
        return config, "published values", False
    known = REPOSITORIES.get(recipe.model)
    if recipe.model == "demo":
        return shape_config(REPOSITORIES["demo"]), "published values", False
    try:
        location = locate_model(recipe, folders)
        config = load_config(recipe, location)
    except UntrainableWeights:
        raise
    except ModelError as error:
        if Path(recipe.model).is_dir():
            raise
        if known is None:
            near = suggest(recipe.model, SHAPES)
            raise ModelError(error.message + near, _with_shapes(error)) from error
        config = shape_config(known)
        require_trainable_weights(recipe, config)
        return config, "published values (config.json is out of reach)", False
    return config, "config.json", Path(location).is_dir()


def _with_shapes(error: LorakitError) -> str:
    return f"{error.hint or 'check the name'}; known without a network: {', '.join(SHAPES)}"


def _rounded(speed: Speed | None) -> float | None:
    return None if speed is None else float(f"{speed.tokens_per_second:.3g}")
