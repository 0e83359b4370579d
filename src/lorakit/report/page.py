"""The record of a run enters; its report leaves as one HTML page without network or script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakit.chart import Series, dense, line_chart, smoothed
from lorakit.model.load import public_name
from lorakit.page import bars, escape, facts, frame, table
from lorakit.report.answers import STYLE, scores
from lorakit.report.made import environment, exports, recipe, reproduce
from lorakit.report.read import Record, finite, without_path

GIB = 2**30
_STYLE = """
h1 { font-size: 1.7rem; line-height: 1.2; }
h2 { border-top: 1px solid var(--line); padding-top: 1.4rem; font-size: 1.2rem; }
h3 { font-size: .95rem; margin: 0 0 .2rem; } h3 span { color: var(--soft); font-weight: 400; }
.tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: .6rem; margin: 1.1rem 0 0; }
.tile { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.2rem; line-height: 1.4; white-space: nowrap;
  font-weight: 650; font-variant-numeric: tabular-nums; }
.tile b small { font-size: .8rem; font-weight: 500; }
.tile span { color: var(--soft); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1.4rem 1.6rem; } figure { margin: 0; min-width: 0; }
figcaption { color: var(--soft); font-size: .85rem; }
.chart { display: block; width: 100%; height: auto; } .tick { fill: var(--soft); }
.grid, .axis { stroke: var(--line); } .main, .raw { stroke: var(--blue); }
.held { stroke: var(--warm); } .bound { stroke: var(--soft); } .gap { stroke: var(--bad); }
.key { display: inline-block; width: 1.1rem; height: 0; border-top: 3px solid var(--blue);
  vertical-align: middle; } .key.warm { border-color: var(--warm); }
.key.dash { border-top: 2px dashed var(--soft); }
td { font-variant-numeric: tabular-nums; }
.defaults { columns: 15rem; padding: .6rem .9rem; margin: 0; font-size: .93rem; }
.defaults em { font-style: normal; } .defaults span { display: block; break-inside: avoid; }
code { font: .9em ui-monospace, "DejaVu Sans Mono", monospace; background: var(--card);
  padding: .1em .3em; border-radius: .25rem; }
td code { white-space: nowrap; } pre code { background: none; padding: 0; }
.memory i { background: var(--blue); } .memory .bars > div:last-child i { background: var(--warm); }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 36rem) { h1 { font-size: 1.4rem; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .tile { padding: .6rem .7rem; } .tile b { font-size: 1rem; }
  .memory .bars { grid-template-columns: 1fr; gap: 0; } .memory .bars span { text-align: left; }
  .settings td { display: inline; } .settings td[data-k]::before { content: " "; }
  .settings td:last-child { color: var(--soft); font-size: .85rem; } }
@media print { @page { margin: 16mm; } h2 { break-after: avoid; }
  figure, .answers, .tile, .bars, tr { break-inside: avoid; } pre { line-height: 1.4; }
  .charts { grid-template-columns: 1fr 1fr; } details::details-content {
  content-visibility: visible; display: block; } }
"""


def page(record: Record) -> str:
    """The whole page as one text."""
    body = [
        _head(record),
        "<h2>Before and after</h2>",
        *_evaluation(record),
        "<h2>Training</h2>",
        *_curves(record),
        "<h2>Memory: plan and measurement</h2>",
        *_memory(record),
        "<h2>Data</h2>",
        *_data(record),
        "<h2>Exports</h2>",
        *exports(record),
        "<h2>Recipe</h2>",
        *recipe(record),
        "<h2>Environment</h2>",
        environment(record),
        "<h2>How to reproduce</h2>",
        *reproduce(record),
        f"<footer>{_footer(record)}</footer>",
    ]
    return frame(f"{record.name}: what was trained", body, STYLE + _STYLE)


def _footer(record: Record) -> str:
    return (
        f"Made by lorakit {escape(str(record.versions.get('lorakit', '')))} from the files of this "
        "run alone. <code>train</code>, <code>eval</code> and <code>export</code> renew it, and so "
        f"does <code>lorakit report {escape(record.name)}</code>."
    )


def _head(record: Record) -> str:
    model = escape(public_name(str(record.shown["model"])))
    asked = record.recipe
    trained = (record.plan.get("parts") or {}).get("adapters (float32)")
    count = f" ({trained / 4e6:,.1f} million trained parameters)" if trained else ""
    sentence = (
        f"{model} tuned with {'QLoRA' if asked.method == 'qlora' else 'LoRA'}, rank "
        f"{asked.lora_r}{count}, on {_sources(record)}."
    )
    tiles = "".join(
        f'<div class="tile"><b>{value}</b><span>{name}</span></div>'
        for name, value in _figures(record)
    )
    return (
        f"<header><h1>{escape(record.name)}</h1><p>{sentence}</p>{_state(record)}"
        f'<div class="tiles">{tiles}</div></header>'
    )


def _sources(record: Record) -> str:
    given = record.shown["data"]
    parts = [given] if isinstance(given, str) else given
    names = [escape(str(p["source"] if isinstance(p, dict) else p)) for p in parts]
    examples = record.data.get("examples_train")
    count = f"{examples:,} examples of " if examples else ""
    return count + ", ".join(names[:4]) + (" and more" if len(names) > 4 else "")


def _state(record: Record) -> str:
    """What the run came to, in one sentence; a run that did not end is told first."""
    lost = sum(y is None for _, y in record.column("loss"))
    told = [f"{lost} step{'s' * (lost != 1)} without a finite loss"] if lost else []
    if not record.finished:
        last = record.steps[-1]["step"] if record.steps else 0
        of = f" of {record.recipe.max_steps:,}" if record.recipe.max_steps else ""
        told.insert(0, f"Stopped after step {last:,}{of}; <code>--resume</code> goes on from there")
        return f'<p class="verdict bad">{"; ".join(told)}.</p>'
    found = record.evaluation
    if found:
        base, tuned = found["base"]["perplexity"], found["tuned"]["perplexity"]
        change = tuned / base - 1
        told.insert(
            0,
            f"Held-out perplexity went from {base:,.2f} to {tuned:,.2f} ({change:+.1%})",
        )
        worse = " bad" if change > 0 else ""
        return f'<p class="verdict{worse}">{"; ".join(told)}.</p>'
    told.insert(0, "Trained to the end; no held-out rows, so nothing was evaluated")
    return f'<p class="verdict">{"; ".join(told)}.</p>'


def _figures(record: Record) -> list[tuple[str, str]]:
    """The numbers that one looks for first, as (name, HTML)."""
    losses, memory = record.numbers("loss"), record.numbers("memory_gb")
    tokens = sum(record.numbers("tokens"))
    found = []
    if record.evaluation:
        both = [record.evaluation[k]["loss"] for k in ("base", "tuned")]
        found.append(("held-out loss", f"{both[0]:.3f} → {both[1]:.3f}"))
    if losses:
        ends = [losses[0], losses[-1]][: len(losses)]
        found.append(("training loss", " → ".join(f"{loss:.3f}" for loss in ends)))
    if record.steps:
        found.append(("optimizer steps", f"{record.steps[-1]['step']:,}"))
        found.append(("spent in steps", duration(record.seconds)))
    if tokens and record.seconds:
        speed = tokens / record.seconds
        found.append(("tokens a second", f"{speed:,.0f}"))
    if memory:
        found.append(("largest memory", f"{max(memory) * 1e9 / GIB:.2f} <small>GiB</small>"))
    return found


def duration(seconds: float) -> str:
    """A span of time in two units at most."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _evaluation(record: Record) -> list[str]:
    if record.evaluation:
        return scores(record.evaluation)
    if not record.finished:
        return ['<p class="soft">Not evaluated: the run did not end.</p>']
    way = "<code>lorakit eval RUN --data FILE.jsonl</code> scores any data"
    return [f'<p class="soft">No held-out rows. {way}.</p>']


def _curves(record: Record) -> list[str]:
    if not record.steps:
        return ['<p class="soft">No step was finished.</p>']
    lines = loss_series(record)
    words = '<span class="key"></span> training, running mean'
    if lines[-1].kind == "held":
        words += ' &ensp;<span class="key warm"></span> held out'
    if any(y is None for _, y in lines[0].points):
        words += "; red at the foot: no finite loss, step skipped"
    charts = [_figure("Loss", "nats a token", lines, words)]
    clip = record.recipe.max_grad_norm
    norm = record.column("grad_norm")
    bound = [Series([(norm[0][0], clip), (norm[-1][0], clip)], "bound")] if norm else []
    charts.append(
        _figure(
            "Gradient norm", "", [*dense(norm), *bound],
            f'<span class="key dash"></span> clipped above {clip:g}',
        )
    )  # fmt: skip
    rate = record.column("learning_rate")
    charts.append(_figure("Learning rate", "", [Series(rate)], record.recipe.lr_scheduler, True))
    charts.append(_speed(record))
    shown = "".join(chart for chart in charts if chart)
    return [f'<div class="charts">{shown}</div>', *_events(record)]


def loss_series(record: Record) -> list[Series]:
    """Loss of each step, its running mean, and the held-out losses where there are any."""
    loss = record.column("loss")
    held = [(row["step"], finite(row["eval_loss"])) for row in record.held]
    if record.evaluation and record.finished and record.steps:
        last = record.steps[-1]["step"]
        held = [p for p in held if p[0] != last] + [(last, record.evaluation["tuned"]["loss"])]
    lines = [Series(loss, "raw"), Series(smoothed(loss))]
    return [*lines, Series(held, "held")] if held else lines


def _speed(record: Record) -> str:
    speed = record.column("tokens_per_second")
    expected = finite(record.plan.get("tokens_per_second"))
    words = ""
    lines = dense(speed)
    if expected and speed:
        lines.append(Series([(speed[0][0], expected), (speed[-1][0], expected)], "bound"))
        words = f'<span class="key dash"></span> the plan expected {expected:,.0f}'
    return _figure("Speed", "tokens a second", lines, words, True)


def _memory_curve(record: Record) -> str:
    used = [(x, y * 1e9 / GIB if y is not None else None) for x, y in record.column("memory_gb")]
    planned = finite(record.plan.get("total_bytes"))
    lines, words = [Series(used)], ""
    if planned and used:
        lines.append(Series([(x, planned / GIB) for x in (used[0][0], used[-1][0])], "bound"))
        words = f'<span class="key dash"></span> the plan: {planned / GIB:.2f} GiB'
    return _figure("Over the steps", "GiB", lines, words, True)


def _figure(name: str, unit: str, lines: Sequence[Series], words: str, zero: bool = False) -> str:
    """A chart with its name above and what its lines are below; nothing where no number is."""
    main = next(s for s in lines if s.kind == "main")
    values = [y for _, y in main.points if y is not None]
    if not any(y is not None for s in lines if s.kind != "bound" for _, y in s.points):
        return ""
    said = f" from {values[0]:.4g} to {values[-1]:.4g}" if values else ""
    chart = line_chart(lines, f"{name} by step{said}", zero)
    aside = f" <span>{unit}</span>" if unit else ""
    return f"<figure><h3>{name}{aside}</h3>{chart}<figcaption>{words}</figcaption></figure>"


def _events(record: Record) -> list[str]:
    """Steps that were skipped or stood out."""
    skipped = [row["step"] for row in record.steps if row.get("skipped")]
    spikes = [row["step"] for row in record.steps if row.get("spike")]
    told = []
    for name, steps in (("skipped: no finite number", skipped), ("spike in the loss", spikes)):
        if steps:
            first = ", ".join(f"{s:,}" for s in steps[:8]) + (" ..." if len(steps) > 8 else "")
            told.append(f"<p>{name}: step{'s' * (len(steps) != 1)} {first}</p>")
    return told


def _memory(record: Record) -> list[str]:
    parts, planned = record.plan.get("parts"), finite(record.plan.get("total_bytes"))
    if not parts or not planned:
        return ['<p class="soft">This run has no plan.json.</p>']
    used = record.numbers("memory_gb")
    rows = [(escape(name), float(size), f"{size / GIB:.2f}") for name, size in parts.items()]
    rows = [row for row in rows if row[1] >= planned / 500]
    rows.append(("<b>planned</b>", planned, f"<b>{planned / GIB:.2f} GiB</b>"))
    words = f"This device has {record.plan['available_bytes'] / GIB:.1f} GiB."
    if used:
        most = max(used) * 1e9
        rows.append(("<b>measured</b>", most, f"<b>{most / GIB:.2f} GiB</b>"))
        off = f"{abs(most / planned - 1):.0%} {'over' if most > planned else 'under'} the plan"
        words = f"Measured {off}. {words}"
    if record.environment.get("kind") == "cuda":
        words += (
            " Measured is the most that torch held; the driver's own share, part of the plan, "
            "comes on top."
        )
    elif record.environment:
        words += " Measured is the process's resident memory as each row was logged."
    host = record.plan.get("host_bytes")
    if host:
        words += f" In host memory besides: {host / GIB:.1f} GiB planned."
    picture = f'<div class="memory">{bars(rows, 60)}</div>{_memory_curve(record)}'
    return [
        f'<div class="charts">{picture}</div>',
        f'<p class="soft">{words}</p>',
    ]


def _data(record: Record) -> list[str]:
    found = record.data
    if not found:
        return ['<p class="soft">This run has no data_report.json.</p>']
    share = found["trained_tokens_train"] / max(found["tokens_train"], 1)
    sources = [
        f"{escape(str(without_path(s['source'])))}: {s['rows']:,} rows, {escape(str(s['format']))}"
        for s in found["sources"]
    ]
    text = facts(
        {
            "Sources": "<br>".join(sources),
            "Examples": f"{found['examples_train']:,} trained on, "
            f"{found['examples_val']:,} held out",
            "Tokens": f"{found['trained_tokens_train']:,} of {found['tokens_train']:,} are trained "
            f'({share:.0%})<div class="share"><i style="width:{share:.1%}"></i></div>',
            "Template": escape(str(found["template"])),
        }
    )
    return [text, *_lengths(found), *_faults(found)]


def _lengths(found: dict[str, Any]) -> list[str]:
    lengths = found.get("lengths")
    if not lengths:
        return [f"<p>Longest example: {found['longest_example']:,} tokens.</p>"]
    rows = [
        (f"{bar['begin']:,}–{bar['end']:,}", bar["count"], f"{bar['count']:,}")
        for bar in lengths["bars"]
    ]
    said = (
        f"Shortest {lengths['shortest']:,}, median {lengths['median']:,}, 95% up to "
        f"{lengths['p95']:,}, longest {lengths['longest']:,}; cutoff_len {found['cutoff_len']:,}."
    )
    head = "<h3>Examples by length <span>in tokens</span></h3>"
    return [head, bars(rows), f'<p class="soft">{said}</p>']


def _faults(found: dict[str, Any]) -> list[str]:
    if not found["faults"]:
        return ["<p>No fault was found in the data.</p>"]
    rows = [
        (
            f"{fault['count']:,} × {escape(fault['kind'])}",
            escape(fault["action"]),
            escape(", ".join(fault["first_rows"])),
        )
        for fault in found["faults"]
    ]
    return [table(("Fault", "Done", "First rows"), rows)]
