"""Rows of tables that the report and the live page of a run share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def duration(seconds: float) -> str:
    """Format a duration in at most two units."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def export_rows(exports: Mapping[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """Table rows of each export, and of each nested form."""
    rows = []
    for name, facts in exports.items():
        rows.append(_compared(name, facts))
        inner = {f"{name}: {k}": v for k, v in facts.items() if isinstance(v, dict)}
        rows += [_compared(k, v) for k, v in inner.items() if {"kl_per_token", "tensors"} & set(v)]
    return rows


def _compared(name: str, facts: dict[str, Any]) -> tuple[str, ...]:
    if "tensors" in facts:
        checked = f"all {facts['tensors']} tensors equal the sum of base and adapter; "
        return (
            name,
            f"{checked}{facts['update_kept']:.1%} of the update is left after the cast",
            "",
            "",
        )
    if "kl_per_token" not in facts:
        return name, f"not compared: {facts.get('skipped', 'no figures')}", "", ""
    return (
        name,
        f"{facts['kl_per_token']:.2e}" if facts["kl_per_token"] else "0",
        f"{facts['top1_agreement']:.1%} of {facts['positions']:,}",
        f"{facts['greedy_equal']:.0%} of {facts['prompts']:,}",
    )


def settings_rows(
    values: Mapping[str, Any], origins: Mapping[str, str]
) -> dict[str, list[tuple[str, str, str]]]:
    """(key, value, origin) of chosen and derived settings, and separately of the defaults."""
    rows: dict[str, list[tuple[str, str, str]]] = {"chosen": [], "derived": [], "default": []}
    for key, value in values.items():
        origin = origins.get(key, "default")
        group = next((k for k in ("default", "derived") if origin.startswith(k)), "chosen")
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        rows[group].append((key, text, origin.removeprefix("default").strip()))
    return {"chosen": rows["chosen"] + rows["derived"], "default": rows["default"]}
