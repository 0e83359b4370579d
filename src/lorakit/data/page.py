"""An inspection enters; one HTML page leaves: no network, no scripts, everything escaped.

Trained tokens are green and underlined, special ones boxed, the rest gray: told apart without
color, in print, in the dark and on a phone. A token's number shows when it is pointed at.
"""

from __future__ import annotations

import html
from pathlib import Path

from lorakit.data.inspection import Inspection, Piece, Shown, visible
from lorakit.data.lengths import Lengths
from lorakit.data.show import length_lines, outcome, source_line, verdict
from lorakit.records import DataReport
from lorakit.run_dir import write_text

# Should an escape ever be missed: no script runs, nothing is fetched or sent.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #667085; --line: #d8dce2;
  --paper: #fff; --card: #f6f7f9; --good: #0a6b35; --wash: #d9f2e3; --bad: #b42318;
  --mark: #7a3e9d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #98a1ae; --line: #363c45;
  --paper: #14171b; --card: #1d2127; --good: #6fe0a0; --wash: #143524; --bad: #ff8a7a;
  --mark: #d3a4f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); }
.verdict { border-left: .3rem solid var(--good); background: var(--card); padding: .6rem .9rem;
  font-weight: 600; } .verdict.bad { border-color: var(--bad); color: var(--bad); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 1rem 0; }
dt { color: var(--soft); } dd { margin: 0; }
.share { height: .8rem; border: 1px solid var(--good); margin: .3rem 0; }
.share i { display: block; height: 100%; background: var(--good); }
table { border-collapse: collapse; width: 100%; } th { text-align: left; color: var(--soft);
  font-weight: 500; } th, td { padding: .35rem .6rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; } tr.bad td { color: var(--bad); font-weight: 600; }
.bars { display: grid; grid-template-columns: max-content 1fr; gap: .2rem .8rem;
  font-variant-numeric: tabular-nums; margin-bottom: .8rem; }
.bars span { color: var(--soft); text-align: right; white-space: nowrap; }
.bars div { display: flex; gap: .5rem; align-items: center; white-space: nowrap; min-width: 0; }
.bars i { background: var(--good); height: .9rem; min-width: 0; flex: none;
  -webkit-print-color-adjust: exact; print-color-adjust: exact; }
details { border: 1px solid var(--line); border-radius: .4rem; margin: .8rem 0; }
summary { padding: .6rem .9rem; cursor: pointer; background: var(--card); border-radius: .4rem; }
pre { margin: 0; padding: .9rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .9rem/1.75 ui-monospace, "DejaVu Sans Mono", monospace; }
.m { color: var(--soft); }
.t { color: var(--good); background: var(--wash); text-decoration: underline;
  text-underline-offset: .2em; text-decoration-thickness: 2px; }
.s { border: 1px solid var(--mark); border-radius: .25rem; padding: 0 .2em; font-size: .85em; }
.s.m { color: var(--mark); }
.n { opacity: .6; }
@media (max-width: 36rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  thead { display: none; } tr { display: block; padding: .5rem 0;
  border-bottom: 1px solid var(--line); } td { display: block; border: 0; padding: 0; }
  td[data-k]::before { content: attr(data-k) " "; color: var(--soft); font-weight: 400; } }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } details { border: 0; } }
"""


def write_page(inspection: Inspection, path: Path) -> None:
    """Write the page to `path`; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page(inspection))


def page(inspection: Inspection) -> str:
    """The whole page as one text."""
    report = inspection.report
    names = ", ".join(str(source["source"]) for source in report.sources)
    bad = " bad" if inspection.stopping else ""
    body = [
        f"<h1>{escape(names)} for {escape(inspection.model)}</h1>",
        f'<p class="verdict{bad}">{escape(_sentence(verdict(inspection)))}</p>',
        _facts(report),
        "<h2>Faults</h2>",
        _faults(inspection),
        "<h2>Length of an example in tokens</h2>",
        _bars(inspection.lengths),
        *(f"<p>{escape(_sentence(line))}</p>" for line in length_lines(inspection.lengths)),
    ]
    if inspection.shown:
        body += [
            "<h2>Tokens as the model sees them</h2>",
            '<p><span class="t">trained</span> &emsp; <span class="m">read only</span> &emsp; '
            '<span class="s m">special</span> &emsp; <span class="n">↵</span> line end</p>',
            *(_example(shown) for shown in inspection.shown),
        ]
    title = escape(f"{names}: what will be trained")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def escape(text: str) -> str:
    """Text of the data as text of the page."""
    return html.escape(visible(text))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _facts(report: DataReport) -> str:
    share = report.trained_share
    sources = "<br>".join(escape(source_line(source)) for source in report.sources)
    facts = {
        "Data": sources,
        "Examples": f"{report.examples_train:,} to train on, {report.examples_val:,} held out",
        "Tokens": f"{report.trained_tokens_train:,} of {report.tokens_train:,} are trained "
        f'({share:.0%})<div class="share"><i style="width:{share:.1%}"></i></div>',
        "Template": escape(report.template),
    }
    lines = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    return f"<dl>{lines}</dl>"


def _faults(inspection: Inspection) -> str:
    rows = []
    for fault in inspection.report.faults:
        cells = {
            "": f"{fault.count:,} × {escape(fault.kind)}",
            "done:": escape(outcome(inspection, fault)),
            "first rows:": escape(", ".join(fault.first_rows)),
        }
        tds = "".join(
            f'<td data-k="{key}">{cell}</td>' if key else f"<td>{cell}</td>"
            for key, cell in cells.items()
        )
        kind = ' class="bad"' if inspection.stops(fault) else ""
        rows.append(f"<tr{kind}>{tds}</tr>")
    if not rows:
        return "<p>None found.</p>"
    head = "<thead><tr><th>What</th><th>Done</th><th>First rows</th></tr></thead>"
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"


def _bars(lengths: Lengths) -> str:
    most = max(bar.count for bar in lengths.bars)
    rows = []
    for bar in lengths.bars:
        # The number beside the longest bar needs room too.
        width = f"max({80 * bar.count / most:.2f}%, {1 if bar.count else 0}px)"
        rows.append(
            f"<span>{bar.begin:,}–{bar.end:,}</span>"
            f'<div><i style="width:{width}"></i>{bar.count:,}</div>'
        )
    return f'<div class="bars">{"".join(rows)}</div>'


def _example(shown: Shown) -> str:
    example = shown.example
    why = f", {shown.why}" if shown.why else ""
    head = f"{example.origin}{why}: "
    size = f"{example.trained_tokens:,} of {len(example.input_ids):,} tokens trained"
    tokens = "".join(_token(piece) for piece in shown.pieces)
    return f"<details open><summary>{escape(head)}{size}</summary><pre>{tokens}</pre></details>"


def _token(piece: Piece) -> str:
    # Line ends are shown, since they are tokens too.
    text = escape(piece.text).replace("\n", '<span class="n">↵</span>\n')
    kind = ("s " if piece.special else "") + ("t" if piece.trained else "m")
    ids = " ".join(map(str, piece.ids))
    return f'<span class="{kind}" title="{ids}">{text}</span>'
