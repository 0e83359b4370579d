"""Write the report of a run, `report.html`, from the record of its folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from lorakit.display.charts import Chart, Series, line_chart, trend
from lorakit.display.evaluation_view import SCORE_HEADS
from lorakit.errors import LorakitError, RunError
from lorakit.model.load import public_name
from lorakit.report.html import render_page
from lorakit.report.load_run import PATHS, Record, finite, read_run, without_path
from lorakit.report.tables import (
    data_rows,
    duration,
    export_rows,
    fault_rows,
    length_rows,
    memory_rows,
    score_rows,
    settings_rows,
    task_rows,
)
from lorakit.storage.best_record import LOSS
from lorakit.storage.run_dir import RunDir, write_text
from lorakit.storage.units import GIB
from lorakit.train.diagnostics import run_notes
from lorakit.train.rollout_alarms import RolloutAlarms


def write_report(run: RunDir, output: Path | None = None) -> Path:
    """Write the page of a finished or stopped run; return its path.

    Raises:
        LorakitError: a file of the run is damaged, or the page cannot be written.
    """
    target = output or run.report
    record = read_run(run)
    try:
        text = report_page(record)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        TemplateError,
    ) as error:
        raise RunError(
            f"{run.path}: one of its files has unexpected contents "
            f"({type(error).__name__}: {error})",
            hint="check if one of its JSON files was edited",
        ) from error
    write_text(target, text)
    return target


def renew_report(run: RunDir, note: Callable[[str], None]) -> bool:
    """Call `write_report` without raising; return True if the page was written."""
    try:
        write_report(run)
    except Exception as error:
        reason = error.message if isinstance(error, LorakitError) else f"{error!r}"
        note(f"report.html was not written ({reason}); all other files are complete")
        return False
    return True


def report_page(record: Record) -> str:
    """Render the page of a run."""
    data, plan = record.data, record.plan
    given = record.shown["data"]
    sources = [given] if isinstance(given, str) else given
    adapter_bytes = (plan.get("parts") or {}).get("adapters (float32)")
    distances = (facts.get("base_kl_per_token") for facts in record.exports.values())
    return render_page(
        "report.html.jinja",
        run=record,
        model=public_name(str(record.shown["model"])),
        sources=[s["source"] if isinstance(s, dict) else s for s in sources],
        trained=adapter_bytes and adapter_bytes / 4,
        scores=score_rows(record.evaluation or {}),
        rollouts=record.rollouts,
        alarms=_alarms(record),
        tasks=task_rows(record.evaluation or {}),
        judge=(record.evaluation or {}).get("judge"),
        tiles=_tiles(record),
        charts=_charts(record) if record.steps else {},
        memory=_memory(record),
        notes=_notes(record),
        facts=data_rows(data) if data else [],
        length_bars=length_rows(data),
        faults=fault_rows(data),
        score_heads=SCORE_HEADS,
        exports=export_rows(record.exports),
        base_distance=next(filter(None, distances), None),
        settings=settings_rows(record.shown, record.origins),
        reproduce=_reproduce(record),
    )


def _notes(record: Record) -> list[str]:
    planned = finite(record.plan.get("tokens_per_second"))
    return run_notes(
        record.recipe, record.steps, record.held, record.data, record.scored or {}, planned
    )


def loss_series(record: Record) -> list[Series]:
    """Series of the loss, its running mean, and the held-out losses if there are any."""
    held = [(row["step"], finite(row["eval_loss"])) for row in record.held]
    if record.scored and record.finished and record.steps:
        last = record.steps[-1]["step"]
        if record.best and record.best.used:
            last = record.best.step
        final = record.scored.get("preferences") or record.scored["tuned"]
        held = [p for p in held if p[0] != last] + [(last, finite(final["loss"]))]
    return [*trend(record.column("loss")), Series(held, "held", "held out")]


def _tiles(record: Record) -> list[tuple[str, str]]:
    """Main numbers of the run, as (name, value)."""
    losses, memory = record.numbers("loss"), record.numbers("memory_gb")
    tokens = sum(record.numbers("tokens"))
    tiles = []
    if record.scored:
        base_and_tuned = [record.scored[k]["loss"] for k in ("base", "tuned")]
        tiles.append(
            ("held-out loss, base → tuned", " → ".join(f"{loss:.3f}" for loss in base_and_tuned))
        )
    elif losses:
        tiles.append(("training loss", f"{losses[0]:.3f} → {losses[-1]:.3f}"))
    held = ((record.evaluation or {}).get("metrics") or {}).get("reward")
    if held:
        values = f"{held['base']:.3f} → {held['tuned']:.3f}"
        tiles.append(("reward of held-out prompts, base → tuned", values))
    elif rewards := record.numbers("reward"):
        tiles.append(("reward", f"{rewards[0]:.3f} → {rewards[-1]:.3f}"))
    preferences = (record.scored or {}).get("preferences") or {}
    if (accuracy := preferences.get("rewards/accuracies")) is not None:
        tiles.append(("held-out pairs with the chosen answer preferred", f"{accuracy:.0%}"))
    if (margin := preferences.get("rewards/margins")) is not None:
        tiles.append(("held-out reward margin", f"{margin:.3f}"))
    if record.steps:
        tiles.append(("optimizer steps", f"{record.steps[-1]['step']:,}"))
        tiles.append(("spent in steps", duration(record.seconds)))
    if record.best:
        used = "" if record.best.used else ", not the result"
        best = (
            "lowest held-out loss" if record.best.metric == LOSS else f"best {record.best.metric}"
        )
        tiles.append((best, f"step {record.best.step:,}{used}"))
    if record.start:
        tiles.append(("started from the adapter", _start_of(record.start)))
    if tokens and record.seconds:
        tiles.append(("tokens a second", f"{tokens / record.seconds:,.0f}"))
    if memory:
        tiles.append(("largest memory", f"{max(memory) * 1e9 / GIB:.2f} GiB"))
    return tiles


def _start_of(start: dict[str, Any]) -> str:
    """Name an adapter and the data that it was trained on before, as far back as recorded."""
    names = [str(start.get("adapter", "?"))]
    while start:
        given = (start.get("recipe") or {}).get("data") or []
        for source in [given] if isinstance(given, str) else given:
            path = source["source"] if isinstance(source, dict) else str(source)
            names.append(str(without_path(path)))
        start = start.get("start") or {}
    return names[0] + (f" (on {', '.join(names[1:])})" if names[1:] else "")


def _charts(record: Record) -> dict[str, Chart | None]:
    memory = [(x, y and y * 1e9 / GIB) for x, y in record.column("memory_gb")]
    clip, expected = record.recipe.max_grad_norm, finite(record.plan.get("tokens_per_second"))
    planned = (finite(record.plan.get("total_bytes")) or 0) / GIB
    norm = [*trend(record.column("grad_norm")), *_bound(record, clip, f"clipped above {clip:g}")]
    speed = trend(record.column("tokens_per_second"))
    if expected:
        speed += _bound(record, expected, f"the plan expected {expected:,.0f}")
    used = [Series(memory)]
    if planned:
        used += _bound(record, planned, f"the plan: {planned:.2f} GiB")
    rate = [Series(record.column("learning_rate"))]
    return {
        "loss": line_chart("Loss", loss_series(record)),
        "grad_norm": line_chart("Gradient norm", norm),
        "learning_rate": line_chart("Learning rate", rate, zero=True),
        "speed": line_chart("Speed", speed, zero=True),
        "memory": line_chart("Memory", used, zero=True),
        **_reward_charts(record),
    }


def _reward_charts(record: Record) -> dict[str, Chart | None]:
    """Rewards and accuracy of a run on preference data."""
    margin = record.column("rewards/margins")
    if reward := record.column("reward"):
        return _rollout_charts(record, reward)
    if not margin:
        return {}
    held = [
        (row["step"], finite(row["eval_rewards/margins"]))
        for row in record.held
        if "eval_rewards/margins" in row
    ]
    charts = {"margin": line_chart("Margin", [*trend(margin), Series(held, "held", "held out")])}
    if accuracy := record.column("rewards/accuracies"):
        charts["accuracy"] = line_chart("Accuracy", trend(accuracy), zero=True)
    return charts


def _rollout_charts(record: Record, reward: list[Any]) -> dict[str, Chart | None]:
    """Reward, length, entropy and KL of a run with sampled completions."""
    names = {name: name.removeprefix("rewards/") for row in record.steps[:1] for name in row
             if name.startswith("rewards/") and not name.endswith("/std")}  # fmt: skip
    parts = [Series(record.column(key), "curve", name) for key, name in names.items()]
    charts = {
        "reward": line_chart("Reward", [*trend(reward), *(parts if len(parts) > 1 else [])]),
        "length": line_chart("Length", trend(record.column("completions/mean_length")), zero=True),
        "entropy": line_chart("Entropy", trend(record.column("entropy")), zero=True),
    }
    if kl := record.column("kl"):
        charts["kl"] = line_chart("KL", trend(kl), zero=True)
    return charts


def _alarms(record: Record) -> list[str]:
    """Alarms of a run with sampled completions, computed again from its metrics."""
    if record.recipe.objective != "grpo" or not record.steps:
        return []
    names = [key.removeprefix("rewards/").removesuffix("/std") for key in record.steps[0]
             if key.startswith("rewards/") and key.endswith("/std")]  # fmt: skip
    if len(names) != len(record.recipe.rewards):
        return []
    alarms = RolloutAlarms(record.recipe, names)
    return [text for row in record.steps for text in alarms.row(dict(row))]


def _bound(record: Record, value: float, label: str) -> list[Series]:
    first, last = record.steps[0]["step"], record.steps[-1]["step"]
    return [Series([(first, value), (last, value)], "bound", label)]


def _memory(record: Record) -> dict[str, Any] | None:
    """Planned parts as bars, and the relative difference of the measurement from their sum."""
    parts, planned = record.plan.get("parts"), finite(record.plan.get("total_bytes"))
    if not parts or not planned:
        return None
    peak = max(record.numbers("memory_gb"), default=None)
    return {
        "bars": memory_rows(record.plan, peak),
        "measured": peak is not None,
        "off": (planned if peak is None else peak * 1e9) / planned - 1,
    }


def _reproduce(record: Record) -> dict[str, Any]:
    """Commands and recipe to repeat this run, and its keys that name local files."""
    pins = " ".join(shlex.quote(f"{k}=={v.partition('+')[0]}") for k, v in record.versions.items())
    settings = {
        key: value
        for key, value in record.shown.items()
        if not record.origins.get(key, "default").startswith("default") and key != "output_dir"
    }
    settings["seed"] = record.recipe.seed
    original = record.recipe.model_dump(mode="json")
    return {
        "commands": f"pip install {pins}\nlorakit train recipe.yaml" if pins else "",
        "recipe": "".join(
            f"{k}: {json.dumps(v, ensure_ascii=False)}\n" for k, v in settings.items()
        ),
        "local": [key for key in PATHS if key in settings and settings[key] != original[key]],
    }
