"""An inspection enters; one HTML page leaves: no network, no scripts, everything escaped.

Trained tokens are green and underlined, special ones boxed, the rest gray: told apart without
color, in print, in the dark and on a phone. A token's number shows when it is pointed at.
"""

from __future__ import annotations

from pathlib import Path

from lorakit.data.inspection import Inspection, Piece, Shown
from lorakit.data.lengths import Lengths
from lorakit.data.show import length_lines, outcome, source_line, verdict
from lorakit.page import bars, escape, facts, fragment, frame, table
from lorakit.records import DataReport
from lorakit.run_dir import write_text

_STYLE = """
ins { text-decoration: none; } kbd { font: inherit; }
.m { color: var(--soft); }
.t { color: var(--good); background: var(--wash); text-decoration: underline;
  text-underline-offset: .2em; text-decoration-thickness: 2px; }
.s { border: 1px solid var(--mark); border-radius: .25rem; padding: 0 .2em; font-size: .85em; }
.s.m { color: var(--mark); }
.n { opacity: .6; }
"""


def write_page(inspection: Inspection, path: Path) -> None:
    """Write the page to `path`; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page(inspection))


def page(inspection: Inspection) -> str:
    """The whole page as one text."""
    names = ", ".join(str(source["source"]) for source in inspection.report.sources)
    return frame(f"{names}: what will be trained", parts(inspection), _STYLE)


def cell(inspection: Inspection) -> str:
    """The same for a notebook."""
    return fragment(parts(inspection), _STYLE)


def parts(inspection: Inspection) -> list[str]:
    """What a page or a notebook's cell shows, as HTML."""
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
        length_bars(inspection.lengths),
        *(f"<p>{escape(_sentence(line))}</p>" for line in length_lines(inspection.lengths)),
    ]
    if inspection.shown:
        body += [
            "<h2>Tokens as the model sees them</h2>",
            '<p><ins class="t">trained</ins> &emsp; <span class="m">read only</span> &emsp; '
            '<kbd class="s m">special</kbd> &emsp; <span class="n">↵</span> line end</p>',
            *(_example(shown) for shown in inspection.shown),
        ]
    return body


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _facts(report: DataReport) -> str:
    share = report.trained_share
    return facts(
        {
            "Data": "<br>".join(escape(source_line(source)) for source in report.sources),
            "Examples": f"{report.examples_train:,} to train on, {report.examples_val:,} held out",
            "Tokens": f"{report.trained_tokens_train:,} of {report.tokens_train:,} are trained "
            f'({share:.0%})<div class="share"><i style="width:{share:.1%}"></i></div>',
            "Template": escape(report.template),
        }
    )


def _faults(inspection: Inspection) -> str:
    faults = inspection.report.faults
    if not faults:
        return "<p>None found.</p>"
    rows = [
        (
            f"{fault.count:,} × {escape(fault.kind)}",
            escape(outcome(inspection, fault)),
            escape(", ".join(fault.first_rows)),
        )
        for fault in faults
    ]
    bad = [inspection.stops(fault) for fault in faults]
    return table(("What", "Done", "First rows"), rows, bad)


def length_bars(lengths: Lengths) -> str:
    """How many examples have which length."""
    return bars([(f"{b.begin:,}–{b.end:,}", b.count, f"{b.count:,}") for b in lengths.bars])


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
    # These names alone underline and set apart, where a forge strips the style.
    name = "ins" if piece.trained else "kbd" if piece.special else "span"
    return f'<{name} class="{kind}" title="{ids}">{text}</{name}>'
