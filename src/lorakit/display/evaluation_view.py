"""Tables of base and tuned: scores, tasks, and answers in adjacent columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lorakit.redact import visible
from lorakit.types import EvalResult, TaskScore

SCORE_HEADS = ("task", "metric", "rows", "before", "after", "change", "95% interval", "")
_STYLES = {"better": "green", "worse": "red"}


def evaluation_view(result: EvalResult) -> Group:
    """Render the scores, the tasks, then one table of answers for each question."""
    views: list[Text | Table] = []
    if result.base is not None and result.tuned is not None:
        head = f"held-out: {result.data} ({result.tuned.tokens:,} trained tokens)"
        views += [Text(visible(head)), _losses(result)]
    if result.base is None and result.metrics:
        views += [
            Text(visible(f"held-out: {result.data}")),
            *map(_metric_line, result.metrics.items()),
        ]
    if result.preferences:
        views.append(Text(preference_line(result.preferences)))
    if result.tasks:
        views += [Text("tasks: 95% interval of the change, by bootstrap over the rows")]
        views += [task_table(result.tasks)]
    if result.judge:
        views.append(Text(visible(judge_line(result.judge))))
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


def _metric_line(entry: tuple[str, Mapping[str, float]]) -> Text:
    """Describe the means of a metric for base and tuned in one line."""
    name, mean = entry
    rows = int(mean["rows"])
    return Text(
        visible(f"{name}: base {mean['base']:.4g}, tuned {mean['tuned']:.4g} ({rows} rows)")
    )


def preference_line(scores: Mapping[str, float]) -> str:
    """Describe the scores of preference data in one line."""
    names = {
        "rewards/accuracies": "prefers the chosen answer",
        "rewards/margins": "reward margin",
        "kl": "KL",
    }
    parts = [f"loss {scores['loss']:.4f}"]
    for key, name in names.items():
        if key in scores:
            share = key == "rewards/accuracies"
            parts.append(f"{name} {scores[key]:.0%}" if share else f"{name} {scores[key]:.4f}")
    return "preferences of tuned: " + ", ".join(parts) + "; losses above are of chosen answers"


def task_table(scores: Sequence[TaskScore]) -> Table:
    """Table of task scores: before, after, change and its interval."""
    table = Table()
    for place, column in enumerate(SCORE_HEADS):
        table.add_column(column, justify="right" if 2 <= place < 7 else "left", overflow="fold")
    for score in scores:
        style = _STYLES.get(score.verdict, "")
        table.add_row(*(Text(visible(cell)) for cell in score_cells(score)[:-1]),
                      Text(score_cells(score)[-1], style=style))  # fmt: skip
    return table


def score_cells(score: TaskScore) -> tuple[str, ...]:
    """Cells of a task score, in the order of `SCORE_HEADS`."""
    interval = ""
    if score.low is not None and score.high is not None:
        interval = f"{score.low:+.3f} to {score.high:+.3f}"
    rows = f"{score.rows:,}" + (f" ({score.failed} failed)" if score.failed else "")
    values = f"{score.base:.3f}", f"{score.tuned:.3f}", f"{score.change:+.3f}"
    return (score.task, score.metric, rows, *values, interval, score.verdict)


def judge_line(judge: dict[str, Any]) -> str:
    """Describe the counts of a pairwise comparison in one line."""
    low, high = judge["interval"]
    return (
        f"judge {judge['model']}: tuned better {judge['tuned']}, base better {judge['base']}, ties "
        f"{judge['ties']} of {judge['rows']}; tuned wins {judge['win_rate']:.0%} (95% interval "
        f"{low:.0%} to {high:.0%}, a tie is half a win); the same verdict in both orders: "
        f"{judge['agreement']:.0%}"
    )


def _losses(result: EvalResult) -> Table:
    assert result.base is not None
    assert result.tuned is not None
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
    return scores
