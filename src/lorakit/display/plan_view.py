"""The memory plan as rich tables: the verdict, its parts, speed, and changes that would fit."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lorakit.display.rich_output import bar_text
from lorakit.planning.forecast import Forecast
from lorakit.planning.memory import reserve_note
from lorakit.planning.multi_gpu import Scale
from lorakit.planning.stages import Parts
from lorakit.planning.suggestions import Suggestion
from lorakit.redact import visible
from lorakit.storage.units import GIB


def plan_view(found: Forecast) -> Group:
    """Render the verdict, the memory parts, the speed, and changes that would help."""
    views: list[RenderableType] = [_headline(found), _training(found), _around(found)]
    if found.scale:
        views.append(_scale(found.scale))
    views.append(Padding(speed_text(found), (1, 0, 0, 1)))
    if found.changes and found.changes[0].fits:
        title = "what would be faster" if found.fits else "what makes it fit, cheapest first"
        views.append(_changes(found.changes, title))
    elif found.changes:
        least = found.changes[0].total_bytes / GIB
        views.append(
            Text(
                f" No setting makes it fit here: the smallest possible plan takes {least:.1f} GiB."
            )
        )
    if found.fewest_gpus:
        views.append(Text(f" Unchanged, it fits on more GPUs: --gpus {found.fewest_gpus}."))
    if found.smallest_gpu:
        views.append(Text(f" Unchanged, it fits on: {found.smallest_gpu} (--gpu)."))
    return Group(*views)


def _headline(found: Forecast) -> Panel:
    recipe, plan = found.recipe, found.training
    needs, has = plan.total_bytes / GIB, plan.available_bytes / GIB
    text = Text()
    if not plan.fits:
        text.append("DOES NOT FIT", style="bold red")
    else:
        text.append("FITS", style="bold green")
        if plan.describe() != "nothing recomputed":
            text.append(f" with {plan.describe()}")
    limit = f", memory_limit {recipe.memory_limit}" if recipe.memory_limit else ""
    each = f"each of {found.device.ranks} " if found.scale else ""
    place = f"{each}{found.device.name}{limit}{reserve_note(recipe, found.device, plan)}"
    text.append(f"\n{needs:.1f} GiB needed, {has:.1f} GiB on {place}\n")
    if found.context and recipe.cutoff_len > found.context:
        text.append(f"rows are longer than the model's context of {found.context:,} tokens\n")
    text.append(
        f"{recipe.micro_batch_size} x {recipe.gradient_accumulation_steps} examples of "
        f"{recipe.cutoff_len:,} tokens, rank {recipe.lora_r}, {found.device.dtype}; "
        f"{found.trainable / 1e6:.1f} M of {found.parameters / 1e9:.2f} B parameters train "
        f"(from {found.config_from})",
        style="dim",
    )
    # As Text: a folder's name may have brackets, which a plain string would lose as markup.
    title = Text(visible(f"{recipe.model} · {recipe.method}"))
    return Panel(text, title=title, title_align="left")


def _table(title: str, show_header: bool = True) -> Table:
    return Table(
        title=title, title_justify="left", box=None, padding=(0, 1), show_header=show_header
    )


def _training(found: Forecast) -> Table:
    total = found.training.total_bytes
    table = _table("while it trains")
    table.add_column("part", overflow="fold")
    table.add_column("GiB", justify="right")
    table.add_column("", no_wrap=True)
    for name, size in found.device_parts["training"].items():
        table.add_row(name, as_gib(size), bar_text(size, total))
    table.add_row("sum", as_gib(total), style="bold")
    return table


def _around(found: Forecast) -> Table:
    table = _table("before and after")
    table.add_column("", overflow="fold")
    table.add_column("GiB", justify="right")
    table.add_column("most of it", overflow="fold", style="dim")
    where = found.device.name if found.device.kind == "cuda" else "RAM"
    rows = [(f"{name}, {where}", found.device_parts[name]) for name in ("evaluation", "generation")]
    if found.host:
        of_node = f", {found.device.per_node} processes" if found.device.per_node > 1 else ""
        rows.append((f"RAM while training{of_node}", found.host))
    for name, parts in [*rows, ("RAM to merge", found.merge), ("disk", found.disk)]:
        table.add_row(Text(name), as_gib(sum(parts.values())), _largest(parts))
    return table


def _largest(parts: Parts) -> str:
    ordered = sorted(parts.items(), key=lambda item: -item[1])[:2]
    return "; ".join(f"{name} {as_gib(size)}" for name, size in ordered if size)


def _scale(found: Scale) -> Table:
    """Render the split of base and examples over ranks, the traffic, and the efficiency."""
    nodes = f" on {found.nodes} nodes" if found.nodes > 1 else ""
    title = f"shared by {found.ranks}{nodes}"
    table = _table(title, show_header=False)
    table.add_column("")
    table.add_column("", overflow="fold")
    sent = found.traffic
    table.add_row("base", found.base)
    table.add_row("examples", found.split)
    gradients = f"{as_gib(sent.gradients_bytes)} GiB sent by each once a step"
    table.add_row("gradients", gradients + _taking(sent.gradients_seconds, f", over {sent.link}"))
    if sent.weights_bytes:
        weights = f"{as_gib(sent.weights_bytes)} GiB received by each in a step"
        table.add_row("weights", weights + _taking(sent.weights_seconds, " behind the products"))
    if found.step_seconds and found.waited_share is not None:
        step = (
            f"{_seconds(found.step_seconds)}, {found.waited_share:.1%} of it waiting for the others"
        )
        table.add_row("a step", step)
    if found.efficiency is not None:
        gain = f"{found.efficiency * found.ranks:.1f} times one GPU: {found.efficiency:.0%} each"
        if found.one_gpu_choices != "nothing recomputed":
            gain += f" (one GPU: {found.one_gpu_choices})"
        table.add_row("gain", gain)
    for warning in found.warnings:
        table.add_row(Text("warning", style="yellow"), warning)
    return table


def _taking(seconds: float | None, how: str) -> str:
    return "" if seconds is None else f": {_seconds(seconds)}{how}"


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.2g} ms" if seconds < 0.0995 else f"{seconds:.2f} s"


def speed_text(found: Forecast) -> Text:
    """Describe the expected speed and its basis."""
    if found.speed is None:
        return Text(f"speed: no estimate, {found.no_speed}", style="dim")
    rate = found.speed.tokens_per_second
    per_million = 1e6 / rate / 60
    text = Text("about ")
    text.append(f"{float(f'{rate:.3g}'):,.0f} tokens/s", style="bold")
    text.append(f", a million tokens in {_minutes(per_million)} ({found.speed.basis})")
    return text


def _minutes(minutes: float) -> str:
    if minutes < 1:
        return f"{60 * minutes:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _changes(changes: tuple[Suggestion, ...], title: str) -> Table:
    table = _table(title)
    # A setting is never broken: it is there to be copied.
    longest = max(len(word) for change in changes for word in change.flags.split())
    table.add_column("change", overflow="fold", ratio=2, min_width=longest)
    for column in ("GiB", "saves", "speed"):
        table.add_column(column, justify="right")
    table.add_column("and costs", overflow="fold", style="dim", ratio=2)
    for change in changes:
        speed = "" if change.slower is None else f"{-change.slower:+.0%}"
        saved = as_gib(change.saved_bytes)
        flags, price = Text(change.flags), Text(change.cost)
        table.add_row(flags, as_gib(change.total_bytes), saved, speed, price)
    return table


def as_gib(size: int) -> str:
    """Format bytes in GiB with two digits, or three for small sizes."""
    if size < GIB / 200:
        return f"{size / GIB:.3f}" if size else "0"
    return f"{size / GIB:.2f}"
