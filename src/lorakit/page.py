"""Parts of a page enter; one HTML page leaves: no network, no scripts, one style for all of them.

What comes from data, a model or a name passes `escape` on its way in.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from lorakit.data.inspection import visible

# Should an escape ever be missed: no script runs, nothing is fetched or sent.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_LIGHT = """--ink: #1c1e21; --soft: #5f6b7c; --line: #d8dce2; --paper: #fff; --card: #f6f7f9;
  --good: #0a6b35; --wash: #d9f2e3; --bad: #b42318; --mark: #7a3e9d; --blue: #1f5fae;
  --warm: #b4540a;"""
_DARK = """--ink: #e6e8eb; --soft: #98a1ae; --line: #363c45; --paper: #14171b; --card: #1d2127;
  --good: #6fe0a0; --wash: #143524; --bad: #ff8a7a; --mark: #d3a4f0; --blue: #7db4f5;
  --warm: #f2a65a;"""
_RULES = """
* { box-sizing: border-box; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); }
.verdict { border-left: .3rem solid var(--good); background: var(--card); padding: .6rem .9rem;
  font-weight: 600; } .verdict.bad { border-color: var(--bad); color: var(--bad); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 1rem 0; }
dt { color: var(--soft); } dd { margin: 0; }
.share { height: .8rem; border: 1px solid var(--good); margin: .3rem 0; max-width: 30rem; }
.share i { display: block; height: 100%; background: var(--good); }
table { border-collapse: collapse; width: 100%; color: inherit; font-size: inherit; }
th { text-align: left; color: var(--soft); font-weight: 500; white-space: nowrap; }
th, td { padding: .35rem .6rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; } tr.bad td { color: var(--bad); font-weight: 600; }
.bars { display: grid; grid-template-columns: max-content 1fr; gap: .2rem .8rem;
  font-variant-numeric: tabular-nums; margin-bottom: .8rem; }
.bars span { color: var(--soft); text-align: right; white-space: nowrap; }
.bars div { display: flex; gap: .5rem; align-items: center; white-space: nowrap; min-width: 0; }
.bars i { background: var(--good); height: .9rem; min-width: 0; flex: none; }
i, .tile { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
details { border: 1px solid var(--line); border-radius: .4rem; margin: .8rem 0; }
summary { padding: .6rem .9rem; cursor: pointer; background: var(--card); border-radius: .4rem; }
pre { margin: 0; padding: .9rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .9rem/1.75 ui-monospace, "DejaVu Sans Mono", monospace; }
@media (max-width: 36rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  thead { display: none; } tr { display: block; padding: .5rem 0;
  border-bottom: 1px solid var(--line); } td { display: block; border: 0; padding: 0; }
  td[data-k]::before { content: attr(data-k) " "; color: var(--soft); font-weight: 400; } }
@media print { details { border: 0; } }
"""
_BODY = """margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere;"""


def frame(title: str, body: Sequence[str], style: str = "") -> str:
    """The whole page as one text.

    Args:
        title: plain text.
        body: HTML whose foreign parts are escaped.
        style: rules of this kind of page beside those of all.
    """
    colors = (
        f":root {{ color-scheme: light dark; {_LIGHT} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}\n"
        f"body {{ {_BODY} }}\n@media print {{ body {{ max-width: none; padding: 0; "
        "font-size: 11pt; } }"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{colors}{_RULES}{style}</style>\n</head>\n"
        "<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def fragment(body: Sequence[str], style: str = "") -> str:
    """The same parts for the output of a notebook's cell: the style reaches nothing around it."""
    return (
        f"<style>.lorakit {{ {_LIGHT} {_BODY} padding: .8rem; max-width: none; "
        f"font-size: 14px; {_RULES}{style} }}\n"
        f"@media (prefers-color-scheme: dark) {{ .lorakit {{ {_DARK} }} }}</style>\n"
        '<div class="lorakit">\n' + "\n".join(body) + "\n</div>"
    )


def escape(text: str) -> str:
    """Text of the data as text of the page; half characters, which no file can hold, as `?`."""
    return html.escape(visible(text).encode(errors="replace").decode())


def table(head: Sequence[str], rows: Sequence[Sequence[str]], bad: Sequence[bool] = ()) -> str:
    """A table whose cells are HTML; on a phone each row is a block, its cells led by the heads.

    Args:
        bad: which rows to show as faults.
    """
    lines = []
    for number, row in enumerate(rows):
        cells = "".join(
            f'<td data-k="{name}:">{cell}</td>' if name and place else f"<td>{cell}</td>"
            for place, (name, cell) in enumerate(zip(head, row, strict=True))
        )
        kind = ' class="bad"' if number < len(bad) and bad[number] else ""
        lines.append(f"<tr{kind}>{cells}</tr>")
    heads = "".join(f"<th>{name}</th>" for name in head)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def facts(values: Mapping[str, str]) -> str:
    """Names and what they are, as HTML."""
    lines = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in values.items())
    return f"<dl>{lines}</dl>"


def bars(rows: Sequence[tuple[str, float, str]], longest: int = 78) -> str:
    """(name, size, what to write beside it) as bars; the longest fills `longest` % of the width."""
    most = max((size for _, size, _ in rows), default=0) or 1
    lines = []
    for name, size, words in rows:
        # The number beside the longest bar needs room too; what counts is never empty.
        width = f"max({longest * size / most:.2f}%, {1 if size else 0}px)"
        lines.append(f'<span>{name}</span><div><i style="width:{width}"></i>{words}</div>')
    return f'<div class="bars">{"".join(lines)}</div>'
