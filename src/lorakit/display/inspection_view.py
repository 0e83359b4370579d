"""Render prepared data: the report, the inspection, and examples token by token.

Trained tokens are between ⟦ and ⟧. Color only repeats the brackets, so that no information is lost
in a pipe, under NO_COLOR, for a color-blind reader, or on a website that removes a notebook's
styles. All text from data is a `Text`: a plain string would be parsed as rich markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lorakit.data.batching import PAYS_ABOVE, decide_packing
from lorakit.data.inspection import Inspection, Lengths, Piece, Shown, runs, token_texts
from lorakit.display.rich_output import bar_text
from lorakit.redact import visible
from lorakit.types import DataReport, Example

TRAINED, MASKED, SPECIAL = "bold green underline", "dim", "magenta"
# Characters of one run of tokens on a screen before its middle is omitted.
SHOWN_CHARS = 600
# Unused columns of a source listed on a screen; data_report.json lists all.
SHOWN_COLUMNS = 12


def render_example(tokenizer: Any, example: Example) -> Text:
    """Render the decoded tokens of `example`, with special tokens and trained runs in ⟦ ⟧."""
    return token_text(list(token_texts(tokenizer, example)))


def token_text(parts: Sequence[Piece], limit: int | None = None) -> Text:
    """Style the text of `parts`; the middle of runs longer than `limit` characters is omitted."""
    text = Text()
    for trained, run in runs(parts):
        text.append("⟦" if trained else "")
        head, left_out, tail = _shortened(run, limit)
        for piece in head:
            text.append(visible(piece.text), style=_style(piece))
        if left_out:
            text.append(f" [… {left_out} tokens …] ", style="italic")
        for piece in tail:
            text.append(visible(piece.text), style=_style(piece))
        text.append("⟧" if trained else "")
    return text


def _style(piece: Piece) -> str:
    if piece.special:
        return f"{TRAINED} {SPECIAL}" if piece.trained else SPECIAL
    return TRAINED if piece.trained else MASKED


def _shortened(run: list[Piece], limit: int | None) -> tuple[list[Piece], int, list[Piece]]:
    """Split a run into (beginning, number of omitted tokens, end)."""
    if limit is None or sum(len(piece.text) for piece in run) <= limit:
        return run, 0, []
    head, budget = 0, limit // 2
    while budget > 0:
        budget -= len(run[head].text)
        head += 1
    tail, budget = len(run), limit // 2
    while budget > 0 and tail > head:
        tail -= 1
        budget -= len(run[tail].text)
    return run[:head], sum(len(piece.ids) for piece in run[head:tail]), run[tail:]


def report_view(report: DataReport) -> Text:
    """Render the sources, the trained share, and one line for each fault."""
    notes = [
        f"note     {fault.count} x {fault.kind}: {fault.action} ({', '.join(fault.first_rows)})"
        for fault in report.faults
    ]
    return _lines(*_source_lines(report), *notes)


def _source_lines(report: DataReport) -> list[str]:
    sources = [f"data     {source_line(source)}" for source in report.sources]
    if all(source["format"] == "prompts" for source in report.sources):
        return [
            *sources,
            f"prompts  {report.examples_train:,} to sample completions of, {report.examples_val:,} "
            f"held out; {report.tokens_train:,} tokens; longest {report.longest_example} of "
            f"{report.cutoff_len} with its completion",
            f"template {report.template}",
        ]
    return [
        *sources,
        f"examples {report.examples_train:,} to train on, {report.examples_val:,} held out; "
        f"{report.trained_tokens_train:,} of {report.tokens_train:,} tokens trained "
        f"({report.trained_share:.0%}); "
        f"longest {report.longest_example} of {report.cutoff_len}",
        f"template {report.template}",
    ]


def source_line(source: dict[str, Any]) -> str:
    """Describe one source: rows, format with its reason, and other facts of the report."""
    known = ("source", "rows", "format", "reason", "left_out", "columns_not_used")
    rows = f"{source['rows']:,} row{'s' * (source['rows'] != 1)}"
    line = f"{source['source']}: {rows}, format {source['format']}"
    if source.get("reason"):
        line += f" ({source['reason']})"
    rest = [f"{key} {value}" for key, value in source.items() if key not in known]
    left = source.get("left_out", 0)
    unused = source.get("columns_not_used")
    if unused:
        rest.append(f"columns not used: {_listed(unused)}")
    return ", ".join([line, *([f"{left:,} left out"] if left else []), *rest])


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN_COLUMNS
    return ", ".join([*names[:SHOWN_COLUMNS], *([f"and {more} more"] if more > 0 else [])])


def inspection_view(inspection: Inspection, limit: int | None = SHOWN_CHARS) -> Group:
    """Render sources, faults, lengths, examples and the verdict.

    Args:
        limit: as in `token_text`.
    """
    report = inspection.report
    legend = Text("tokens as the model sees them: ")
    legend.append("⟦trained⟧", style=TRAINED).append("  ").append("read only", style=MASKED)
    legend.append("  ").append("<special>", style=SPECIAL)
    return Group(
        _lines(f"model    {inspection.model}", *_source_lines(report), ""),
        *_fault_lines(inspection),
        Text("\nlength of an example in tokens"),
        _length_table(inspection.lengths),
        _lines(*length_lines(inspection.lengths), ""),
        *(Text(visible(f"note: {note}"), style="bold") for note in inspection.notes),
        legend,
        *(example_view(shown, limit) for shown in inspection.shown),
        Text(f"\n{visible(verdict(inspection))}", style="bold"),
    )


def example_view(shown: Shown, limit: int | None = None) -> Group:
    """Render one example: its origin, trained share and tokens."""
    example = shown.example
    why = f", {shown.why}" if shown.why else ""
    size = f"{example.trained_tokens} of {len(example.input_ids)} tokens trained"
    label = "" if example.good is None else f", labeled {'good' if example.good else 'bad'}"
    head = Text(visible(f"\n── {example.origin}{why}{label}: {size}"), style="bold")
    if not shown.rejected:
        return Group(head, token_text(shown.pieces, limit))
    sides = Table.grid(padding=(0, 2), expand=True)
    sides.add_column(ratio=1)
    sides.add_column(ratio=1)
    sides.add_row(Text("chosen", style="bold"), Text("rejected", style="bold"))
    answers = (side[shown.shared :] for side in (shown.pieces, shown.rejected))
    sides.add_row(*(token_text(answer, limit) for answer in answers))
    return Group(head, token_text(shown.pieces[: shown.shared], limit), sides)


def _fault_lines(inspection: Inspection) -> list[Text]:
    lines = [Text("faults" if inspection.report.faults else "no faults found")]
    for fault in inspection.report.faults:
        stops = inspection.stops(fault)
        done = "a run would stop here" if stops else fault.action
        line = f"  {fault.count:,} x {fault.kind}: {done} ({', '.join(fault.first_rows)})"
        lines.append(Text(visible(line), style="bold red" if stops else ""))
    return lines


def _length_table(lengths: Lengths) -> Table:
    table = Table.grid(padding=(0, 0, 0, 2))
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    most = max(bar.count for bar in lengths.bars)
    for bar in lengths.bars:
        table.add_row(f"{bar.begin}-{bar.end}", f"{bar.count:,}", bar_text(bar.count, most, 18))
    return table


def _lines(*lines: str) -> Text:
    return Text("\n".join(map(visible, lines)))


def length_lines(lengths: Lengths) -> list[str]:
    """Describe the lengths and the micro-batches of a step."""
    rows = lengths.batch
    shares = f" ({lengths.padding:.0%} padding)" if rows > 1 else ""
    unpacked = f"{_batches(-(-lengths.step // rows))} of {rows} example{'s' * (rows > 1)}{shares}"
    packed = f"{_batches(lengths.packed)} of up to {rows * lengths.cutoff_len:,} tokens"
    step = f"a step of {lengths.step} examples is {unpacked}"
    if lengths.packing and decide_packing(lengths.padding, True, cpu=True)[0]:
        step = f"a step of {lengths.step} examples is {packed}, packed; unpacked, {unpacked}"
    elif lengths.packing:
        step += f" on a CPU; on a GPU {packed}, packed (a CPU packs above {PAYS_ABOVE:.0%} padding)"
    return [
        f"shortest {lengths.shortest:,}, median {lengths.median:,}, 95% up to {lengths.p95:,}, "
        f"longest {lengths.longest:,}; cutoff_len {lengths.cutoff_len:,}",
        step,
    ]


def _batches(count: float) -> str:
    return f"{count:.1f} micro-batches".replace(".0", "") if count != 1 else "1 micro-batch"


def verdict(inspection: Inspection) -> str:
    """Describe in one sentence if a run on this data would succeed."""
    report = inspection.report
    left_out = sum(f.count for f in report.faults if f.action == "left out")
    if inspection.stopping:
        kinds = ", ".join(fault.kind for fault in inspection.stopping)
        why = " (strict: true)" if inspection.strict else ""
        return f"a run would stop at this data: {kinds}{why}"
    if left_out:
        return f"fit to train on; {left_out:,} of {report.rows_read:,} rows left out"
    return "fit to train on"
