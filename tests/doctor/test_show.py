"""Every trouble is shown with its cause and its line to type, in words and not by color alone."""

import io

import pytest
from rich.console import Console

from lorakit.doctor.checks import Finding
from lorakit.doctor.show import show_findings


@pytest.mark.parametrize("width", [60, 80, 120])
def test_commands_are_never_broken_over_lines(width):
    command = "pip install --force-reinstall torch==2.13.0 --index-url URL (the URL for CUDA 13.0)"
    rows = [
        Finding("torch", "broken", "torch 2.13.0+cpu is a CPU build", command, "cpu_torch"),
        Finding("python", "ok", "3.12.3"),
    ]
    console = Console(file=io.StringIO(), width=width)
    show_findings(rows, console)
    text = console.file.getvalue()
    assert f"    {command}\n" in text
    assert "BROKEN" in text
    assert "1 broken, 0 to know" in text


def test_all_well_is_one_line():
    console = Console(file=io.StringIO(), width=80)
    show_findings([Finding("python", "ok", "3.12.3")], console)
    assert console.file.getvalue().endswith("nothing is broken\n")
