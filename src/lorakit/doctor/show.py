"""Print the findings as a table, followed by the commands that fix them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorakit.doctor.checks import Finding, State

# States are shown as words, not only as colors.
MARKS: dict[State, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "note": ("note", "yellow"),
    "broken": ("BROKEN", "bold red"),
    "skipped": ("-", "dim"),
}


def show_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print one line per check; then, for each problem, its cause and command."""
    table = Table(box=None, padding=(0, 1), show_header=False)
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark, style = MARKS[finding.state]
        table.add_row(Text(mark, style=style), finding.check, Text(finding.found))
    console.print(table)
    problems = [f for f in findings if f.command]
    for finding in problems:
        console.print(f"\n{finding.check}: {finding.found}", soft_wrap=True)
        console.print(f"    {finding.command}", style="bold", soft_wrap=True)
    broken = sum(f.state == "broken" for f in findings)
    summary = "nothing is broken" if not broken else f"{broken} broken"
    console.print(f"\n{summary}, {len(problems) - broken} to know" if problems else f"\n{summary}")
