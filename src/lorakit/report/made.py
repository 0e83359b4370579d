"""The record of a run enters; what it was made with, and what was made of it, leave as HTML."""

from __future__ import annotations

import json
import shlex
from typing import Any

from lorakit.page import escape, facts, table
from lorakit.report.read import PATHS, Record

GIB = 2**30


def exports(record: Record) -> list[str]:
    """What was written, and how near it is to the adapter."""
    if not record.exports:
        way = "<code>lorakit export RUN --to merged</code> (or gguf, ollama, vllm, hub ...)"
        return [
            f'<p class="soft">Nothing yet. {way} writes another form and compares it with the '
            "adapter.</p>"
        ]
    rows = []
    for name, found in record.exports.items():
        rows.append(_compared(name, found))
        inner = {f"{name}: {k}": v for k, v in found.items() if isinstance(v, dict)}
        rows += [_compared(k, v) for k, v in inner.items() if {"kl_per_token", "tensors"} & set(v)]
    head = ("Form", "KL, nats a token", "same top token", "same greedy answer")
    effects = [v.get("base_kl_per_token") for v in record.exports.values()]
    effect = next((e for e in effects if e), None)
    words = "Compared with the adapter on its base, in float32, on held-out prompts."
    if effect:
        words += f" For scale: the untuned base is {effect:.2g} nats a token away."
    return [table(head, rows), f'<p class="soft">{words}</p>']


def _compared(name: str, found: dict[str, Any]) -> tuple[str, str, str, str]:
    if "tensors" in found:
        words = f"all {found['tensors']} tensors are base and adapter summed; "
        words += f"{found['update_kept']:.1%} of the update is left after the cast"
        return escape(name), escape(words), "", ""
    if "kl_per_token" not in found:
        return escape(name), escape(f"not compared: {found.get('skipped', 'no figures')}"), "", ""
    return (
        escape(name),
        f"{found['kl_per_token']:.2e}" if found["kl_per_token"] else "0",
        f"{found['top1_agreement']:.1%} of {found['positions']:,}",
        f"{found['greedy_equal']:.0%} of {found['prompts']:,}",
    )


def recipe(record: Record) -> list[str]:
    """What was chosen first, then what was derived, then the defaults."""
    groups: dict[str, list[str]] = {"chosen": [], "derived": [], "default": []}
    for key in record.shown:
        origin = record.origins.get(key, "default")
        kind = "default" if origin.startswith("default") else "chosen"
        groups["derived" if origin.startswith("derived") else kind].append(key)
    first = [_setting(record, key) for key in groups["chosen"] + groups["derived"]]
    rest = "".join(_default(record, key) for key in groups["default"])
    return [
        f'<div class="settings">{table(("Setting", "Value", "From"), first)}</div>',
        f"<details><summary>{len(groups['default'])} settings at their defaults</summary>"
        f'<p class="defaults">{rest}</p></details>',
    ]


def _setting(record: Record, key: str) -> tuple[str, str, str]:
    origin = escape(record.origins.get(key, "default"))
    return f"<code>{key}</code>", _value(record, key), origin


def _default(record: Record, key: str) -> str:
    why = escape(record.origins.get(key, "default").removeprefix("default"))
    said = f' <em class="soft">{why}</em>' if why else ""
    return f"<span><code>{key}</code> {_value(record, key)}{said}</span>"


def _value(record: Record, key: str) -> str:
    value = record.shown[key]
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def environment(record: Record) -> str:
    """The machine and the versions."""
    found = record.environment
    if not found:
        return '<p class="soft">This run has no environment.json.</p>'
    versions = ", ".join(f"{k} {v}" for k, v in record.versions.items())
    reasons = found.get("reasons", {})
    return facts(
        {
            "Device": escape(
                f"{found['device']}, {found['memory_bytes'] / GIB:.1f} GiB ({reasons.get('kind')})"
            ),
            **({"Ranks": escape(reasons["ranks"])} if "ranks" in reasons else {}),
            "Type": escape(f"{found['dtype']}: {reasons.get('dtype')}"),
            "Python": escape(f"{found['python']} on {found['system']}"),
            "Versions": escape(versions),
        }
    )


def reproduce(record: Record) -> list[str]:
    """Commands and a recipe that give this run again."""
    pins = " ".join(shlex.quote(f"{k}=={v.partition('+')[0]}") for k, v in record.versions.items())
    kept = {
        key: value
        for key, value in record.shown.items()
        if not record.origins.get(key, "default").startswith("default") and key != "output_dir"
    }
    kept["seed"] = record.recipe.seed
    text = "".join(f"{k}: {json.dumps(v, ensure_ascii=False)}\n" for k, v in kept.items())
    lines = [f"pip install {pins}", "lorakit train recipe.yaml"] if pins else []
    local = [k for k in PATHS if k in kept and kept[k] != _written(record, k)]
    words = "With the same data and seed; on a CPU to the same bits on the same kind of processor."
    if local:
        words += f" {' and '.join(local)}: names of local files; put the path of yours."
    return [
        f"<pre><code>{escape(chr(10).join(lines))}</code></pre>",
        f"<p>recipe.yaml:</p><pre><code>{escape(text)}</code></pre>",
        f'<p class="soft">{words} The full one is <code>recipe.yaml</code> in this folder.</p>',
    ]


def _written(record: Record, key: str) -> Any:
    return record.recipe.model_dump(mode="json")[key]
