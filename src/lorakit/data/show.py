"""An example, a report or an inspection enters; text for a terminal leaves.

Trained tokens stand between ⟦ and ⟧. Color only repeats what the brackets say, so that a pipe,
NO_COLOR or a color-blind reader loses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorakit.data.inspection import Inspection, Piece, pieces, runs, visible
from lorakit.data.lengths import Lengths
from lorakit.data.pack import PAYS_ABOVE, packing_words
from lorakit.records import DataReport, Example, Fault

TRAINED, MASKED, SPECIAL = "bold green underline", "dim", "magenta"
# Characters of one run of tokens on a screen before its middle is left out.
SHOWN_CHARS = 600
# Unused columns of a source listed on a screen; data_report.json has all.
SHOWN_COLUMNS = 12


def render_example(tokenizer: Any, example: Example) -> Text:
    """The decoded tokens of `example`: special tokens spelled out, trained runs in ⟦ ⟧."""
    return render_pieces(list(pieces(tokenizer, example)))


def render_pieces(parts: Sequence[Piece], limit: int | None = None) -> Text:
    """Pieces as styled text; of runs longer than `limit` characters the middle is left out."""
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
    """The run's beginning, how many tokens are left out, and its end."""
    if limit is None or sum(len(piece.text) for piece in run) <= limit:
        return run, 0, []
    head, room = 0, limit // 2
    while room > 0:
        room -= len(run[head].text)
        head += 1
    tail, room = len(run), limit // 2
    while room > 0 and tail > head:
        tail -= 1
        room -= len(run[tail].text)
    return run[:head], sum(len(piece.ids) for piece in run[head:tail]), run[tail:]


def show_report(report: DataReport, console: Console) -> None:
    """What was read and what of it is trained, each fault on a line of its own."""
    _show_sources(report, console)
    for fault in report.faults:
        rows = ", ".join(fault.first_rows)
        line = f"note     {fault.count} x {fault.kind}: {fault.action} ({rows})"
        console.print(visible(line), markup=False)


def _show_sources(report: DataReport, console: Console) -> None:
    for source in report.sources:
        console.print(visible(f"data     {source_line(source)}"), markup=False)
    console.print(
        f"examples {report.examples_train:,} to train on, {report.examples_val:,} held out; "
        f"{report.trained_tokens_train:,} of {report.tokens_train:,} tokens trained "
        f"({report.trained_share:.0%}); "
        f"longest {report.longest_example} of {report.cutoff_len}"
    )
    console.print(visible(f"template {report.template}"), markup=False)


def source_line(source: dict[str, Any]) -> str:
    """One source in words: its rows, its format, why, and whatever else the report knows of it."""
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


def show_inspection(inspection: Inspection, console: Console) -> None:
    """Sources, faults, lengths and examples, and at the end whether a run would go through."""
    report = inspection.report
    console.print(f"model    {inspection.model}", markup=False)
    _show_sources(report, console)
    console.print()
    if report.faults and console.width >= 60:
        console.print(_fault_table(inspection))
    elif report.faults:
        console.print("faults")
        for fault in report.faults:
            rows = ", ".join(fault.first_rows)
            line = f"{fault.count:,} x {fault.kind}: {outcome(inspection, fault)} ({rows})"
            style = "bold red" if inspection.stops(fault) else ""
            console.print(Text(visible(line), style=style))
    else:
        console.print("no faults found")
    console.print()
    _show_lengths(inspection.lengths, console)
    console.print()
    legend = Text("tokens as the model sees them: ")
    legend.append("⟦trained⟧", style=TRAINED).append("  ").append("read only", style=MASKED)
    legend.append("  ").append("<special>", style=SPECIAL)
    console.print(legend)
    for shown in inspection.shown:
        example = shown.example
        why = f", {shown.why}" if shown.why else ""
        size = f"{example.trained_tokens} of {len(example.input_ids)} tokens trained"
        console.print(Text(visible(f"\n── {example.origin}{why}: {size}"), style="bold"))
        console.print(render_pieces(shown.pieces, SHOWN_CHARS))
    console.print()
    console.print(Text(visible(verdict(inspection)), style="bold"))


def _fault_table(inspection: Inspection) -> Table:
    table = Table(title="faults", title_justify="left")
    table.add_column("rows", justify="right")
    table.add_column("what", overflow="fold")
    table.add_column("done", overflow="fold")
    table.add_column("first rows", overflow="fold")
    for fault in inspection.report.faults:
        cells = (fault.kind, outcome(inspection, fault), ", ".join(fault.first_rows))
        style = "bold red" if inspection.stops(fault) else ""
        table.add_row(f"{fault.count:,}", *(Text(visible(cell)) for cell in cells), style=style)
    return table


def outcome(inspection: Inspection, fault: Fault) -> str:
    """What a run does about `fault`."""
    return "a run would stop here" if inspection.stops(fault) else fault.action


def _show_lengths(lengths: Lengths, console: Console) -> None:
    console.print("length of an example in tokens")
    label = max(len(f"{bar.begin}-{bar.end}") for bar in lengths.bars)
    count = max(len(f"{bar.count:,}") for bar in lengths.bars)
    room = max(8, min(60, console.width - label - count - 6))
    most = max(bar.count for bar in lengths.bars)
    for bar in lengths.bars:
        # A bar that counts something is never empty.
        size = max(round(room * bar.count / most), 1 if bar.count else 0)
        name = f"{bar.begin}-{bar.end}"
        console.print(f"  {name:>{label}}  {'█' * size}{' ' * bool(size)}{bar.count:,}")
    console.print("\n".join(length_lines(lengths)))


def length_lines(lengths: Lengths) -> list[str]:
    """What the lengths mean for a run, in sentences."""
    rows = lengths.batch
    shares = f" ({lengths.padding:.0%} padding)" if rows > 1 else ""
    unpacked = f"{_batches(-(-lengths.step // rows))} of {rows} example{'s' * (rows > 1)}{shares}"
    packed = f"{_batches(lengths.packed)} of up to {rows * lengths.cutoff_len:,} tokens"
    step = f"a step of {lengths.step} examples is {unpacked}"
    if lengths.packing and packing_words(lengths.padding, True, cpu=True)[0]:
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
    """Whether a run on this data would go through, in a sentence."""
    report = inspection.report
    left_out = sum(f.count for f in report.faults if f.action == "left out")
    if inspection.stopping:
        kinds = ", ".join(fault.kind for fault in inspection.stopping)
        why = " (strict: true)" if inspection.strict else ""
        return f"a run would stop at this data: {kinds}{why}"
    if left_out:
        return f"fit to train on; {left_out:,} of {report.rows_read:,} rows left out"
    return "fit to train on"
