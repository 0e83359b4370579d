"""A Forecast enters; the same tables as on a terminal leave, as HTML for a notebook's cell.

Bars are letters: a forge that strips styles from notebooks still shows them.
"""

from __future__ import annotations

from lorakit.page import escape, fragment, table
from lorakit.planning.forecast import Forecast
from lorakit.planning.show import GIB, around, as_gib, speed_words

BAR = 24
_STYLE = """
.bar { color: var(--blue); white-space: nowrap; letter-spacing: -.02em; }
table { width: auto; } td { font-variant-numeric: tabular-nums; padding-right: 1.2rem; }
td:nth-child(n+2):nth-last-child(n+2) { white-space: nowrap; }
"""


def cell(found: Forecast) -> str:
    """The verdict, what it is made of, and the ways out."""
    plan, recipe = found.training, found.recipe
    needs, has = plan.total_bytes / GIB, found.device.memory_bytes / GIB
    fits = "Fits" if plan.fits else "Does not fit"
    how = (
        f" with {plan.describe()}" if plan.fits and plan.describe() != "nothing recomputed" else ""
    )
    bad = "" if plan.fits else " bad"
    size = f"{found.trainable / 1e6:.1f} M of {found.parameters / 1e9:.2f} B parameters train"
    rows = f"{recipe.micro_batch_size} x {recipe.gradient_accumulation_steps} examples of "
    body = [
        f"<h1>{escape(recipe.model)} · {recipe.method}</h1>",
        f'<p class="verdict{bad}">{fits}{escape(how)}: {needs:.1f} GiB needed, {has:.1f} GiB on '
        f"{escape(found.device.name)}</p>",
        f'<p class="soft">{rows}{recipe.cutoff_len:,} tokens, rank {recipe.lora_r}, '
        f"{found.device.dtype}; {size}; {escape(speed_words(found).plain)}</p>",
        "<h2>While it trains</h2>",
        _training(found),
        "<h2>Before and after</h2>",
        table(
            ("", "GiB", "most of it"),
            [(escape(name), size, escape(most)) for name, size, most in around(found)],
        ),
        *_changes(found),
    ]
    return fragment(body, _STYLE)


def _training(found: Forecast) -> str:
    total = max(found.training.total_bytes, 1)
    rows = [
        (escape(name), as_gib(size), f'<span class="bar">{"█" * round(BAR * size / total)}</span>')
        for name, size in found.device_parts["training"].items()
    ]
    rows.append(("<b>sum</b>", f"<b>{as_gib(found.training.total_bytes)}</b>", ""))
    return table(("part", "GiB", ""), rows)


def _changes(found: Forecast) -> list[str]:
    if not found.changes:
        return []
    if not found.changes[0].fits:
        least = found.changes[0].total_bytes / GIB
        return [f"<p>No setting makes it fit here: the least it can take is {least:.1f} GiB.</p>"]
    title = "What would be faster" if found.fits else "What makes it fit, cheapest first"
    rows = [
        (
            f"<code>{escape(change.flags)}</code>",
            as_gib(change.total_bytes),
            as_gib(change.saved_bytes),
            "" if change.slower is None else f"{-change.slower:+.0%}",
            escape(change.price),
        )
        for change in found.changes
    ]
    return [f"<h2>{title}</h2>", table(("change", "GiB", "saves", "speed", "and costs"), rows)]
