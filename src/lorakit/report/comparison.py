"""Compare runs: curves, settings that differ, and evaluations, for a terminal and as one page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorakit.display.charts import RUN_COLORS, Chart, Point, Series, line_chart, trend
from lorakit.errors import RunError
from lorakit.redact import visible
from lorakit.report.html import render_page
from lorakit.report.load_run import Record, finite, held_out_loss, read_run
from lorakit.report.tables import ABSENT, differing, duration
from lorakit.storage.run_dir import RunDir, write_text


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting with its value in each run, as text."""

    key: str
    shown: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Measure:
    """A result with its value in each run; `best` is the index of the best run, if one is best."""

    name: str
    values: tuple[float | None, ...]
    shown: tuple[str, ...]
    best: int | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs in the given order, with what differs between them."""

    names: tuple[str, ...]
    records: tuple[Record, ...]
    settings: tuple[Setting, ...]
    measures: tuple[Measure, ...]
    notes: tuple[str, ...]

    def __rich__(self) -> RenderableType:
        return comparison_view(self)

    @property
    def runs_as_rows(self) -> bool:
        """True if the table of results is narrower with a row for each run."""
        return len(self.names) > len(self.measures)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form: settings and results of each run."""
        return {
            "runs": [
                {
                    "name": name,
                    "finished": record.finished,
                    "settings": {each.key: each.shown[i] for each in self.settings},
                    "results": {each.name: each.values[i] for each in self.measures},
                }
                for i, (name, record) in enumerate(zip(self.names, self.records, strict=True))
            ],
            "best": {m.name: self.names[m.best] for m in self.measures if m.best is not None},
            "notes": list(self.notes),
        }


def compare_runs(runs: Sequence[RunDir]) -> Comparison:
    """Read the records of two or more runs and compare them.

    Raises:
        RunError: fewer than two runs, the same run twice, or a file of a run is damaged.
    """
    paths = [run.path.resolve() for run in runs]
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise RunError(f"{runs[place].path}: given twice", hint="give each run once")
    if len(runs) < 2:
        raise RunError(
            f"found {len(runs)} run to compare, expected two or more",
            hint="name the folders of several runs",
        )
    records = tuple(read_run(run) for run in runs)
    return Comparison(
        _names(paths), records, _settings_that_differ(records), _measures(records), _notes(records)
    )


def write_comparison(
    comparison: Comparison,
    path: Path,
    title: str = "",
    verdict: str = "",
    ends: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the comparison as one HTML page; the folder of `path` is created.

    Args:
        verdict: the result in one sentence, of a page that has one.
        ends: names of runs that ended early, with the reason.
    """
    compared = comparison
    wide = len(compared.settings) < len(compared.names)
    page = render_page(
        "compare.html.jinja",
        title=title or f"{len(compared.names)} runs compared",
        colors=[_color(i) for i in range(len(compared.names))],
        names=compared.names,
        charts=comparison_charts(compared),
        measures=compared.measures,
        runs_as_rows=compared.runs_as_rows,
        settings=_setting_rows(compared, wide),
        wide=wide,
        notes=compared.notes,
        verdict=verdict,
        ends=ends,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


def comparison_charts(comparison: Comparison) -> list[tuple[str, str, Chart]]:
    """Draw the charts as (name, unit, chart); each run has one color in all of them."""
    records = comparison.records
    found: list[tuple[str, str, Chart | None]] = [
        ("Loss", "nats a token", _chart("Loss", [_smooth(r) for r in records])),
    ]
    keys = dict.fromkeys(k for r in records for row in r.held for k in row if k.startswith("eval_"))
    for key in keys:
        if key != "eval_perplexity":
            name = "Held-out loss" if key == "eval_loss" else key
            lines = [[(x[0], x[1]) for x in _held(record, key)] for record in records]
            unit = "nats a token" if key == "eval_loss" else "in training"
            found.append((name, unit, _chart(name, lines)))
    rates = [record.column("learning_rate") for record in records]
    if len({tuple(line) for line in rates}) > 1:
        found.append(("Learning rate", "", _chart("Learning rate", rates, zero=True)))
    return [(name, unit, chart) for name, unit, chart in found if chart is not None]


def comparison_view(comparison: Comparison) -> Group:
    """Render results and differing settings as tables for a terminal."""
    compared = comparison
    cells = [
        [
            Text(text + (" *" if m.best == i else ""), style=_bold(m, i))
            for i, text in enumerate(m.shown)
        ]
        for m in compared.measures
    ]
    heads, firsts = list(compared.names), [measure.name for measure in compared.measures]
    if compared.runs_as_rows:
        cells, heads, firsts = [list(row) for row in zip(*cells, strict=True)], firsts, heads
    results = Table(title="results (* best, in parentheses the change)", title_justify="left")
    results.add_column("run" if compared.runs_as_rows else "", overflow="fold")
    for head in heads:
        results.add_column(Text(visible(head)), justify="right", overflow="fold")
    for first, texts in zip(firsts, cells, strict=True):
        results.add_row(Text(visible(first)), *texts)
    views: list[RenderableType] = [results]
    wide = len(compared.settings) < len(compared.names)
    rows = _setting_rows(compared, wide)
    if len(rows) > 1:
        table = Table(title="settings that differ", title_justify="left")
        for head in rows[0]:
            table.add_column(Text(visible(head)), overflow="fold")
        for row in rows[1:]:
            table.add_row(*(Text(visible(cell)) for cell in row))
        views.append(table)
    else:
        views.append(Text("all settings are equal"))
    views += [Text(f"note: {visible(note)}") for note in compared.notes]
    return Group(*views)


def _setting_rows(compared: Comparison, wide: bool) -> list[list[str]]:
    """Table of the settings with its head: a row for each key, or if `wide` for each run."""
    rows = [["setting", *compared.names]]
    rows += [[each.key, *each.shown] for each in compared.settings]
    if not compared.settings:
        return []
    if wide:
        rows = [list(column) for column in zip(*rows, strict=True)]
        rows[0][0] = "run"
    return rows


def _bold(measure: Measure, place: int) -> str:
    return "bold" if measure.best == place else ""


def _names(paths: Sequence[Path]) -> tuple[str, ...]:
    """Shortest ends of the paths that are all different."""
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = tuple("/".join(path.parts[-length:]) for path in paths)
        if len(set(names)) == len(names):
            return names
    return tuple(map(str, paths))


def _settings_that_differ(records: Sequence[Record]) -> tuple[Setting, ...]:
    """Settings, device and versions that are not equal in all runs."""
    recipes = [record.recipe.model_dump(mode="json") for record in records]
    facts = [
        {"device": r.environment.get("device"), "dtype used": r.environment.get("dtype")}
        | r.versions
        for r in records
    ]
    found = differing(recipes, [record.shown for record in records]) | differing(facts)
    return tuple(Setting(key, shown) for key, shown in found.items())


def _measures(records: Sequence[Record]) -> tuple[Measure, ...]:
    losses = [held_out_loss(record.evaluation or {}, record.held) for record in records]
    bases = [_base_loss(record) for record in records]
    shown = tuple(
        ABSENT if tuned is None else f"{tuned:.4f}" + (f" ({tuned - base:+.4f})" if base else "")
        for tuned, base in zip(losses, bases, strict=True)
    )
    found = [Measure("held-out loss", tuple(losses), shown, _best(losses, lowest=True))]
    for name, higher in _task_names(records):
        scores = [_task(record, name) for record in records]
        shown = tuple(
            ABSENT if s is None else f"{s['tuned']:.4g} ({s['tuned'] - s['base']:+.4g})"
            for s in scores
        )
        values = tuple(None if s is None else finite(s["tuned"]) for s in scores)
        found.append(Measure(name, values, shown, _best(values, lowest=not higher)))
    best = [float(r.best.step) if r.best else None for r in records]
    last = [next(reversed(r.numbers("loss")), None) for r in records]
    found += [
        _measure("best step", best, "{:,.0f}".format),
        _measure("training loss", last, "{:.4f}".format),
        _measure("steps", [float(r.steps[-1]["step"]) if r.steps else None for r in records]),
        _measure("time", [r.seconds or None for r in records], duration),
        _measure("tokens/s", [_speed(r) for r in records], "{:,.0f}".format),
        _measure(
            "GB", [max(r.numbers("memory_gb"), default=None) for r in records], "{:.2f}".format
        ),
    ]
    return tuple(m for m in found if any(value is not None for value in m.values))


def _measure(
    name: str,
    values: Sequence[float | None],
    show: Callable[[float], str] = "{:,.0f}".format,
    lowest: bool | None = None,
) -> Measure:
    best = None if lowest is None else _best(values, lowest)
    shown = tuple(ABSENT if value is None else show(value) for value in values)
    return Measure(name, tuple(values), shown, best)


def _best(values: Sequence[float | None], lowest: bool) -> int | None:
    """Index of the only best value; None for less than two values, or a tie."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    top = min(known) if lowest else max(known)
    return values.index(top) if known.count(top) == 1 else None


def _base_loss(record: Record) -> float | None:
    return finite(((record.evaluation or {}).get("base") or {}).get("loss"))


def _scores(record: Record) -> list[Mapping[str, Any]]:
    tasks = (record.evaluation or {}).get("tasks") or []
    return [each for each in tasks if isinstance(each, dict) and {"task", "metric"} <= set(each)]


def _task_names(records: Sequence[Record]) -> list[tuple[str, bool]]:
    names = {
        f"{s['task']} {s['metric']}": bool(s.get("higher_is_better", True))
        for record in records
        for s in _scores(record)
    }
    return list(names.items())


def _task(record: Record, name: str) -> Mapping[str, Any] | None:
    return next((s for s in _scores(record) if f"{s['task']} {s['metric']}" == name), None)


def _speed(record: Record) -> float | None:
    tokens = sum(record.numbers("tokens"))
    return tokens / record.seconds if tokens and record.seconds else None


def _notes(records: Sequence[Record]) -> tuple[str, ...]:
    """Reasons for which numbers of these runs cannot be compared."""
    notes = []
    tokens = {((r.evaluation or {}).get("tuned") or {}).get("tokens") for r in records} - {None}
    bases = [loss for r in records if (loss := _base_loss(r)) is not None]
    if len(tokens) > 1:
        notes.append("the held-out losses are not of the same rows")
    elif bases and not math.isclose(min(bases), max(bases), rel_tol=1e-3):
        notes.append("the held-out losses are not of the same rows or the same base")
    for name, _ in _task_names(records):
        rows = {score.get("rows") for r in records if (score := _task(r, name))}
        if len(rows) > 1:
            notes.append(f"{name}: the runs were scored on different numbers of rows")
    return tuple(notes)


def _color(place: int) -> str:
    return RUN_COLORS[place % len(RUN_COLORS)]


def _chart(name: str, lines: Sequence[Sequence[Point]], zero: bool = False) -> Chart | None:
    series = [Series(points, color=_color(i)) for i, points in enumerate(lines)]
    return line_chart(name, series, zero)


def _smooth(record: Record) -> Sequence[Point]:
    return trend(record.column("loss"))[-1].points


def _held(record: Record, key: str) -> list[Point]:
    return [(row["step"], finite(row[key])) for row in record.held if key in row]
