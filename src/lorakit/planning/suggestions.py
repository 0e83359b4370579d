"""A recipe that does not fit enters; the cheapest changes that make it fit leave, each tried.

Nothing is guessed: every change is planned like a recipe of its own, for its bytes and its speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lorakit.planning.gpus import GPUS, Gpu, card_device
from lorakit.planning.memory import engine_supported
from lorakit.planning.planner import plan_training
from lorakit.planning.throughput import expected_speed
from lorakit.recipe.schema import METHOD_DEFAULTS, Recipe
from lorakit.types import Device, MemoryPlan

SHORTEST = 512


@dataclass(frozen=True, slots=True)
class Suggestion:
    """One way out. `slower`: share of the speed it costs, None where no speed is known."""

    settings: dict[str, Any]
    cost: str
    total_bytes: int
    saved_bytes: int
    fits: bool
    slower: float | None

    @property
    def flags(self) -> str:
        """What to type."""
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
    recipe: Recipe, config: Any, device: Device, plan: MemoryPlan, card: Gpu | None
) -> tuple[Suggestion, ...]:
    """Single changes that fit, cheapest first; where none does, the shortest row of them.

    What costs nothing but time comes before what changes the result, and in that order they are
    added up until the run fits. Where even all together do not fit, they are given with `fits` off.
    """

    def tried(settings: dict[str, Any], price: str) -> Suggestion:
        changed = _with(recipe, settings)
        found = plan_training(changed, config, device)
        saved = plan.total_bytes - found.total_bytes
        return Suggestion(
            settings, price, found.total_bytes, saved, found.fits, slower(changed, found)
        )

    before = expected_speed(recipe, config, device, plan, card)

    def slower(changed: Recipe, found: MemoryPlan) -> float | None:
        after = expected_speed(changed, config, device, found, card)
        if before is None or after is None:
            return None
        return 1 - after.tokens_per_second / before.tokens_per_second

    least = _least(recipe, config, device)
    # 8-bit optimizers stay on the card, where a plain one may go to the host.
    all_of_it = [_try(tried, w) for w in (least, [w for w in least if "optimizer" not in w[0]])]
    if not any(change.fits for change in all_of_it):
        return (min(all_of_it, key=lambda change: change.total_bytes),)
    singles = [tried(*way) for way in _candidates(recipe, config, device)]
    fitting = [c for c in singles if c.fits]
    if fitting:
        return tuple(fitting)
    return _together(recipe, config, device, tried)


def _least(recipe: Recipe, config: Any, device: Device) -> list[tuple[dict[str, Any], str]]:
    """Every change, each as far as it goes."""
    taken: list[tuple[dict[str, Any], str]] = []
    while True:
        changed = _with(recipe, _joined(taken))
        more = [w for w in _candidates(changed, config, device) if _with(changed, w[0]) != changed]
        if not more:
            return taken
        taken.append(more[0])


def _together(
    recipe: Recipe, config: Any, device: Device, tried: Callable[[dict[str, Any], str], Suggestion]
) -> tuple[Suggestion, ...]:
    """Changes added up, each on top of those before, until the run fits."""
    taken: list[tuple[dict[str, Any], str]] = []
    best: Suggestion | None = None
    while best is None or not best.fits:
        changed = _with(recipe, _joined(taken))
        for way in _candidates(changed, config, device):
            more = _try(tried, [*taken, way])
            if best is None or more.total_bytes < best.total_bytes:
                taken, best = [*taken, way], more
                break
        else:
            break
    if best is None:
        return ()
    for way in list(taken[:-1]):  # what an earlier change gave may not be needed any more
        fewer = [w for w in taken if w is not way]
        shorter = _try(tried, fewer)
        if best.fits and shorter.fits:
            taken, best = fewer, shorter
    return (best,)


def _try(
    tried: Callable[[dict[str, Any], str], Suggestion], ways: list[tuple[dict[str, Any], str]]
) -> Suggestion:
    return tried(_joined(ways), "; ".join(dict.fromkeys(price for _, price in ways)))


def _joined(ways: list[tuple[dict[str, Any], str]]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for settings, _ in ways:
        joined |= settings
    return joined


def _candidates(
    recipe: Recipe, config: Any, device: Device
) -> Iterator[tuple[dict[str, Any], str]]:
    """(settings, what they cost beside time), the gentlest first."""
    chosen = recipe.gradient_checkpointing
    if chosen is False:
        yield {"gradient_checkpointing": "auto"}, "the same result; some of it is computed twice"
    if recipe.micro_batch_size > 1:
        rows, count = recipe.micro_batch_size, recipe.gradient_accumulation_steps
        for part in _halves(rows):
            steps = -(-rows * count // part)
            yield (
                {"micro_batch_size": part, "gradient_accumulation_steps": steps},
                "the same result",
            )
    if recipe.fused_layers == "off" and device.fast:
        on = recipe.model_copy(update={"fused_layers": "auto"})
        if engine_supported(on, config.get_text_config(), device.fast):
            yield {"fused_layers": "auto"}, "none: lorakit's layers keep less"
    if recipe.weight_offload == "off" and device.kind == "cuda":
        yield {"weight_offload": "auto"}, "the same result; host memory takes what the card cannot"
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
    """QLoRA with micro-batches no larger than now: its own default may be four times as many."""
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
    """The recipe as the command line would make it: a new method keeps what the user set."""
    values = dict(settings)
    if "method" in settings:
        old, new = METHOD_DEFAULTS[recipe.method], METHOD_DEFAULTS[settings["method"]]
        values = {k: v for k, v in new.items() if getattr(recipe, k) == old[k]} | values
    return recipe.model_copy(update=values)


def smallest_gpu(recipe: Recipe, config: Any, like: Device) -> Gpu | None:
    """The card of least memory on which the recipe fits as it stands, with as many as `like`."""
    for card in sorted(GPUS.values(), key=lambda c: c.memory_gib):
        device = card_device(card, None, recipe.dtype)
        device = replace(device, ranks=like.ranks, nodes=like.nodes)
        if plan_training(recipe, config, device).fits:
            return card
    return None


def fewest_gpus(recipe: Recipe, config: Any, device: Device) -> int | None:
    """How many of `device` in one machine, 8 at most, would hold the recipe as it stands."""
    if device.kind != "cuda":
        return None
    for count in (2, 4, 8):
        more = replace(device, ranks=count * device.nodes)
        if count > device.per_node and plan_training(recipe, config, more).fits:
            return count
    return None


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
