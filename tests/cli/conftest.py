"""Fixtures of the command line's tests: one command, run in this process."""

import sys

import pytest
from tests.in_process import exit_code

from lorakit.cli import app, inspect, main, run_commands, sweep, train
from lorakit.console import plain_console


def run_cli(monkeypatch, capsys, *words):
    """(exit code, stdout, stderr) of one command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["lorakit", *map(str, words)])
    code = exit_code(main.main)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def lorakit(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for place in (main, app, inspect, sweep, train, run_commands):
        console = plain_console(stderr=True, soft_wrap=True)
        monkeypatch.setattr(place, "log", console)
    return lambda *words: run_cli(monkeypatch, capsys, *words)
