"""A recipe, a config and a device enter; one Forecast leaves: what `lorakit plan` shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, ModelError, WorkError
from lorakit.hardware import host_memory
from lorakit.model.param_counts import count
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
    """What a run will take on `device`, before anything of it is loaded.

    `device_parts` holds training, evaluation and generation in the device's memory; the others
    are RAM of the host while training, RAM of a merge, and disk. All are bytes, on a device those
    of one rank. `scale` is what several ranks make of it; `fewest_gpus` of this kind would hold
    what does not fit.
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
    no_speed: str  # why there is no estimate of it
    changes: tuple[Suggestion, ...]
    smallest_card: str | None
    fewest_gpus: int | None = None
    scale: Scale | None = None
    context: int | None = None

    @property
    def fits(self) -> bool:
        """Whether training fits."""
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
            "smallest_card": self.smallest_card,
            "fewest_gpus": self.fewest_gpus,
            "scale": self.scale.as_dict() if self.scale else None,
            "context": self.context,
        }


def forecast(
    recipe: Recipe,
    config: Any,
    device: Device,
    card: Gpu | None = None,
    config_from: str = "config.json",
    local: bool = False,
) -> Forecast:
    """Plan everything.

    Args:
        recipe: with `target_modules` resolved.
        card: which card `device` is; by default told from its name.
        local: whether the weights are on this machine already.
    """
    card = card or match_gpu(device.name, device.memory_bytes)
    plan = plan_training(recipe, config, device)
    fits = plan.fits
    small = None if fits or device.kind != "cuda" else smallest_gpu(recipe, config, device)
    speed, no_speed = estimate_speed(recipe, config, device, plan, card)
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
        changes=_changes(recipe, config, device, plan, card),
        smallest_card=small.name if small else None,
        fewest_gpus=None if fits else fewest_gpus(recipe, config, device),
        scale=scale(recipe, config, device, plan, card, speed),
    )


def _changes(
    recipe: Recipe, config: Any, device: Device, plan: MemoryPlan, card: Gpu | None
) -> tuple[Suggestion, ...]:
    """What makes it fit; where it fits by streaming only, what would be faster."""
    if plan.fits and not plan.placement.layerwise:
        return ()
    found = find_changes(recipe, config, device, plan, card)
    if not plan.fits:
        return found
    return tuple(c for c in found if c.fits and c.slower is not None and c.slower < -0.05)


def planned_speed(
    recipe: Recipe, config: Any, device: Device, plan: MemoryPlan
) -> tuple[float | None, str]:
    """(tokens per second for `plan.json`, why there is no estimate)."""
    card = match_gpu(device.name, device.memory_bytes)
    speed, why = estimate_speed(recipe, config, device, plan, card)
    return _rounded(speed), why


def require_plan_fits(recipe: Recipe, config: Any, device: Device, plan: MemoryPlan) -> None:
    """Stop a run that cannot fit, before its weights are fetched.

    Raises:
        WorkError: says what is missing, and what would make it fit.
    """
    if plan.fits:
        _refuse_host(recipe, device, plan)
        return
    card = match_gpu(device.name, device.memory_bytes)
    ways = find_changes(recipe, config, device, plan, card)
    lines = [f"\n  {way.flags}  ({saving(way)})" for way in ways if way.fits]
    more = fewest_gpus(recipe, config, device)
    lines += [f"\n  --gpus {more}  (the same result, the base spread over them)"] if more else []
    told = "".join(["\nthis would make it fit:", *lines]) if lines else ""
    limit = f"memory_limit is {recipe.memory_limit}" if recipe.memory_limit else ""
    has = limit or f"{device.name} has {plan.available_bytes / 2**30:.1f} GiB"
    has += reserve_note(recipe, device, plan)
    raise WorkError(
        f"this run needs about {plan.total_bytes / 2**30:.1f} GiB, {has}: it does not fit{told}",
        hint="`lorakit plan` shows every part; --force trains all the same",
    )


def _refuse_host(recipe: Recipe, device: Device, plan: MemoryPlan) -> None:
    """What the plan puts into the host's memory has to be there too."""
    parts, has = host_parts(recipe, device, plan), host_memory()
    needs = sum(parts.values())
    if device.kind != "cuda" or needs <= has:
        return
    each = f" for {device.per_node} processes" if device.per_node > 1 else ""
    way = "set weight_offload: off to plan for the card alone"
    if plan.placement.shards > 1:
        each += f", {parts[LOADING] / 2**30:.1f} of it while the base is loaded"
        way = "method: qlora, or fewer GPUs on more nodes, take less of it"
    lies = ", ".join(plan.placement.describe(len(plan.keep)))
    raise WorkError(
        f"this run fits {device.name} with {lies} in host memory: {needs / 2**30:.1f} GiB of "
        f"it{each}; this machine has {has / 2**30:.1f} GiB",
        hint=f"`lorakit plan` shows every part; {way}; --force trains all the same",
    )


def saving(change: Suggestion) -> str:
    """Bytes, speed and price of a change in a few words."""
    words = [f"{change.total_bytes / 2**30:.1f} GiB", f"saves {change.saved_bytes / 2**30:.1f}"]
    if change.slower is not None:
        words.append("no slower" if change.slower < 0.01 else f"{change.slower:.0%} slower")
    return ", ".join([*words, change.cost])


def find_config(recipe: Recipe, folders: Any) -> tuple[Any, str, bool]:
    """(config, where it is from, whether the weights are here) of the recipe's model.

    A name of the table of shapes needs no network; a repository in it that is gated or out of
    reach is planned by its published values.

    Raises:
        ModelError: no such folder, no such repository, or out of reach and not in the table.
    """
    from lorakit.model.load import load_config, locate_model

    if recipe.model in SHAPES:
        return shape_config(recipe.model), "published values", False
    known = REPOSITORIES.get(recipe.model)
    if recipe.model == "demo":
        return shape_config(REPOSITORIES["demo"]), "published values", False
    try:
        location = locate_model(recipe, folders)
        config = load_config(recipe, location)
    except ModelError as error:
        if known is None:
            near = suggest(recipe.model, SHAPES)
            raise ModelError(error.message + near, _with_shapes(error)) from error
        return shape_config(known), "published values (config.json is out of reach)", False
    return config, "config.json", Path(location).is_dir()


def _with_shapes(error: LorakitError) -> str:
    return f"{error.hint or 'check the name'}; known without a network: {', '.join(SHAPES)}"


def _rounded(speed: Speed | None) -> float | None:
    return None if speed is None else float(f"{speed.tokens_per_second:.3g}")
