"""Values of the pages about one run and about several runs, from the files of their folders.

Each section is made on its own: a file with unexpected contents costs its section, not the page.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.recipe.loader import ResolvedRecipe, read_resolved
from lorakit.report.load_run import finite
from lorakit.report.tables import (
    ABSENT,
    data_rows,
    differing,
    duration,
    export_rows,
    fault_rows,
    length_rows,
    memory_rows,
    score_rows,
    settings_rows,
    task_rows,
)
from lorakit.storage.run_dir import ADAPTER_WEIGHTS, RunDir
from lorakit.train.diagnostics import run_notes
from lorakit.web.curves import KEYS, Metrics
from lorakit.web.workspace import Summary, Workspace, read_facts

# Charts as (id, title, unit, name of each curve by its key in metrics.jsonl).
CHARTS = (
    ("loss", "Loss", "nats a token", {"loss": "training loss", "eval_loss": "held-out loss"}),
    ("rate", "Learning rate", "", {"learning_rate": "learning rate"}),
    ("norm", "Gradient norm", "", {"grad_norm": "gradient norm"}),
    ("speed", "Speed", "tokens a second", {"tokens_per_second": "tokens/s"}),
    ("memory", "Memory", "GB", {"memory_gb": "memory, GB"}),
)
# Files that may be downloaded from a run.
DOWNLOADS = (
    *("recipe.yaml", "metrics.jsonl", "data_report.json", "plan.json", "environment.json"),
    *("eval.json", "validation.jsonl", "export/verify.json", "report.html"),
    *("adapter/adapter_config.json", f"adapter/{ADAPTER_WEIGHTS}"),
)
TABLE_ROWS, SHOWN_SAMPLES = 20, 50


def section(build: Callable[[], Any], default: Any) -> Any:
    """Value of `build`, or `default` if a file has unexpected contents."""
    try:
        return build()
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return default


def run_values(workspace: Workspace, run: RunDir, summary: Summary) -> dict[str, Any]:
    """Values of the page of one run."""
    resolved, metrics = opened_recipe(run), workspace.metrics(run)
    data, plan, scored = (read_facts(path) for path in (run.data_report, run.plan, run.eval))
    exports = read_facts(run.export / "verify.json")
    values = resolved.recipe.model_dump(mode="json") if resolved else {}
    return {
        "run": summary,
        "settings": settings_rows(values, resolved.origins if resolved else {}),
        "notes": notes_of(resolved, metrics, data, plan, scored),
        "charts": CHARTS,
        "rows": curve_rows(metrics),
        "scores": section(lambda: score_rows(scored), []),
        "tasks": section(lambda: task_rows(scored), []),
        "samples": section(lambda: _samples(scored), []),
        "exports": section(lambda: export_rows(exports), []),
        "memory": section(lambda: memory_rows(plan, metrics.peak("memory_gb")), []),
        "data": section(lambda: data_rows(data), []),
        "lengths": section(lambda: length_rows(data), []),
        "faults": section(lambda: fault_rows(data), []),
        "files": [name for name in DOWNLOADS if (run.path / name).is_file()],
    }


def opened_recipe(run: RunDir) -> ResolvedRecipe | None:
    """Recipe of a run; None if it is not written yet, or damaged."""
    try:
        return read_resolved(run.recipe)
    except LorakitError:
        return None


def notes_of(
    resolved: ResolvedRecipe | None,
    metrics: Metrics,
    data: dict[str, Any],
    plan: dict[str, Any],
    scored: dict[str, Any],
) -> list[str]:
    """Notes on what looks wrong in a run; a damaged file costs those that need it."""
    if resolved is None:
        return []
    planned, held = finite(plan.get("tokens_per_second")), metrics.held_out()

    def notes(data: dict[str, Any], scored: dict[str, Any]) -> list[str]:
        return run_notes(resolved.recipe, metrics.steps(), held, data, scored, planned)

    without = section(partial(notes, {}, {}), [])
    found: list[str] = section(partial(notes, data, scored), without)
    return found


def bounds_of(run: RunDir) -> dict[str, dict[str, Any]]:
    """Horizontal line of a chart by its key: what was planned, or where gradients are clipped."""
    resolved, plan = opened_recipe(run), read_facts(run.plan)
    total = finite(plan.get("total_bytes"))
    found = {
        "tokens_per_second": ("plan", finite(plan.get("tokens_per_second"))),
        "memory_gb": ("plan", total and total / 1e9),
        "grad_norm": ("clipped above", resolved.recipe.max_grad_norm if resolved else None),
    }
    return {key: {"name": n, "value": value} for key, (n, value) in found.items() if value}


def curve_rows(metrics: Metrics) -> list[tuple[str, ...]]:
    """Evenly spaced rows of the curves as text, for a reader without charts."""
    return [
        (f"{row['step']:,}", *(_shown(row.get(key)) for key in KEYS[:-1]))
        for row in metrics.steps(TABLE_ROWS)
    ]


def _samples(evaluation: dict[str, Any]) -> list[dict[str, str]]:
    keys = ("prompt", "base", "tuned", "reference")
    shown = evaluation["samples"][:SHOWN_SAMPLES]
    return [{k: str(sample[k]).strip() for k in keys} for sample in shown]


def compare_values(workspace: Workspace, names: list[str]) -> dict[str, Any]:
    """Values of the page that compares runs: settings that differ, results, answers."""
    runs = [(name, workspace.find(name)) for name in names]
    summaries = [workspace.summary(name, run.path) for name, run in runs]
    recipes = [opened_recipe(run) for _, run in runs]
    settings = [each.recipe.model_dump(mode="json") if each else {} for each in recipes]
    answers: dict[str, list[str]] = {}
    for number, (_, run) in enumerate(runs):
        for sample in section(partial(_samples, read_facts(run.eval)), []):
            answers.setdefault(sample["prompt"], [""] * len(runs))[number] = sample["tuned"]
    results = {
        "status": [run.status for run in summaries],
        "steps": [f"{run.step:,}" for run in summaries],
        "last loss": [_shown(run.loss) for run in summaries],
        "held-out loss": [_shown(run.held_out) for run in summaries],
        "tokens/s": [_shown(run.speed) for run in summaries],
        "size": [f"{run.size / 1e6:,.1f} MB" for run in summaries],
    }
    return {
        "runs": summaries,
        "differing": [(key, *texts) for key, texts in differing(settings).items()],
        "results": [(key, *texts) for key, texts in results.items()],
        "answers": [(q, a) for q, a in answers.items() if sum(map(bool, a)) > 1][:10],
        "charts": CHARTS[:3],
    }


def _shown(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4g}"


def progress_text(summary: Summary) -> str:
    """One line: status, step, loss, remaining time."""
    steps = f" of {summary.steps:,}" if summary.steps else ""
    parts = [summary.status, f"step {summary.step:,}{steps}"]
    if summary.loss is not None:
        parts.append(f"loss {summary.loss:.4f}")
    if summary.left is not None:
        parts.append(f"about {duration(summary.left)} left")
    return ", ".join(parts)


def download_of(run: RunDir, file: str, workspace: Workspace) -> Path | None:
    """Path of a file that may be downloaded; None for any other name."""
    path = run.path / file
    return path if file in DOWNLOADS and path.is_file() and workspace.contains(path) else None
