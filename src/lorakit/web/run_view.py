"""Values of the pages about one run and about several runs, from the files of their folders.

Each section is made on its own: a file with unexpected contents costs its section, not the page.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.recipe.schema import Recipe
from lorakit.report.tables import duration, export_rows, settings_rows
from lorakit.storage.run_dir import ADAPTER_WEIGHTS, RunDir
from lorakit.storage.units import GIB
from lorakit.train.diagnostics import RunMonitor, planned_rate
from lorakit.web.curves import Metrics
from lorakit.web.workspace import Settings, Summary, Workspace, read_facts, read_settings, total_of

CHARTS = (
    ("loss", "Loss", "nats a token", ("loss", "eval_loss")),
    ("rate", "Learning rate", "", ("learning_rate",)),
    ("norm", "Gradient norm", "", ("grad_norm",)),
    ("speed", "Speed", "tokens a second", ("tokens_per_second",)),
    ("memory", "Memory", "GB", ("memory_gb",)),
)
NAMES = {
    "loss": "training loss",
    "eval_loss": "held-out loss",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens/s",
    "memory_gb": "memory, GB",
}
# Files that may be downloaded from a run.
DOWNLOADS = (
    *("recipe.yaml", "metrics.jsonl", "data_report.json", "plan.json", "environment.json"),
    *("eval.json", "validation.jsonl", "export/verify.json", "report.html"),
    *("adapter/adapter_config.json", f"adapter/{ADAPTER_WEIGHTS}"),
)
# Part of the tokens from which on the questions must be trained, too.
NEARLY_ALL = 0.97
TABLE_ROWS = 20


def section(build: Callable[[], Any], default: Any) -> Any:
    """Value of `build`, or `default` if a file has unexpected contents."""
    try:
        return build()
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return default


def run_values(workspace: Workspace, run: RunDir, summary: Summary) -> dict[str, Any]:
    """Values of the page of one run."""
    settings = recipe_settings(run)
    metrics = workspace.metrics(run)
    report, plan = read_facts(run.data_report), read_facts(run.plan)
    evaluation = read_facts(run.eval)
    return {
        "run": summary,
        "settings": settings_rows(settings.values, settings.origins),
        "notes": run_notes(run, settings, metrics, report),
        "charts": CHARTS,
        "names": NAMES,
        "bounds": section(lambda: bounds_of(settings, plan), {}),
        "rows": curve_rows(metrics),
        "scores": section(lambda: _scores(evaluation), []),
        "samples": section(lambda: _samples(evaluation), []),
        "exports": section(lambda: export_rows(read_facts(run.export / "verify.json")), []),
        "memory": section(lambda: _memory(plan, metrics), []),
        "data": section(lambda: _data(report), []),
        "faults": section(lambda: _faults(report), []),
        "files": [name for name in DOWNLOADS if (run.path / name).is_file()],
    }


def recipe_settings(run: RunDir) -> Settings:
    """Settings of a run; none if its recipe is not written yet, or damaged."""
    try:
        return read_settings(run)
    except LorakitError:
        return Settings({}, {})


def bounds_of(settings: Settings, plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Horizontal line of a chart by its key: what was planned, or where gradients are clipped."""
    found = {
        "tokens_per_second": ("plan", plan.get("tokens_per_second")),
        "memory_gb": ("plan", (plan.get("total_bytes") or 0) / 1e9 or None),
        "grad_norm": ("clipped above", settings.values.get("max_grad_norm")),
    }
    return {
        key: {"name": name, "value": float(value)}
        for key, (name, value) in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def curve_rows(metrics: Metrics) -> list[tuple[str, ...]]:
    """Evenly spaced rows of the curves as text, for a reader without charts."""
    steps = list(metrics.steps.get("loss", ()))
    chosen = sorted({round(i * (len(steps) - 1) / (TABLE_ROWS - 1)) for i in range(TABLE_ROWS)})
    keys = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gb")
    columns = [list(metrics.values.get(key, ())) for key in keys]
    return [
        (
            f"{steps[i]:,.0f}",
            *(f"{c[i]:.4g}" if len(c) > i and c[i] == c[i] else "–" for c in columns),
        )
        for i in chosen
        if 0 <= i < len(steps)
    ]


def run_notes(
    run: RunDir, settings: Settings, metrics: Metrics, report: dict[str, Any]
) -> list[str]:
    """Sentences about what looks wrong in a run, with the likeliest cause."""
    notes: list[str] = section(lambda: _monitor_notes(run, settings, metrics, report), [])
    notes += section(lambda: _mask_notes(report, settings), [])
    notes += section(lambda: _loss_notes(settings, metrics), [])
    for row in metrics.rows[:5]:
        kind = "was skipped: no finite number" if row.get("skipped") else "has a spike in the loss"
        notes.append(f"Step {row['step']:,} {kind}.")
    notes += section(lambda: _fault_notes(report), [])
    return list(dict.fromkeys(notes))


def _monitor_notes(
    run: RunDir, settings: Settings, metrics: Metrics, report: dict[str, Any]
) -> list[str]:
    """The notes that training prints, found again in its rows."""
    recipe = Recipe.model_validate(settings.values)
    monitor = RunMonitor(recipe, planned_rate(run), lambda: "see the log")
    monitor.start(total_of(settings.values, report) or 10**9)
    keys = ("learning_rate", "tokens_per_second", "loss", "grad_norm")
    columns = [metrics.values[key] for key in keys]
    notes = []
    for step, *values in zip(metrics.steps["loss"], *columns, strict=True):
        row = {k: v if v == v else None for k, v in zip(keys, values, strict=True)}
        notes += [f"{note}." for note in monitor.row({"step": int(step), **row})]
    return [note[:1].upper() + note[1:] for note in notes]


def _mask_notes(report: dict[str, Any], settings: Settings) -> list[str]:
    """Note that nearly all or hardly any tokens are trained."""
    share = report["trained_tokens_train"] / report["tokens_train"]
    if share > NEARLY_ALL and settings.values.get("train_on") == "all":
        return [
            f"{share:.0%} of the tokens are trained, questions included: `train_on: responses` "
            "trains the answers only."
        ]
    if share > NEARLY_ALL:
        return [
            f"{share:.0%} of the tokens are trained: the rows were read as plain text, without "
            "questions; see the token view of the data."
        ]
    if share < 0.02:
        return [f"Only {share:.1%} of the tokens are trained; see the token view of the data."]
    return []


def _fault_notes(report: dict[str, Any]) -> list[str]:
    """Faults of the data that concern at least a tenth of the examples, or more held-out rows."""
    sizes = {True: report["examples_val"], False: report["examples_train"]}
    return [
        f"Data: {fault['count']:,} × {fault['kind']}: {fault['action']}."
        for fault in report["faults"]
        if fault["count"] >= 0.1 * sizes[fault["kind"].startswith("held-out")]
    ]


def _loss_notes(settings: Settings, metrics: Metrics) -> list[str]:
    """Note a loss that rises, in training or on held-out rows."""
    losses = [y for y in metrics.values["loss"] if y == y]
    pairs = zip(
        metrics.steps.get("eval_loss", []), metrics.values.get("eval_loss", []), strict=True
    )
    held = [(x, y) for x, y in pairs if y == y]
    notes, part = [], max(1, len(losses) // 5)
    first, last = (sum(side) / part for side in (losses[:part], losses[-part:]))
    if len(losses) >= 10 and last > 1.05 * first:
        notes.append(
            f"The loss rose from {first:.3f} to {last:.3f}: likely learning_rate is too high "
            f"({settings.values.get('learning_rate')}; LoRA is used to 1e-4)."
        )
    if held:
        best = min(held, key=lambda pair: pair[1])
        if held[-1][1] > 1.03 * best[1]:
            notes.append(
                f"The held-out loss rises since step {best[0]:,.0f} ({best[1]:.3f} to "
                f"{held[-1][1]:.3f}): the model learns its data by heart. Train fewer epochs, or "
                "set load_best_model_at_end."
            )
    return notes


def _scores(evaluation: dict[str, Any]) -> list[tuple[str, str, str]]:
    base, tuned = evaluation["base"], evaluation["tuned"]
    rows = [
        (name, f"{base[key]:,.4g}", f"{tuned[key]:,.4g}")
        for key, name in (("loss", "held-out loss"), ("perplexity", "perplexity"))
    ]
    for name, mean in (evaluation.get("metrics") or {}).items():
        rows.append((str(name), f"{mean['base']:.4g}", f"{mean['tuned']:.4g}"))
    return rows


def _samples(evaluation: dict[str, Any]) -> list[dict[str, str]]:
    keys = ("prompt", "base", "tuned", "reference")
    return [{k: str(sample[k]).strip() for k in keys} for sample in evaluation["samples"][:50]]


def _memory(plan: dict[str, Any], metrics: Metrics) -> list[tuple[str, float, str]]:
    """(part, bytes, text) of the plan, and the largest measured memory."""
    rows = [(str(name), float(size)) for name, size in plan["parts"].items()]
    rows = [(name, size) for name, size in rows if size >= plan["total_bytes"] / 500]
    rows.append(("planned", float(plan["total_bytes"])))
    measured = [y for y in metrics.values.get("memory_gb", []) if y == y]
    if measured:
        rows.append(("measured", max(measured) * 1e9))
    return [(name, size, f"{size / GIB:.2f} GiB") for name, size in rows]


def _data(report: dict[str, Any]) -> list[tuple[str, str]]:
    share = report["trained_tokens_train"] / max(1, report["tokens_train"])
    sources = [f"{s['source']}: {s['rows']:,} rows, {s['format']}" for s in report["sources"]]
    return [
        ("Sources", "; ".join(sources)),
        ("Examples", f"{report['examples_train']:,} trained, {report['examples_val']:,} held out"),
        ("Tokens", f"{report['trained_tokens_train']:,} of {report['tokens_train']:,} are trained "
                   f"({share:.0%})"),
        ("Longest", f"{report['longest_example']:,} of {report['cutoff_len']:,} tokens"),
    ]  # fmt: skip


def _faults(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (f"{f['count']:,} × {f['kind']}", str(f["action"]), ", ".join(map(str, f["first_rows"])))
        for f in report["faults"]
    ]


def compare_values(workspace: Workspace, names: list[str]) -> dict[str, Any]:
    """Values of the page that compares runs: settings that differ, results, answers."""
    runs = [(name, workspace.find(name)) for name in names]
    summaries = [workspace.summary(name, run.path) for name, run in runs]
    settings = [recipe_settings(run).values for _, run in runs]
    keys = dict.fromkeys(key for values in settings for key in values if key != "output_dir")
    rows = [(key, [_text(values.get(key)) for values in settings]) for key in keys]
    evaluations = [read_facts(run.eval) for _, run in runs]
    answers: dict[str, list[str]] = {}
    for number, evaluation in enumerate(evaluations):
        for sample in section(partial(_samples, evaluation), []):
            answers.setdefault(sample["prompt"], [""] * len(runs))[number] = sample["tuned"]
    return {
        "runs": summaries,
        "differing": [(key, row) for key, row in rows if len(set(row)) > 1],
        "results": [
            ("status", [run.status for run in summaries]),
            ("steps", [f"{run.step:,}" for run in summaries]),
            ("last loss", [_shown(run.loss) for run in summaries]),
            ("best held-out loss", [_shown(run.best) for run in summaries]),
            ("perplexity", [section(partial(_perplexity, e), "–") for e in evaluations]),
            ("tokens/s", [_shown(run.speed) for run in summaries]),
            ("size", [f"{run.size / 1e6:,.1f} MB" for run in summaries]),
        ],
        "answers": [(q, a) for q, a in answers.items() if sum(map(bool, a)) > 1][:10],
        "charts": CHARTS[:3],
        "names": NAMES,
    }  # fmt: skip


def _perplexity(evaluation: dict[str, Any]) -> str:
    return f"{evaluation['tuned']['perplexity']:.4g}"


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def state_of(summary: Summary) -> dict[str, Any]:
    """State of a run for its live page."""
    return {
        "status": summary.status,
        "step": summary.step,
        "steps": summary.steps,
        "loss": summary.loss,
        "text": progress_text(summary),
    }


def progress_text(summary: Summary) -> str:
    """One line: status, step, loss, remaining time."""
    parts = [summary.status, f"step {summary.step:,}"]
    if summary.steps:
        parts[1] += f" of {summary.steps:,}"
    if summary.loss is not None:
        parts.append(f"loss {summary.loss:.4f}")
    if summary.left is not None:
        parts.append(f"about {duration(summary.left)} left")
    return ", ".join(parts)


def download_of(run: RunDir, file: str, workspace: Workspace) -> Path | None:
    """Path of a file that may be downloaded; None for any other name."""
    path = run.path / file
    return path if file in DOWNLOADS and path.is_file() and workspace.contains(path) else None
