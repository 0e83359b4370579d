"""Findings enter; a table and the lines to type leave."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorakit.doctor.checks import Finding, State

# Words, not colors alone, say what is wrong.
MARKS: dict[State, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "note": ("note", "yellow"),
    "broken": ("BROKEN", "bold red"),
    "skipped": ("-", "dim"),
}


def show_findings(findings: Sequence[Finding], console: Console) -> None:
    """What was looked at; then, for each trouble, its cause and what to type."""
    table = Table(box=None, padding=(0, 1), show_header=False)
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark, style = MARKS[finding.state]
        table.add_row(Text(mark, style=style), finding.check, Text(finding.found))
    console.print(table)
    troubles = [f for f in findings if f.command]
    for finding in troubles:
        console.print(f"\n{finding.check}: {finding.found}", markup=False, soft_wrap=True)
        console.print(f"    {finding.command}", style="bold", markup=False, soft_wrap=True)
    broken = sum(f.state == "broken" for f in findings)
    words = "nothing is broken" if not broken else f"{broken} broken"
    console.print(f"\n{words}, {len(troubles) - broken} to know" if troubles else f"\n{words}")
