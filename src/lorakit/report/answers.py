"""An evaluation enters; its scores and the answers side by side leave as HTML."""

from __future__ import annotations

from typing import Any

from lorakit.page import escape, table
from lorakit.report.read import without_path

STYLE = """
.narrow { max-width: 30rem; }
.answers { border: 1px solid var(--line); border-radius: .5rem; margin: .9rem 0; }
.answers > p { font-weight: 600; margin: 0; padding: .6rem .9rem; background: var(--card);
  border-radius: .5rem .5rem 0 0; white-space: pre-wrap; }
.answers > div { display: grid; grid-template-columns: repeat(3, 1fr); }
.answers section { padding: .6rem .9rem; white-space: pre-wrap; min-width: 0; font-size: .93rem; }
.answers section + section { border-left: 1px solid var(--line); }
.answers h3 { margin: 0 0 .2rem; color: var(--soft); font-weight: 500; font-size: .8rem; }
.answers .tuned { background: var(--wash); }
@media (max-width: 36rem) { .answers > div { grid-template-columns: 1fr; }
  .answers section + section { border-left: 0; border-top: 1px solid var(--line); }
  .narrow thead { display: table-header-group; } .narrow tr { display: table-row; }
  .narrow td { display: table-cell; border-bottom: 1px solid var(--line); padding: .35rem 0; }
  .narrow td[data-k]::before { content: none; } }
"""


def scores(found: dict[str, Any]) -> list[str]:
    """Loss and perplexity of base and tuned, then each question with the answers.

    Args:
        found: as in eval.json.
    """
    rows = [
        (name, f"{found[name]['loss']:.4f}", f"{found[name]['perplexity']:,.2f}")
        for name in ("base", "tuned")
    ]
    change = found["tuned"]["perplexity"] / found["base"]["perplexity"] - 1
    less = found["tuned"]["loss"] - found["base"]["loss"]
    rows.append(("change", f"{less:+.4f}", f"{change:+.1%}"))
    data = escape(str(without_path(found["data"])))
    words = f"Held out: {data}, {found['tuned']['tokens']:,} trained tokens. Answers are greedy."
    return [
        f'<div class="narrow">{table(("", "loss, nats a token", "perplexity"), rows)}</div>',
        f'<p class="soft">{words}</p>',
        *(_answers(sample) for sample in found.get("samples", [])),
    ]


def _answers(sample: dict[str, Any]) -> str:
    parts = "".join(
        f'<section class="{name}"><h3>{name}</h3>{escape(sample[name].strip())}</section>'
        for name in ("base", "tuned", "reference")
    )
    return f'<div class="answers"><p>{escape(sample["prompt"].strip())}</p><div>{parts}</div></div>'
