"""Rows of tables that the report, the comparison and the live page of runs share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.display.evaluation_view import score_cells
from lorakit.report.load_run import without_path
from lorakit.storage.units import GIB
from lorakit.types import TaskScore

ABSENT = "–"


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


def score_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(measure, base, tuned, change) of held-out rows: loss and perplexity, further metrics."""
    rows: list[tuple[str, ...]] = []
    if evaluation.get("base"):
        base, tuned = evaluation["base"], evaluation["tuned"]
        change, ratio = tuned["loss"] - base["loss"], tuned["perplexity"] / base["perplexity"]
        losses = (f"{base['loss']:.4f}", f"{tuned['loss']:.4f}", f"{change:+.4f}")
        values = (f"{side['perplexity']:,.2f}" for side in (base, tuned))
        rows += [("loss, nats a token", *losses), ("perplexity", *values, f"{ratio - 1:+.1%}")]
    for name, mean in (evaluation.get("metrics") or {}).items():
        change = mean["tuned"] - mean["base"]
        rows.append((str(name), f"{mean['base']:.4g}", f"{mean['tuned']:.4g}", f"{change:+.4g}"))
    return rows


def task_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Table rows of the task scores, as `SCORE_HEADS`: before, after, change and its interval."""
    names = {field.name for field in dataclasses.fields(TaskScore)}
    scores = evaluation.get("tasks") or []
    found = [TaskScore(**{k: v for k, v in each.items() if k in names}) for each in scores]
    return [score_cells(score) for score in found]


def data_rows(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of a data report: sources, examples, tokens, template."""
    share = data["trained_tokens_train"] / max(1, data["tokens_train"])
    sources = [
        f"{without_path(s['source'])}: {s['rows']:,} rows, {s['format']}" for s in data["sources"]
    ]
    return [
        ("Sources", "; ".join(sources)),
        ("Examples", f"{data['examples_train']:,} trained on, {data['examples_val']:,} held out"),
        ("Tokens", f"{data['trained_tokens_train']:,} of {data['tokens_train']:,} are trained "
                   f"({share:.0%})"),
        ("Longest", f"{data['longest_example']:,} tokens; cutoff_len {data['cutoff_len']:,}"),
        ("Template", str(data["template"])),
    ]  # fmt: skip


def memory_rows(plan: Mapping[str, Any], peak_gb: float | None) -> list[tuple[str, float, str]]:
    """(part, bytes, text) of the planned parts, their sum, and the measured peak if any."""
    total = float(plan["total_bytes"])
    sizes = {name: float(size) for name, size in plan["parts"].items() if size >= total / 500}
    sizes |= {"planned": total} | ({} if peak_gb is None else {"measured": peak_gb * 1e9})
    return [(name, size, f"{size / GIB:.2f} GiB") for name, size in sizes.items()]


def fault_rows(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Table rows of the faults of a data report: count and kind, action, first rows."""
    return [
        (f"{f['count']:,} × {f['kind']}", str(f["action"]), ", ".join(map(str, f["first_rows"])))
        for f in data.get("faults", [])
    ]


def length_rows(data: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """Bars of the lengths of a data report."""
    bars = (data.get("lengths") or {}).get("bars", [])
    return [(f"{b['begin']:,}–{b['end']:,}", b["count"], f"{b['count']:,}") for b in bars]


def differing(
    values: Sequence[Mapping[str, Any]], shown: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, tuple[str, ...]]:
    """Text in each run of the settings that are not equal in all of them, but the output folder.

    Args:
        shown: values to print instead, such as names without their folders; equal ones of different
            values are numbered.
    """
    found = {}
    for key in dict.fromkeys(key for each in values for key in each):
        column = [each.get(key) for each in values]
        if key != "output_dir" and any(value != column[0] for value in column):
            found[key] = _distinct(
                [setting_text(each.get(key)) for each in shown or values], column
            )
    return found


def _distinct(texts: Sequence[str], values: Sequence[Any]) -> tuple[str, ...]:
    """Number equal texts of different values, such as files of one name in two folders."""
    if len(set(texts)) > 1:
        return tuple(texts)
    kinds: list[Any] = []
    for value in values:
        if value not in kinds:
            kinds.append(value)
    return tuple(f"{text} #{kinds.index(v) + 1}" for text, v in zip(texts, values, strict=True))


def setting_text(value: Any) -> str:
    """Format a setting: text as it is, other values as JSON, None as a dash."""
    if value is None:
        return ABSENT
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
