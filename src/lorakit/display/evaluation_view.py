"""Tables of base and tuned: scores, and answers in adjacent columns."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lorakit.redact import visible
from lorakit.types import EvalResult


def evaluation_view(result: EvalResult) -> Group:
    """Render the scores, then one table of answers for each question."""
    scores = Table()
    for column in ("", "loss", "perplexity", *map(visible, result.metrics)):
        scores.add_column(column, justify="right" if column else "left")
    means = list(result.metrics.values())
    for name, value in (("base", result.base), ("tuned", result.tuned)):
        own = [f"{mean[name]:.4g}" for mean in means]
        scores.add_row(name, f"{value.loss:.4f}", f"{value.perplexity:,.2f}", *own)
    change = result.tuned.perplexity / result.base.perplexity - 1
    changes = [f"{mean['tuned'] - mean['base']:+.4g}" for mean in means]
    loss = f"{result.tuned.loss - result.base.loss:+.4f}"
    scores.add_row("change", loss, f"{change:+.1%}", *changes)
    head = f"held-out: {result.data} ({result.tuned.tokens:,} trained tokens)"
    views: list[Text | Table] = [Text(visible(head)), scores]
    for sample in result.samples:
        # As Text: an answer such as "[/INST]" is not markup.
        prompt, *answers = (
            Text(visible(text))
            for text in (sample.prompt, sample.base, sample.tuned, sample.reference)
        )
        table = Table(title=prompt, title_justify="left", expand=True)
        for column in ("base", "tuned", "reference"):
            table.add_column(column, ratio=1, overflow="fold")
        table.add_row(*answers)
        views.append(table)
    return Group(*views)
