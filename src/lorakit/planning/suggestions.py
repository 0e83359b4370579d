"""Find the cheapest changes that make a recipe fit.

Nothing is guessed: every change is planned as a separate recipe, for its bytes and its speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lorakit.planning.gpus import GPUS, Gpu, gpu_device
from lorakit.planning.memory import engine_supported
from lorakit.planning.planner import plan_training
from lorakit.planning.throughput import expected_speed
from lorakit.recipe.schema import METHOD_DEFAULTS, Recipe
from lorakit.types import Device, MemoryPlan

SHORTEST = 512


@dataclass(frozen=True, slots=True)
class Suggestion:
    """One change. `slower`: share of the speed it costs, None if no speed is known."""

    settings: dict[str, Any]
    cost: str
    total_bytes: int
    saved_bytes: int
    fits: bool
    slower: float | None

    @property
    def flags(self) -> str:
        """Command-line flags that apply the change."""
        return " ".join(f"--set {key}={_word(value)}" for key, value in self.settings.items())

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "settings": self.settings,
            "price": self.cost,
            "total_bytes": self.total_bytes,
            "saved_bytes": self.saved_bytes,
            "fits": self.fits,
            "slower": None if self.slower is None else round(self.slower, 3),
        }


def find_changes(
    recipe: Recipe, config: Any, device: Device, plan: MemoryPlan, gpu: Gpu | None
) -> tuple[Suggestion, ...]:
    """Find single changes that fit, cheapest first; otherwise the shortest combination that fits.

    Changes that cost only time come before changes that alter the result, and they are combined in
    that order until the run fits. If all together do not fit, they are returned with `fits` false.
    """

    def attempt(settings: dict[str, Any], price: str) -> Suggestion:
        changed = _with(recipe, settings)
        changed_plan = plan_training(changed, config, device)
        saved = plan.total_bytes - changed_plan.total_bytes
        return Suggestion(
            settings,
            price,
            changed_plan.total_bytes,
            saved,
            changed_plan.fits,
            slower(changed, changed_plan),
        )

    before = expected_speed(recipe, config, device, plan, gpu)

    def slower(changed: Recipe, changed_plan: MemoryPlan) -> float | None:
        after = expected_speed(changed, config, device, changed_plan, gpu)
        if before is None or after is None:
            return None
        return 1 - after.tokens_per_second / before.tokens_per_second

    least = _least(recipe, config, device)
    # 8-bit optimizers stay on the GPU, while a plain one may move to the host.
    extremes = [_try(attempt, w) for w in (least, [w for w in least if "optimizer" not in w[0]])]
    if not any(change.fits for change in extremes):
        return (min(extremes, key=lambda change: change.total_bytes),)
    singles = [attempt(*way) for way in _candidates(recipe, config, device)]
    fitting = [c for c in singles if c.fits]
    if fitting:
        return tuple(fitting)
    return _together(recipe, config, device, attempt)


def _least(recipe: Recipe, config: Any, device: Device) -> list[tuple[dict[str, Any], str]]:
    """Every change, each taken as far as possible."""
    applied: list[tuple[dict[str, Any], str]] = []
    while True:
        changed = _with(recipe, _joined(applied))
        more = [w for w in _candidates(changed, config, device) if _with(changed, w[0]) != changed]
        if not more:
            return applied
        applied.append(more[0])


def _together(
    recipe: Recipe,
    config: Any,
    device: Device,
    attempt: Callable[[dict[str, Any], str], Suggestion],
) -> tuple[Suggestion, ...]:
    """Combine changes, each on top of the earlier ones, until the run fits."""
    applied: list[tuple[dict[str, Any], str]] = []
    best: Suggestion | None = None
    while best is None or not best.fits:
        changed = _with(recipe, _joined(applied))
        for way in _candidates(changed, config, device):
            more = _try(attempt, [*applied, way])
            if best is None or more.total_bytes < best.total_bytes:
                applied, best = [*applied, way], more
                break
        else:
            break
    if best is None:
        return ()
    for way in list(applied[:-1]):  # drop earlier changes that are no longer needed
        fewer = [w for w in applied if w is not way]
        shorter = _try(attempt, fewer)
        if best.fits and shorter.fits:
            applied, best = fewer, shorter
    return (best,)


def _try(
    attempt: Callable[[dict[str, Any], str], Suggestion], ways: list[tuple[dict[str, Any], str]]
) -> Suggestion:
    return attempt(_joined(ways), "; ".join(dict.fromkeys(price for _, price in ways)))


def _joined(ways: list[tuple[dict[str, Any], str]]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for settings, _ in ways:
        joined |= settings
    return joined


def _candidates(
    recipe: Recipe, config: Any, device: Device
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (settings, cost besides time), the least intrusive first."""
    chosen = recipe.gradient_checkpointing
    if chosen is False:
        yield {"gradient_checkpointing": "auto"}, "the same result; some of it is computed twice"
    if recipe.micro_batch_size > 1:
        rows, count = recipe.micro_batch_size, recipe.gradient_accumulation_steps
        for smaller in _halves(rows):
            steps = -(-rows * count // smaller)
            yield (
                {"micro_batch_size": smaller, "gradient_accumulation_steps": steps},
                "the same result",
            )
    if recipe.fused_layers == "off" and device.fast:
        on = recipe.model_copy(update={"fused_layers": "auto"})
        if engine_supported(on, config.get_text_config(), device.fast):
            yield {"fused_layers": "auto"}, "none: lorakit's layers keep less"
    if recipe.weight_offload == "off" and device.kind == "cuda":
        yield {"weight_offload": "auto"}, "the same result; host memory takes what the GPU cannot"
    if recipe.sharding == "off" and device.kind == "cuda" and device.per_node > 1:
        yield {"sharding": "auto"}, "the same result; each GPU holds a part of the base"
    if recipe.optimizer == "adamw" and device.kind == "cuda":
        yield {"optimizer": "adamw_8bit"}, "optimizer state in 8 bits"
    if recipe.method == "lora":
        yield _to_four_bits(recipe), "base in 4 bits: slightly less exact"
    if recipe.cutoff_len > SHORTEST:
        yield (
            {"cutoff_len": max(SHORTEST, recipe.cutoff_len // 2)},
            "longer examples are cut by `on_overlength`",
        )
    if recipe.lora_r > 8:
        yield {"lora_r": recipe.lora_r // 2}, "less capacity of the adapter"


def _to_four_bits(recipe: Recipe) -> dict[str, Any]:
    """Switch to QLoRA without larger micro-batches: its default may be four times as large."""
    changed = _with(recipe, {"method": "qlora"})
    if changed.micro_batch_size <= recipe.micro_batch_size:
        return {"method": "qlora"}
    rows, steps = recipe.micro_batch_size, recipe.gradient_accumulation_steps
    return {"method": "qlora", "micro_batch_size": rows, "gradient_accumulation_steps": steps}


def _halves(rows: int) -> Iterator[int]:
    while rows > 1:
        rows = -(-rows // 2)
        yield rows


def _with(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """The recipe as the command line would build it: a new method keeps the user's settings."""
    values = dict(settings)
    if "method" in settings:
        old, new = METHOD_DEFAULTS[recipe.method], METHOD_DEFAULTS[settings["method"]]
        values = {k: v for k, v in new.items() if getattr(recipe, k) == old[k]} | values
    return recipe.model_copy(update=values)


def smallest_gpu(recipe: Recipe, config: Any, like: Device) -> Gpu | None:
    """The smallest GPU that fits the unchanged recipe, with as many ranks as `like`."""
    for gpu in sorted(GPUS.values(), key=lambda c: c.memory_gib):
        device = gpu_device(gpu, None, recipe.dtype)
        device = replace(device, ranks=like.ranks, nodes=like.nodes)
        if plan_training(recipe, config, device).fits:
            return gpu
    return None


def fewest_gpus(recipe: Recipe, config: Any, device: Device) -> int | None:
    """GPUs like `device` per machine, 8 at most, that would hold the unchanged recipe."""
    if device.kind != "cuda":
        return None
    for count in (2, 4, 8):
        more = replace(device, ranks=count * device.nodes)
        if count > device.per_node and plan_training(recipe, config, more).fits:
            return count
    return None


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
