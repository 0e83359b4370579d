"""The entry point: a mistake is one message and an exit code, Ctrl-C is 130."""

import subprocess
import sys

import pytest

from lorakit.cli import inspect


def test_a_mistake_is_one_message(lorakit):
    code, out, err = lorakit("train", "--model", "./none", "--data", "x.jsonl")
    assert (code, out) == (2, "")
    assert "error: " in err
    assert "none: no such folder" in err
    assert "hint: " in err


def test_ctrl_c_is_130(lorakit, monkeypatch):
    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "print_json", broken)
    assert lorakit("schema")[0] == 130


def test_memory_that_runs_out_is_one_message(lorakit, monkeypatch):
    def broken(*_):
        raise MemoryError("Cannot allocate memory (os error 12)")

    monkeypatch.setattr(inspect, "print_json", broken)
    code, out, err = lorakit("schema")
    assert (code, out) == (1, "")
    assert "error: out of memory: Cannot allocate memory" in err
    assert "hint: " in err


def test_a_reader_that_goes_away_gets_no_traceback():
    command = [sys.executable, "-m", "lorakit", "schema"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait()


def test_a_bug_keeps_its_traceback(lorakit, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(inspect, "print_json", broken)
    with pytest.raises(ZeroDivisionError):
        lorakit("schema")
